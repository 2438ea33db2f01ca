"""The networks the learner trains or reads: a policy that gives log-probs, a critic or reward model that gives values.

Both take sequences one after the other (`reward_server.packing`) and the places in them to read, so that nothing of
shape [N, vocabulary] ever exists. Positions count from 0 in each sequence, as in the sampler.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.pytorch_utils import Conv1D

from learner.config import NetworkConfig
from learner.maths.logprobs import token_logprobs
from learner.weights.checkpoint import whole_folder
from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.encoding import ChatEncoding
from reward_server.fusion import apply_liger, compile_pieces
from reward_server.model import Normalisation, load_reward_model, new_reward_model, normalisation, raw_values
from reward_server.packing import hidden_states, pack
from reward_server.pretrained import Kind, load_weights


class LogprobHead(nn.Module):
    """A language model's output layer, read as log-probs without its logits.

    It has no weights but borrows the model's. As a module of its own it is a place where ZeRO 3 gathers them.
    """

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        head = model.get_output_embeddings()
        assert head is not None, "a causal language model has output embeddings"
        self._lender: tuple[nn.Module] = (head,)  # in a tuple: not a module of this one, so that names stay the model's

    def borrowed(self) -> list[nn.Parameter]:
        """The model's parameters that are read here."""
        return list(self._lender[0].parameters(recurse=False))

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, float32 [N], of hidden states [N, d] and targets [N]."""
        (head,) = self._lender
        weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
        return token_logprobs(hidden, weight, bias, targets, temperature, self.chunk, self.softcap)


class PolicyNetwork(nn.Module):
    """A causal language model read as log-probs of given tokens."""

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        super().__init__()
        self.model = model
        self.head = LogprobHead(model, chunk)

    def forward(
        self, ids: Tensor, lengths: Sequence[int], places: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (nats, float32 [n]) of `targets`, each after the token at its place.

        ids: [N], sequences of `lengths` tokens one after the other; places: [n] indices into them; targets: [n].
        """
        return self.head(hidden_states(self.model, ids, lengths)[places], targets, temperature)


class ValueNetwork(nn.Module):
    """A transformer with a scalar head, read at given tokens: the reward model in training, and the critic.

    Values are on the reward model's normalised scale, since the critic starts as a copy of it (Stiennon et al. 2020).
    """

    def __init__(self, model: PreTrainedModel, scale: Normalisation) -> None:
        super().__init__()
        self.model = model
        self.gain, self.bias = scale.gain, scale.bias

    def forward(self, ids: Tensor, lengths: Sequence[int], places: Tensor) -> Tensor:
        """Values, float32 [n], at `places` of ids [N], sequences of `lengths` tokens one after the other."""
        return self.gain * raw_values(self.model, ids, lengths, places) + self.bias


Network = PolicyNetwork | ValueNetwork


def check_head(network: PolicyNetwork, path: Path) -> None:
    """Compare log-probs with those of the model's own logits on a few tokens.

    Raises ValueError for a model whose output head does more than a linear map and a soft cap (Granite and Cohere
    scale their logits), since its log-probs would be wrong without a word.
    """
    model, size = network.model, network.model.config.get_text_config().vocab_size
    if model.get_output_embeddings() is None:
        raise ValueError(f"{path} is a {type(model).__name__} without an output head: use a causal language model")
    ids = torch.arange(1, 9)[None] * 7919 % size  # far apart, the same in every run
    ends = torch.arange(1, 8)
    with torch.no_grad():
        found, _ = network(ids[0], [8], ends - 1, ids[0, ends])
        expected = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    gap = (found - expected[ends - 1, ids[0, ends]]).abs().max().item()
    # A soft cap is computed in float32 here and in the model's own type there.
    bound = (1e-3 if model.dtype == torch.float32 else 2e-2) * expected.std(-1).max().item() + 1e-5
    if not gap <= bound:
        raise ValueError(
            f"{path} is a {type(model).__name__}, whose output head cannot be reproduced: log-probs differ from its "
            f"own by {gap:.3g} nats (bound {bound:.3g}), as where a model scales its logits; use a model with a plain "
            "head, such as Llama, Qwen, Mistral, Gemma, GPT-NeoX or GPT-2"
        )


def load_network(kind: Kind, path: Path, network: NetworkConfig, loading: LoadingConfig = UNTRUSTED) -> Network:
    """A network from a Hugging Face folder, dropout off, on the CPU, with the weights that `network` names trainable.

    kind "new_value" puts a fresh scalar head on a language model (the start of reward modelling); "value" is a trained
    reward model, and "raw_value" one without its normalisation. Raises ValueError for a "value" that has none.
    """
    dtype: torch.dtype = getattr(torch, network.dtype)
    if kind == "policy":
        model = load_weights(path, kind, dtype, loading)
        check_head(PolicyNetwork(model, network.logprob_chunk), path)
    elif kind in ("value", "raw_value"):
        model = load_reward_model(path, dtype, loading)
    else:
        model = new_reward_model(path, dtype, 0, loading)
    make_trainable(pack(model), network)
    if network.compile:
        compile_pieces(model)
    if network.liger:
        apply_liger(model)
    if network.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # else it checkpoints nothing; the modules in it stay without dropout,
                for name in [name for name, value in vars(module).items() if "drop" in name and type(value) is float]:
                    setattr(module, name, 0.0)  # and so does what it drops by itself, such as OPT's layers
    if kind == "policy":
        return PolicyNetwork(model, network.logprob_chunk)
    return ValueNetwork(model, normalisation(model) if kind == "value" else Normalisation(gain=1.0, bias=0.0))


def make_trainable(model: PreTrainedModel, network: NetworkConfig) -> None:
    """Freeze what `network` leaves out and add its LoRA adapters. A fresh or copied scalar head is always trained."""
    layers = model.config.get_text_config().num_hidden_layers
    if network.last_layers > layers:
        raise ValueError(f"last_layers = {network.last_layers}, but the model has {layers} layers: use 0 to {layers}")
    first = layers - network.last_layers if network.last_layers else 0

    def chosen(name: str) -> bool:
        index = _layer_index(name)
        return (index >= first) if index is not None else not network.last_layers

    if network.lora_rank:
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and _layer_index(name) is not None and chosen(name)
        ]
        lora = LoraConfig(r=network.lora_rank, lora_alpha=network.lora_alpha, lora_dropout=0.0, target_modules=targets)
        inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        trained = ("lora_" in name) if network.lora_rank else chosen(name)
        parameter.requires_grad_(trained or name.startswith("score."))


Read = Callable[[nn.Parameter], Tensor]
"""Gives all of a parameter's values; a collective where they are sharded."""


def merged_weights(model: PreTrainedModel, read: Read = Tensor.detach) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name with LoRA merged in, one at a time; tied weights once.

    The model is not changed: merging in place and back would round the base weights a little each time. Every rank
    iterates to the end where `read` is a collective.
    """
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter, owner in _plain_parameters(model):
        weight = read(parameter)
        if owner and name.endswith(".weight"):
            weight = weight.float() + _lora_product(adapters[owner], read)
        yield name, weight.to(parameter.dtype)


def weight_shapes(model: PreTrainedModel, shape: Callable[[nn.Parameter], torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """What `merged_weights` gives, as tensors without storage."""
    for name, parameter, _ in _plain_parameters(model):
        yield name, torch.empty(shape(parameter), dtype=parameter.dtype, device="meta")


def changing_weights(model: PreTrainedModel) -> set[str]:
    """Names in `merged_weights` of whole layers of which training changes any; what is in no layer counts as one.

    A sampler may fuse some of a layer, as the maps to queries, keys and values, and load them together or not at all.
    """
    trained = {_layer_index(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name, _, _ in _plain_parameters(model) if _layer_index(name) in trained}


def _plain_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Parameters without LoRA's own: (Hugging Face name, parameter, name of the adapted module or "")."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            owner, _, leaf = name.rpartition(".base_layer.")
            yield (f"{owner}.{leaf}" if owner else name), parameter, owner


def _lora_product(layer: LoraLayer, read: Read) -> Tensor:
    """scale * B A in float32, transposed for GPT-2's Conv1D."""
    low, high = (read(getattr(layer, side)["default"].weight).float() for side in ("lora_A", "lora_B"))
    product = (high @ low) * layer.scaling["default"]
    return product.T if isinstance(layer.get_base_layer(), Conv1D) else product


def save_network(
    model: PreTrainedModel, encoding: ChatEncoding, path: Path, weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a plain Hugging Face folder (safetensors, config, tokenizer, template) of merged weights, all or none."""
    # Copies: DeepSpeed keeps all weights in one flat buffer, and views of one storage cannot be saved apart.
    # Transformers renames some weights when it loads (GPT-NeoX's head), and a folder has the names of the family.
    copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in weights}
    with whole_folder(path) as folder:
        save_torch_state_dict(revert_weight_conversion(model, copies), folder)
        model.config.architectures = [type(model).__name__]  # else that of the folder it was loaded from
        encoding.describe(model)
        model.config.save_pretrained(folder)
        if model.is_remote_code():
            custom_object_save(model, folder, config=cast(Any, model.config))
        if model.can_generate() and model.generation_config is not None:
            # `save_pretrained` would refuse what some models come with, such as a temperature without do_sample.
            model.generation_config.to_json_file(folder / "generation_config.json")
        encoding.tokenizer.save_pretrained(folder)


def _layer_index(name: str) -> int | None:
    """The layer a parameter or module belongs to: the first number in its dotted name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
