import pytest
from pydantic import ValidationError

from reward_server.schema import Message, ScoreBatch, ScoreReply, ScoreRequest

PROMPT = (Message(role="user", content="hi"),)


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity", '"1.5"', "true", "null"])
def test_a_score_is_a_finite_number_and_nothing_that_looks_like_one(score: str) -> None:
    with pytest.raises(ValidationError):
        ScoreReply.model_validate_json(f'{{"id": "a", "score": {score}}}')


def test_an_integer_is_a_score_and_parts_are_finite() -> None:
    assert ScoreReply.model_validate_json('{"id": "a", "score": 2}').score == 2.0
    with pytest.raises(ValidationError):
        ScoreReply(id="a", score=1.0, parts={"x": float("nan")})


def test_unknown_keys_unknown_roles_and_loose_booleans_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        ScoreReply.model_validate_json('{"id": "a", "score": 1, "reward": 2}')
    with pytest.raises(ValidationError, match="role"):
        Message.model_validate({"role": "tool", "content": ""})
    with pytest.raises(ValidationError, match="ended"):
        ScoreRequest.model_validate_json(
            '{"id": "a", "prompt": [{"role": "user", "content": "x"}], "response": "", "ended": "yes"}'
        )


def test_a_batch_names_the_id_that_occurs_twice() -> None:
    requests = [ScoreRequest(id=name, prompt=PROMPT, response="x", ended=True) for name in ("a", "b", "a")]
    with pytest.raises(ValidationError, match="'a' occurs more than once"):
        ScoreBatch(requests=requests)


def test_a_batch_survives_the_wire() -> None:
    batch = ScoreBatch(requests=[ScoreRequest(id="ü/1", prompt=PROMPT, response="a\u2028\n🙂", ended=False)])
    assert ScoreBatch.model_validate_json(batch.model_dump_json()) == batch
