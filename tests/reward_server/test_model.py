import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedModel, pipeline

from reward_server.encoding import ChatEncoding
from reward_server.model import (
    Normalisation,
    load_reward_model,
    new_reward_model,
    normalisation,
    raw_values,
    set_normalisation,
)
from reward_server.packing import pack
from reward_server.schema import Message
from reward_server.scorer import raw_scores
from tests.tiny_models import save_reward_model, tiny_causal_lm, tiny_reward_model, tiny_tokenizer

PAD, END = 0, 2
IDS = torch.tensor([[5, 6, 7, END, PAD, PAD], [5, 6, 7, 8, 9, 10], [40, END, 41, 42, 43, PAD]])
LENGTHS = torch.tensor([4, 6, 5])


def values_of(model: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Raw values at every token, with all sequences in one row."""
    lengths = [len(ids) for ids in sequences]
    values = raw_values(model, torch.cat(sequences), lengths, torch.arange(sum(lengths)))
    return list(values.split(lengths))


def real(ids: torch.Tensor) -> list[torch.Tensor]:
    """The rows of IDS without their padding."""
    return [row[:length] for row, length in zip(ids, LENGTHS.tolist(), strict=True)]


def last_values(model: PreTrainedModel) -> torch.Tensor:
    return torch.stack([values[-1] for values in values_of(model, real(IDS))])


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_reward_model(tmp_path, family=request.param)
    return tmp_path


def test_a_score_is_read_at_the_last_token_eos_or_not(folder: Path) -> None:
    model = load_reward_model(folder, torch.float32)
    with torch.no_grad():
        hidden = model.base_model(IDS).last_hidden_state
        by_hand = [hidden[row, index] @ model.get_parameter("score.weight")[0] for row, index in enumerate([3, 5, 4])]
        got = last_values(model)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack(by_hand))


def test_hand_set_weights_show_which_token_is_read(tmp_path: Path) -> None:
    """With all layers silenced, the hidden state is the normalised embedding of the token itself."""
    tiny_causal_lm(tmp_path, tied=False, hidden=16)
    model = new_reward_model(tmp_path, torch.float32, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding[[5, 6, END]] = torch.eye(16)[:3]
        model.get_parameter("score.weight")[0, :3] = torch.tensor([1.0, 10.0, 100.0])
        # rms norm of a one-hot vector of 16 entries is 1 / sqrt(1/16) = 4 at that entry
        values = raw_values(model, torch.tensor([5, 6, END, PAD, 6, END, 5, 5]), [4, 4], torch.arange(8))
        expected = torch.tensor([4.0, 40.0, 400.0, 0.0, 40.0, 400.0, 4.0, 4.0])
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)
    ended_then_truncated = raw_scores(model, [[5, 6, END], [6]], 100)
    assert ended_then_truncated == pytest.approx([400.0, 40.0], rel=1e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_values_do_not_see_their_neighbours_or_what_follows(folder: Path, packed: bool) -> None:
    model = load_reward_model(folder, torch.float32)
    if packed:
        pack(model)
    with torch.no_grad():
        for ids, together in zip(real(IDS), values_of(model, real(IDS)), strict=True):
            for prefix in range(1, len(ids) + 1):
                (alone,) = values_of(model, [ids[:prefix]])
                torch.testing.assert_close(alone, together[:prefix], rtol=1e-4, atol=1e-5)


def test_hugging_face_reads_the_same_score(folder: Path) -> None:
    ours = last_values(load_reward_model(folder, torch.float32)).detach()
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        mask = torch.arange(IDS.shape[1]) < LENGTHS[:, None]
        torch.testing.assert_close(theirs(IDS, attention_mask=mask.long()).logits[:, 0], ours, rtol=1e-4, atol=1e-5)


def test_a_hugging_face_pipeline_reads_the_same_score_in_batches(folder: Path) -> None:
    encoding = ChatEncoding.load(folder)
    model = load_reward_model(folder, torch.float32)
    classify = pipeline("text-classification", model=str(folder), function_to_apply="none")
    texts, ours = [], []
    for words, ended in [("good", True), ("bad bad bad, that is", False), ("", True)]:
        ids = encoding.prompt([Message(role="user", content="hello")]) + encoding.response(words, ended)
        texts.append(encoding.tokenizer.decode(ids))
        ours += raw_scores(model, [ids], len(ids))
    theirs = [output["score"] for output in classify(texts, batch_size=3)]
    assert theirs == pytest.approx(ours, abs=1e-4)


def test_a_new_head_is_normal_with_the_papers_deviation_and_seeded(tmp_path: Path) -> None:
    tiny_causal_lm(tmp_path, hidden=512, layers=1)
    heads = [new_reward_model(tmp_path, torch.float32, seed).get_parameter("score.weight") for seed in (1, 1, 2)]
    assert heads[0].shape == (1, 512)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    # the standard deviation of 512 draws is within 4 * 0.0442/sqrt(1024) of 1/sqrt(513) = 0.0442
    assert heads[0].std().item() == pytest.approx(1 / math.sqrt(513), abs=0.0055)
    assert abs(heads[0].mean().item()) < 4 * 0.0442 / math.sqrt(512)


def test_scores_are_fp32_even_in_bf16_and_gradients_reach_head_and_body(folder: Path) -> None:
    model = load_reward_model(folder, torch.bfloat16)
    values = torch.cat(values_of(model, real(IDS)))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())
    values.sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("score") or ".0." in name:
            assert parameter.grad is not None, name


def test_normalisation_is_refused_when_absent_or_malformed_and_survives_saving(tmp_path: Path) -> None:
    tiny_causal_lm(tmp_path / "base")
    model = new_reward_model(tmp_path / "base", torch.float32, seed=0)
    with pytest.raises(ValueError, match=r"is not normalised.*rayward reward"):
        normalisation(model)
    save_reward_model(model, ChatEncoding.load(tmp_path / "base"), tmp_path / "raw")
    with pytest.raises(ValueError, match="is not normalised"):
        normalisation(load_reward_model(tmp_path / "raw", torch.float32))
    set_normalisation(model, Normalisation(gain=0.5, bias=-1.25))
    save_reward_model(model, ChatEncoding.load(tmp_path / "base"), tmp_path / "rm")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["rayward_normalisation"] == {
        "gain": 0.5,
        "bias": -1.25,
    }
    stored = normalisation(load_reward_model(tmp_path / "rm", torch.float32))
    assert stored == Normalisation(gain=0.5, bias=-1.25)
    assert stored(4.0) == 0.75


def test_a_base_with_a_normalisation_does_not_hand_it_to_a_new_head(tmp_path: Path) -> None:
    tiny_causal_lm(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "rayward_normalisation": {"gain": 2.5, "bias": 1.0}}))
    with pytest.raises(ValueError, match="is not normalised"):
        normalisation(new_reward_model(tmp_path, torch.float32, seed=3))


def test_a_shift_makes_demonstrations_score_zero_on_average() -> None:
    assert Normalisation.of(torch.tensor([1.0, 2.0, 6.0]), unit_variance=False) == Normalisation(gain=1.0, bias=-3.0)


def test_unit_variance_scales_too() -> None:
    # mean 3, population variance (4 + 1 + 9) / 3
    found = Normalisation.of(torch.tensor([1.0, 2.0, 6.0]), unit_variance=True)
    assert found.gain == pytest.approx((3 / 14) ** 0.5)
    assert found.bias == pytest.approx(-3 * found.gain)


def test_demonstrations_that_all_score_the_same_are_only_shifted() -> None:
    assert Normalisation.of(torch.tensor([2.0, 2.0]), unit_variance=True) == Normalisation(gain=1.0, bias=-2.0)


@pytest.mark.parametrize(("gain", "bias"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, math.inf)])
def test_a_useless_normalisation_is_refused(gain: float, bias: float) -> None:
    with pytest.raises(ValueError, match="finite gain > 0"):
        Normalisation(gain=gain, bias=bias)


def test_a_language_model_is_not_taken_for_a_reward_model(tmp_path: Path) -> None:
    tiny_causal_lm(tmp_path)
    with pytest.raises(ValueError, match=r"not a reward model: its weights lack score\.weight"):
        load_reward_model(tmp_path, torch.float32)


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(str(tmp_path))
    tiny_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="BertForSequenceClassification, which has no linear head 'score'"):
        new_reward_model(tmp_path, torch.float32, seed=0)


def test_the_folder_is_plain_safetensors_with_a_dedicated_pad(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    assert weights["score.weight"].shape == (1, 32)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == PAD
    assert ChatEncoding.load(folder).tokenizer.pad_token == "<|endoftext|>"
