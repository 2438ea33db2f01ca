"""Folders that would be loaded in part, as something else, or with code of their own are refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.config import NetworkConfig
from learner.worker.networks import load_network, merged_weights, save_network
from reward_server.config import LoadingConfig
from reward_server.encoding import ChatEncoding
from reward_server.model import check_model, load_reward_model
from reward_server.pretrained import check_weights, load_weights
from tests.tiny_models import bring_code, tiny_causal_lm, tiny_reward_model

Weights = dict[str, torch.Tensor]
PACKAGES = ("reward_server", "actors", "learner", "cluster")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_causal_lm(root / "lm", tied=False)
    tiny_causal_lm(root / "tied")
    tiny_reward_model(root / "rm")
    return root


def changed(source: Path, target: Path, weights: Callable[[Weights], Weights], **config: Any) -> Path:
    """A copy of a folder with other tensors, and other fields in its config.json."""
    shutil.copytree(source, target)
    file, fields = target / "model.safetensors", target / "config.json"
    save_file(weights(load_file(file)), file, {"format": "pt"})
    fields.write_text(json.dumps({**json.loads(fields.read_text()), **config}))
    return target


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def with_one(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: torch.ones(shape)}


def whole(weights: Weights) -> Weights:
    return weights


# (source, how its tensors are changed, what it is loaded as, what is said)
REFUSED = {
    "prefix": (
        *("lm", lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()}, "policy"),
        r"lack lm_head\.weight, model\.embed.* and 17 more, which would be random; its weights have module\.lm_head",
    ),
    "no head": ("lm", without("lm_head"), "policy", "not a language model: its weights lack lm_head.weight, which"),
    "no layer": ("lm", without("layers.1."), "policy", r"lack model\.layers\.1\.input_layernorm.* and 5 more, which"),
    "a narrow layer": (
        *("lm", with_one("model.layers.1.mlp.down_proj.weight", 32, 16), "policy"),
        r"by its config.json model\.layers\.1\.mlp\.down_proj\.weight is \[32, 64\], not \[32, 16\]",
    ),
    "a reward model as language model": (
        *("rm", whole, "policy"),
        r"its config.json says LlamaForSequenceClassification; its weights have score\.weight, which would be dropped",
    ),
    "a reward model that lost its head": ("rm", without("score"), "policy", "LlamaForSequenceClassification"),
    "a reward model below a new head": ("rm", whole, "new_value", r"its weights have score\.weight, which"),
    "no layer below a new head": ("lm", without("layers.1."), "new_value", r"lack model\.layers\.1\."),
    "a language model as reward model": ("tied", whole, "value", r"not a reward model: its weights lack score\.weight"),
    "several labels": ("rm", with_one("score.weight", 3, 32), "value", "its head has 3 labels"),
    "a head bias": ("rm", with_one("score.bias", 1), "value", r"have score\.bias, which would be dropped"),
    "another head": (
        "rm",
        renamed("score", "v_head.summary"),
        "value",
        r"score\.weight.* have v_head\.summary\.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_folder_lacks_or_has_too_much_of_is_refused_before_and_at_the_load(
    case: str, sources: Path, tmp_path: Path
):
    source, weights, kind, said = REFUSED[case]
    folder: Any = changed(sources / source, tmp_path / "m", weights)
    for load in (check_weights, load_weights):
        with pytest.raises(ValueError, match=said) as error:
            load(folder, kind)
        assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("source", "kind", "weights"),
    [
        ("tied", "policy", whole),  # its head is not in the file
        ("lm", "policy", with_one("model.layers.0.self_attn.rotary_emb.inv_freq", 4)),  # old files have this buffer
        ("tied", "policy", renamed("model.", "")),  # files of the network without its head
        ("lm", "new_value", whole),
        ("rm", "value", whole),
    ],
)
def test_a_whole_folder_passes_and_no_number_of_it_is_read(source, kind, weights, sources: Path, tmp_path: Path):
    folder = changed(sources / source, tmp_path / "m", weights)
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    with file.open("r+b") as stream:  # every number becomes a hole in the file
        stream.truncate(header)
        stream.truncate(size)
    model = check_weights(folder, kind)
    assert model is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    check_model(folder, kind)


def test_the_tensors_of_a_bin_file_are_compared_too(sources: Path, tmp_path: Path):
    shutil.copytree(sources / "lm", tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "m" / "pytorch_model.bin")
    check_weights(tmp_path / "m", "policy")
    torch.save(without("layers.0.")(weights), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\."):
        check_weights(tmp_path / "m", "policy")


def test_adapters_and_quantised_weights_are_refused(sources: Path, tmp_path: Path):
    folder = changed(sources / "lm", tmp_path / "m", whole, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"holds quantised weights.*dequantise"):
        check_weights(folder, "policy")
    (folder / "adapter_config.json").write_text("{}")
    for load in (check_weights, load_weights):
        with pytest.raises(ValueError, match=r"holds an adapter.*merge it into its base"):
            load(folder, "policy")


def test_a_reward_model_without_normalisation_is_told_from_its_header(sources: Path, tmp_path: Path):
    folder = changed(sources / "rm", tmp_path / "m", whole, rayward_normalisation=None)
    with pytest.raises(ValueError, match="is not normalised"):
        check_model(folder, "value")
    check_model(folder, "raw_value")
    load_reward_model(folder, torch.float32)


def test_a_hub_id_that_is_not_here_is_left_to_the_load_and_a_folder_is_not(tmp_path: Path):
    assert check_weights("some/model", "policy") is None
    with pytest.raises(ValueError, match="absent cannot be read as a model"):
        check_weights(tmp_path / "absent", "value")


def test_no_folder_is_loaded_by_another_way():
    root = Path(__file__).parents[2]
    code = {path: path.read_text() for name in PACKAGES for path in (root / name).rglob("*.py")}
    found = [path.name for path, text in code.items() if re.search(r"(Auto\w+|ForCausalLM)\.from_pretrained", text)]
    assert found == []
    assert "auto.from_pretrained" in code[root / "reward_server" / "pretrained.py"]


@pytest.fixture
def with_code(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A language model whose class is in its folder; its code leaves a file behind."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the answer that a pipe might hold
    return bring_code(shutil.copytree(sources / "lm", tmp_path / "mine"), tmp_path / "ran")


def test_code_of_a_folder_is_not_run_whatever_the_terminal_answers(with_code: Path):
    for load in (check_weights, load_weights):
        with pytest.raises(ValueError, match=r"mine needs Python code.*set models\.trust_remote_code"):
            load(with_code, "policy")
    file = with_code / "tokenizer_config.json"
    own = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["modeling_mine.MineTokenizer", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    with pytest.raises(ValueError, match=r"mine needs Python code"):
        ChatEncoding.load(with_code)
    assert not (with_code.parent / "ran").exists()


def test_code_that_is_trusted_is_run_and_goes_with_what_is_made_of_it(with_code: Path, tmp_path: Path):
    trusted = LoadingConfig(trust_remote_code=True)
    assert check_weights(with_code, "policy", trusted) is not None
    network = load_network("policy", with_code, NetworkConfig(dtype="float32"), trusted)
    encoding = ChatEncoding.load(with_code, trusted)
    save_network(network.model, encoding, tmp_path / "sft", merged_weights(network.model))
    assert (with_code.parent / "ran").exists()
    made = load_weights(tmp_path / "sft", "policy", loading=trusted)
    assert type(made).__name__ == "MineForCausalLM"
    weights = load_file(with_code / "model.safetensors")
    assert all(torch.equal(made.get_parameter(name), weights[name]) for name in weights)
