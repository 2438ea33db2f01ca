"""What sections, models and the machine must agree on, checked before anything starts; all of it told at once."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import main as cli
from cluster.cli.commands import COMMANDS
from cluster.config.load import compose, presets, read_overrides
from cluster.config.schema import Config
from cluster.pipeline.stages import STAGES
from cluster.plan import check as checks
from cluster.plan.check import Diagnostics, check_config
from tests.model_folders import model_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with everything that PPO reads."""
    folder = tmp_path / "run"
    for name in ("sft", "reward"):
        model_folder(folder / name)
    (folder / "data").mkdir()
    for name in ("prompts", "prompts_heldout"):
        (folder / "data" / f"{name}.jsonl").write_text('{"prompt": "hello"}\n')
    for name in ("pretraining", "pretraining_valid"):
        (folder / "data" / f"{name}.jsonl").write_text('{"text": "hello"}\n')
    return folder


def found(run: Path, command: str = "ppo", **overrides: Any) -> Diagnostics:
    given = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    return check_config(compose(Config, read_overrides(Config, given)), STAGES[command], run)


def problem(run: Path, command: str = "ppo", **overrides: Any) -> str:
    """The only one."""
    (text,) = found(run, command, **overrides).problems
    return text


def test_a_right_configuration_has_no_problem_and_no_warning(run: Path) -> None:
    assert found(run) == Diagnostics()


@pytest.mark.parametrize("preset", presets())
def test_the_presets_agree_with_themselves(preset: str, tmp_path: Path) -> None:
    config = cli.load(Config, cli.parse(COMMANDS["quickstart"], ["--preset", preset]))
    if config.cluster.address == "local" and preset in ("quickstart", "tiny"):
        assert check_config(config, STAGES["quickstart"], tmp_path).problems == ()


@pytest.mark.parametrize(
    ("prompts", "samples", "size", "said"),
    [
        (100, 1, 48, "ppo.minibatch_size = 25 or 50, or ppo.prompts_per_batch = 96 or 144"),
        (64, 2, 96, "ppo.minibatch_size = 64 or 128, or ppo.prompts_per_batch = 48 or 96"),
        (8, 1, 64, "ppo.minibatch_size = 8, or ppo.prompts_per_batch = 64"),
        (10, 3, 4, "ppo.minibatch_size = 3 or 5, or ppo.prompts_per_batch = 8 or 12"),
    ],
)
def test_a_minibatch_that_does_not_divide_the_batch_names_the_nearest_that_do(
    run: Path, prompts: int, samples: int, size: int, said: str
) -> None:
    text = problem(run, ppo__prompts_per_batch=prompts, rollout__samples_per_prompt=samples, ppo__minibatch_size=size)
    assert f"ppo.minibatch_size = {size} does not divide" in text
    assert f"ppo.prompts_per_batch = {prompts} times rollout.samples_per_prompt = {samples}" in text
    assert text.endswith(f"which is {prompts * samples} responses. Nearest that work: {said}")


def test_a_prompt_and_response_longer_than_the_engine_takes(run: Path) -> None:
    lengths: dict[str, Any] = {"rollout__max_prompt_tokens": 100, "rollout__max_new_tokens": 50}
    text = problem(run, **lengths, generator__max_model_len=149)
    assert "is 150 tokens, and generator.max_model_len is 149. Nearest: generator.max_model_len = 150" in text
    assert not found(run, **lengths, generator__max_model_len=150).problems


def test_lengths_beyond_the_models_positions(run: Path, tmp_path: Path) -> None:
    def short(positions: int) -> str:
        return str(model_folder(tmp_path / str(positions), positions=positions))

    few: dict[str, Any] = {"ppo__pretraining__sequence_tokens": 64, "rollout__max_new_tokens": 8}
    text = problem(run, models__sft=short(2047), **few)
    assert "generator.max_model_len = 2048 is more than the 2047 positions of" in text
    assert text.endswith("Nearest: generator.max_model_len = 2047")
    few = {"generator__max_model_len": 256, "rollout__max_new_tokens": 8, "rollout__max_prompt_tokens": 64}
    assert "sequence_tokens = 2048 is more than the 512 positions" in problem(run, models__sft=short(512), **few)
    (run / "data" / "demonstrations.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert "sft.max_tokens = 1024 is more than the 1023" in problem(run, "sft", models__base=short(1023))


def test_the_reference_model_reads_what_the_policy_wrote(run: Path, tmp_path: Path) -> None:
    short = str(model_folder(tmp_path / "m", positions=2047))
    text = problem(run, models__sft=short, models__init=str(run / "sft"))
    assert f"is 2048 tokens, and the reference model {short} has 2047 positions" in text


def test_responses_longer_than_the_reward_model_reads(run: Path, tmp_path: Path) -> None:
    text = problem(run, scoring__max_tokens=2047)
    assert "is 2048 tokens, and scoring.max_tokens = 2047" in text
    assert "scoring.truncate_prompt" in text
    assert not found(run, scoring__max_tokens=2047, scoring__truncate_prompt=True).problems
    short = str(model_folder(tmp_path / "m", positions=2000))
    text = problem(run, models__reward=short)
    assert "the reward model" in text
    assert "= 2000" in text
    text = problem(run, models__reward=short, scoring__truncate_prompt=True)
    assert "the critic" in text  # it reads what the policy wrote, and cannot be cut
    assert "has 2000 positions" in text


def test_a_reward_model_of_another_tokenizer_cannot_be_the_critic(run: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "m", words=("b", "a", "c"))
    text = problem(run, models__reward=str(other))
    assert f"the tokenizers of models.sft = {run / 'sft'} and of {other}" in text
    assert "Set models.critic" in text
    assert not found(run, models__reward=str(other), models__critic=str(run / "sft")).problems


def test_a_critic_may_know_more_tokens_and_needs_no_reward_model_beside_it(run: Path, tmp_path: Path) -> None:
    larger = model_folder(tmp_path / "m", words=("a", "b", "c", "<|pad|>"))
    assert not found(run, models__reward=str(larger)).problems
    shutil.rmtree(run / "reward")
    parts = '[{name = "words", kind = "length"}]'
    assert "there is no reward model" in problem(run, scoring__parts=parts)
    assert not found(run, models__critic=str(run / "sft"), scoring__parts=parts).problems


@pytest.mark.parametrize(
    "key", ["ppo__policy_optimizer__lr", "rollout__missing_eos__value", "rollout__wave_deadline_s"]
)
@pytest.mark.parametrize("value", ["inf", "1e400"])
def test_numbers_that_are_none_are_refused(run: Path, key: str, value: str) -> None:
    text = problem(run, **{"command": "ppo", key: value})
    assert text.startswith(f"{key.replace('__', '.')} = inf is not a finite number")
    assert "= nan" in problem(run, rollout__missing_eos__value="nan")


def test_zero_stage_0_is_for_float32(run: Path) -> None:
    text = problem(run, ppo__critic_optimizer__zero_stage=0)
    assert text.startswith("ppo.critic_optimizer.zero_stage = 0 with ppo.network.dtype = bfloat16: stage 0")
    assert not found(run, ppo__critic_optimizer__zero_stage=0, ppo__network__dtype="float32").problems


def test_norms_and_mlps_are_fused_where_that_can_be(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = problem(run, ppo__network__compile=True, ppo__critic_optimizer__zero_stage=3)
    assert text.startswith("ppo.network.compile does not go with ppo.critic_optimizer.zero_stage = 3")
    assert not found(run, ppo__network__compile=True, ppo__critic_optimizer__zero_stage=2).problems
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    monkeypatch.setattr(checks, "machine_gpus", lambda: 0)
    package, gpu = found(run, ppo__network__liger=True).problems
    assert package.startswith("ppo.network.liger needs the package liger-kernel, which is not installed here")
    assert gpu.startswith("ppo.network.liger computes on GPUs alone")
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    assert found(run, ppo__network__liger=True).problems == (gpu,)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"generator__dtype": "float32"}, "generator.dtype = float32 and ppo.network.dtype = bfloat16 differ"),
        ({"rollout__missing_eos__value": 1}, "rollout.missing_eos.value = 1 is the score of every cut-off"),
        ({"ppo__warmup_iterations": 500}, "ppo.warmup_iterations = 500 of ppo.iterations = 500"),
    ],
)
def test_what_is_hardly_meant_is_a_warning(run: Path, overrides: dict[str, Any], said: str) -> None:
    outcome = found(run, **overrides)
    assert outcome.problems == ()
    (text,) = outcome.warnings
    assert said in text


def test_functions_of_the_users_own_are_imported_before_anything_starts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text("def score(prompts, responses)\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    part = '[{name = "mine", kind = "function", target = "broken_rewards:score"}]'
    text = problem(run, scoring__parts=part)
    assert text.startswith("scoring.parts: cannot import the module of 'broken_rewards:score': SyntaxError: ")
    assert "line 1" in text
    assert problem(run, labeler__name="no_such_module:f").startswith("labeler.name: cannot import the module of")


def test_more_processes_than_cores(run: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert "threads would compute at the same time on" in problem(run, cluster__generators=cores + 1)


def test_more_memory_than_the_machine_has(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "machine_gpus", lambda: 0)
    assert "of memory at the same time (ppo.policy 0.0, ppo.critic 0.0, reference 0.0, generators 100000.0" in problem(
        run, generator__kv_cache_gib=100_000
    )
    # 1e9 numbers: two networks of 2 + 18 bytes each in training, and 2 bytes in reference, generator and reward service
    large = str(model_folder(tmp_path / "large", parameters=10**9))
    need = (2 * 20 + 3 * 2) * 10**9 + 2**30
    monkeypatch.setattr(checks, "machine_memory", lambda: need)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**50))
    assert not found(run, models__sft=large).problems
    monkeypatch.setattr(checks, "machine_memory", lambda: need - 1)
    assert "the processes need at least" in problem(run, models__sft=large)
    assert not found(run, models__sft=large, ppo__network__lora_rank=8).problems


def test_what_keeps_ray_from_starting_is_told_of_a_local_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ray_obstacles", lambda: [("/home is full", "make room")])
    assert problem(run) == "/home is full. Remedy: make room"
    assert not found(run, cluster__address="auto").problems


def test_a_disk_too_small_for_the_models(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = str(model_folder(tmp_path / "large", parameters=2**20))
    monkeypatch.setattr(checks, "ray_obstacles", list)
    for keep_best, models in ((True, 3), (False, 2)):
        for free, wrong in ((models * 2 * 2**20, False), (models * 2 * 2**20 - 1, True)):
            monkeypatch.setattr(checks.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            assert bool(found(run, models__sft=large, evaluation__keep_best=keep_best).problems) == wrong
    text = problem(run, models__sft=large)
    assert text.startswith(f"policy and policy_ema and policy_best take 0.0 GiB in {run}, and that disk has 0.0 GiB fr")


def test_everything_that_is_wrong_is_told_at_once_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    words = ["ppo", "--run", "r", "--data.prompts", "d.jsonl", "--ppo.minibatch_size", "48"]
    assert cli.main([*words, "--models.sft", "nowhere", "--rollout.max_new_tokens", "2000"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("rayward ppo: ") for line in lines)
    for wanted in (
        f"there is no sft model in {tmp_path}/nowhere",
        "there is no reward model in r/reward: run `rayward reward`",
        f"data.prompts: {tmp_path}/d.jsonl:1 looks like a row of pretraining text",
        "data.prompts_heldout is not set",
        "ppo.minibatch_size = 48 does not divide",
        "generator.max_model_len is 2048. Nearest: generator.max_model_len = 3024",
    ):
        assert sum(wanted in line for line in lines) == 1, (wanted, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_a_warning_is_shown_and_the_command_runs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.pipeline.stage.execute", lambda stage, begin: None)
    assert cli.main(["ppo", "--run", str(run), "--generator.dtype", "float32"]) == 0
    assert "warning: generator.dtype = float32 and ppo.network.dtype = bfloat16 differ" in capfd.readouterr().out


def test_a_token_of_a_url_that_is_not_there_is_told_before_anything_starts(run: Path, monkeypatch: pytest.MonkeyPatch):
    url = '[{name = "far", kind = "url", target = "http://127.0.0.1:1", token_variable = "FAR_TOKEN"}]'
    assert "FAR_TOKEN, which scoring.parts names" in problem(run, scoring__parts=url)
    monkeypatch.setenv("FAR_TOKEN", "secret")
    assert not found(run, scoring__parts=url).problems
