"""Fused norms and MLPs say what the others say, for any lengths, and PPO's first ratio stays 1."""

import sys
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
from torch._dynamo.utils import counters

from learner.config import NetworkConfig
from learner.worker.networks import load_network
from reward_server.fusion import apply_liger, compile_pieces, cpp_compiler
from reward_server.schema import Message, ScoreRequest
from reward_server.scorer import RewardModelSource
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler")
HALF = {"dtype": "bfloat16", "gradient_checkpointing": True, "compile": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fusion")
    tiny_causal_lm(path, layers=2, hidden=64)
    return path


def packed(*lengths: int) -> tuple[torch.Tensor, list[int], torch.Tensor, torch.Tensor]:
    ids = torch.arange(1, sum(lengths) + 1) * 7919 % 320
    return ids, list(lengths), torch.arange(sum(lengths) - 1), ids[1:]


def gradients(network: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad])
    return torch.cat([gradient.float().flatten() for gradient in found])


@pytest.mark.slow
@needs_compiler
def test_log_probs_are_the_same_with_gradients_and_without_them(folder: Path) -> None:
    plain = load_network("policy", folder, NetworkConfig.model_validate({**HALF, "compile": False}))
    network = load_network("policy", folder, NetworkConfig.model_validate(HALF))
    network.load_state_dict(plain.state_dict())
    made = []
    for lengths in ((9, 30, 17), (40, 3), (5, 21, 21, 8), (64,)):
        with torch.no_grad():
            before, _ = network(*packed(*lengths))
        during, _ = network(*packed(*lengths))
        assert torch.equal(before, during.detach())
        expected, _ = plain(*packed(*lengths))
        torch.testing.assert_close(during, expected, rtol=0, atol=0.02)
        got, want = gradients(network, during.sum()), gradients(plain, expected.sum())
        assert (got - want).norm() < 0.02 * want.norm()
        made.append(counters["stats"]["unique_graphs"])
    assert len(set(made)) == 1, "other lengths need no other code"
    assert made[0] >= 4, "norms and MLPs, with gradients and without"


@pytest.mark.slow
@needs_compiler
def test_a_compiled_scorer_gives_the_scores_of_one_that_is_not(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path)
    said = [
        ScoreRequest(id=str(i), prompt=(Message(role="user", content="x" * i),), response="hello", ended=True)
        for i in range(4)
    ]
    plain, compiled = (
        RewardModelSource(tmp_path, max_batch_tokens=60, compiled=on).score(said) for on in (False, True)
    )
    assert [one.score for one in compiled] == pytest.approx([one.score for one in plain], abs=1e-5)


def test_without_a_compiler_nothing_is_compiled_and_a_line_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    network = load_network("policy", folder, NetworkConfig.model_validate(HALF))
    assert not any("forward" in vars(module) for module in network.modules())
    assert "not compiled: no C++ compiler (no-such-compiler) is there" in caplog.text


def test_a_family_without_such_pieces_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    compile_pieces(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    assert "Linear: norms and MLPs are not compiled: it has none by these names" in caplog.text


def test_ligers_kernels_are_put_into_one_model_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which patches classes of the process too, as the real one does."""
    from transformers.models.llama import modeling_llama

    given = {}

    def apply(model: torch.nn.Module, **settings: bool) -> None:
        given.update(settings)
        monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", object)
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm" and not given.get("unknown"):
                module.forward = MethodType(lambda self, hidden: hidden * 0, module)

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = apply  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    norm = modeling_llama.LlamaRMSNorm
    network = load_network("policy", folder, NetworkConfig(dtype="float32", liger=True))
    assert given == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert modeling_llama.LlamaRMSNorm is norm, "others of the process are as they were"
    assert network(*packed(3, 4))[1].var() < 1e-9, "its norms are Liger's"
    other = load_network("policy", folder, NetworkConfig(dtype="float32"))
    assert other(*packed(3, 4))[1].var() > 1e-9
    with pytest.raises(ValueError, match="no kernels for Linear"):
        apply_liger(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
