"""The reward service: one object that loads what it is told and answers over HTTP."""

import asyncio

import pytest
import torch

from reward_server import service as service_module
from reward_server.bearer import TOKEN_VARIABLE
from reward_server.client import RewardClient
from reward_server.config import PartConfig, SourceConfig
from reward_server.functions import UserFunctionError
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.service import RewardService
from tests.tiny_models import tiny_reward_model

REQUEST = ScoreRequest(id="1", prompt=(Message(role="user", content="hello"),), response="good", ended=True)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No token from outside, and the process's threads as they were."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def started():
    """Starts services, which end with the test."""
    services: list[RewardService] = []

    def start(config, model_path=None, threads=1) -> tuple[RewardService, str]:
        services.append(RewardService(config, model_path, threads))
        return services[-1], services[-1].start(loopback=True)

    yield start
    for service in services:
        assert service._server is not None
        service._server.close()


@pytest.fixture
def lengths(tmp_path, monkeypatch) -> SourceConfig:
    """Scores by the length of the response."""
    (tmp_path / "own_rewards.py").write_text(
        "def length(prompts, responses):\n    return [len(response) for response in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return SourceConfig(parts=(PartConfig(kind="function", target="own_rewards:length"),))


def score(url: str, token: str | None = None, retry_s: float = 2.0) -> ScoreReply:
    async def ask() -> ScoreReply:
        client = RewardClient(url, token=token, retry_s=retry_s)
        try:
            return (await client.score([REQUEST]))[0]
        finally:
            await client.close()

    return asyncio.run(ask())


def test_it_serves_its_source_on_the_loopback(lengths, started):
    assert RewardService(lengths, None, threads=1).stats() == {}
    service, url = started(lengths)
    assert url.startswith("http://127.0.0.1:")
    assert service.stats() == {"waiting": 0.0, "scored": 0.0, "computing_s": 0.0}
    assert score(url).score == 4.0
    assert service.stats() == {"waiting": 0.0, "scored": 1.0, "computing_s": 0.0}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('x')", "failed on 1 responses: KeyError: 'x'"),
        ("return [float('nan')]", "returned nan for response 0, not a finite number"),
        ("return [1.0, 2.0]", "returned 2 numbers for 1 responses"),
        ("return ['good']", "returned 'good' for response 0, not a number"),
        ("return None", "failed on 1 responses: TypeError"),
    ],
)
def test_a_bad_function_is_told_when_the_service_starts(tmp_path, monkeypatch, body, said):
    """Its client would have tried for minutes, as a server that fails may recover."""
    name = f"bad_rewards_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = SourceConfig(parts=(PartConfig(kind="function", target=f"{name}:score"),))
    with pytest.raises(UserFunctionError, match=f"{name}:score {said}"):
        RewardService(config, None, threads=1).start(loopback=True)


def test_it_serves_the_reward_model_of_the_run(tmp_path, started):
    tiny_reward_model(tmp_path)
    _, url = started(SourceConfig(dtype="float32"), tmp_path)
    assert abs(score(url).score) < 100


def test_it_computes_with_the_threads_it_is_given(lengths, started):
    started(lengths, threads=3)
    assert torch.get_num_threads() == 3


def test_a_token_of_the_environment_is_needed_by_clients(lengths, started, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "sesame-open")
    _, url = started(lengths)
    assert score(url, "sesame-open").score == 4.0
    with pytest.raises(Exception, match="401"):
        score(url)


def test_other_machines_are_not_served_without_a_token(lengths, monkeypatch):
    monkeypatch.setattr(service_module, "own_address", lambda loopback: "127.0.0.1" if loopback else "0.0.0.0")
    with pytest.raises(ValueError, match="without a token"):
        RewardService(lengths, None, threads=1).start(loopback=False)


def test_a_source_that_cannot_load_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="there is none; train one"):
        RewardService(SourceConfig(), None, threads=1).start(loopback=True)
    missing = SourceConfig(parts=(PartConfig(kind="function", target="no_such_module:score"),))
    with pytest.raises(ValueError, match="no_such_module"):
        RewardService(missing, None, threads=1).start(loopback=True)
