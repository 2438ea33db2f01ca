"""Combinations that cannot run are refused before anything starts, with the remedy."""

import pytest
from pydantic import ValidationError

from learner.config import NetworkConfig, OptimizerConfig, PPOConfig


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "set zero_stage to 1, 2 or 3"),
        ({"zero_stage": 2, "offload_param": "cpu"}, r"needs zero_stage = 3 \(it is 2\)"),
        ({"zero_stage": 4}, "0, 1, 2 or 3"),
        ({"offload_optimizer": "nvme"}, "cpu"),
    ],
)
def test_impossible_sharding_is_refused(settings, remedy):
    with pytest.raises(ValidationError, match=remedy):
        OptimizerConfig.model_validate({"lr": 1e-3, **settings})


def test_norms_and_mlps_are_fused_once():
    with pytest.raises(ValidationError, match="set one of them to false"):
        NetworkConfig(compile=True, liger=True)


def test_the_critic_is_as_the_policy_unless_it_has_a_section_of_its_own():
    policy, critic = NetworkConfig(lora_rank=8), NetworkConfig(last_layers=2)
    assert PPOConfig(network=policy).critic == policy
    assert PPOConfig(network=policy, critic_network=critic).critic == critic
