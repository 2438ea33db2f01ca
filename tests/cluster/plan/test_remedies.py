from cluster.config.schema import Config
from cluster.plan.remedies import changed, nearest_that_fits


def test_one_setting_that_is_enough_is_all_that_is_named():
    def fits(config: Config) -> bool:
        return config.ppo.network.gradient_checkpointing

    assert nearest_that_fits(Config(), "ppo", fits) == "ppo.network.gradient_checkpointing = true"


def test_several_are_named_where_none_alone_is_enough_and_no_more_than_needed():
    def fits(config: Config) -> bool:
        return config.ppo.network.gradient_checkpointing and config.ppo.max_tokens_per_microbatch <= 1024

    said = nearest_that_fits(Config(), "ppo", fits)
    assert said == "ppo.max_tokens_per_microbatch = 1024, ppo.network.gradient_checkpointing = true"


def test_nothing_is_named_where_nothing_helps():
    assert nearest_that_fits(Config(), "ppo", lambda config: False) is None


def test_a_change_reaches_its_section_and_nothing_else():
    config = changed(Config(), {"ppo.network.lora_rank": 4, "generator.kv_cache_gib": 0.5})
    assert (config.ppo.network.lora_rank, config.generator.kv_cache_gib) == (4, 0.5)
    assert config.sft == Config().sft
