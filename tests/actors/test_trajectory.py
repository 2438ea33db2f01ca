"""Trajectories keep what they are given, through JSON too."""

import json

import pytest

from actors.trajectory import Completion, SampleKey, Trajectory
from reward_server.schema import Message


def _trajectory() -> Trajectory:
    return Trajectory(
        key=SampleKey(prompt_id="p/1", epoch=2, k=3, attempt=1),
        prompt=(Message(role="system", content="be brief"), Message(role="user", content="héllo")),
        completion=Completion(
            query_ids=(5, 6),
            response_ids=(7, 8, 1),
            logprobs=(-0.1, -1 / 3, -2.5e-9),
            versions=(4, 4, 5),
            ended=True,
            text="hi",
        ),
        score=-0.7,
        parts={"raw_score": -0.7},
    )


def test_a_trajectory_survives_json_exactly() -> None:
    assert Trajectory.from_json(json.loads(json.dumps(_trajectory().to_json()))) == _trajectory()


def test_staleness_counts_from_the_oldest_token() -> None:
    assert _trajectory().oldest_version == 4


def test_a_key_reads_as_one_word() -> None:
    assert str(_trajectory().key) == "p/1/2/3/1"


@pytest.mark.parametrize("field", ["response_ids", "logprobs", "versions"])
def test_token_tuples_of_different_lengths_are_a_bug(field: str) -> None:
    values = _trajectory().to_json()["completion"]
    values[field] = values[field][:-1]
    with pytest.raises(AssertionError, match="lengths"):
        Completion(**values)
