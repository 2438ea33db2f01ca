"""The text format of a model: messages and replies to token ids, for serving and for training alike."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from reward_server.schema import Message

_PAD_NAMES = ("pad", "endoftext", "reserved", "unused")
_PROBE = (
    Message(role="user", content="a"),
    Message(role="assistant", content="b"),
    Message(role="user", content="c"),
)


class ChatEncoding:
    """A tokenizer with its chat template.

    Sets the tokenizer's pad token and padding side. To be used by one thread at a time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
        name: str = "",
    ) -> None:
        """Take a tokenizer whose `eos_token` ends a turn of the chat.

        `chat_template` replaces the tokenizer's own (Jinja text); `stop_ids` are further ids that end a
        response. Raises ValueError when there is no template, no EOS, or no token that could be a dedicated
        PAD.
        """
        self.tokenizer: Any = tokenizer  # transformers types its results as unions over every way to call it
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {self.name!r} has no chat template; set models.chat_template to "
                "its Jinja text, or use a model that brings one"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {self.name!r} has no eos_token; set it in its tokenizer_config.json")
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.eos_ids = frozenset({self.eos_id, *map(int, stop_ids)})
        self.control_tokens = self._control_tokens()
        self.pad_id = self._dedicated_pad()
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)
        tokenizer.padding_side = "right"

    @classmethod
    def load(cls, path: str | Path, chat_template: str | None = None) -> Self:
        """Load the tokenizer of a model folder or Hub id, with the stop ids of its generation_config.json."""
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        try:
            stop = GenerationConfig.from_pretrained(str(path)).eos_token_id
        except OSError:
            stop = None
        stop_ids = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        return cls(tokenizer, chat_template, stop_ids, name=str(path))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation and open the assistant's turn.

        Raises ValueError for an empty conversation, one whose last word is the assistant's, a text that holds
        one of the template's control tokens (it could forge a turn), and one that the template refuses.
        """
        if not messages or messages[-1].role == "assistant":
            last = f"ends with the assistant's {messages[-1].content[:40]!r}" if messages else "has no messages"
            raise ValueError(f"a prompt must end with a user or system message, but this one {last}")
        for number, message in enumerate(messages):
            for token in self.control_tokens:
                if token in message.content:
                    raise ValueError(
                        f"message {number} ({message.role}) holds {token!r}, a control token of "
                        f"{self.name!r}; remove it from the text"
                    )
        return self._encode_chat(messages)

    def response(self, text: str, ended: bool) -> list[int]:
        """Encode a reply as plain text, even where it spells a control token; add the EOS when it `ended`."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.eos_id] if ended else list(ids)

    def text(self, ids: Sequence[int]) -> str:
        """Decode a reply without its EOS and without special tokens."""
        end = len(ids)
        while end and ids[end - 1] in self.eos_ids:
            end -= 1
        return self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        turns = [message.model_dump() for message in messages]
        try:
            # transformers 5 returns a BatchEncoding unless told otherwise
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise ValueError(f"the chat template of {self.name!r} refuses the roles [{roles}]: {error}") from error
        return list(ids)

    def _control_tokens(self) -> tuple[str, ...]:
        """Names of the special tokens that mark turns: those in a rendered chat, and every EOS."""
        special = set(self._special_ids())
        ids = {token for token in self._encode_chat(_PROBE) if token in special} | self.eos_ids
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(ids)))

    def _special_ids(self) -> list[int]:
        added = self.tokenizer.added_tokens_decoder
        return sorted({*(token for token, entry in added.items() if entry.special), *self.tokenizer.all_special_ids})

    def _dedicated_pad(self) -> int:
        """Pick a pad id that no real sequence ends with: never an EOS, nor a token of the template."""
        current = self.tokenizer.pad_token_id
        if current is not None and current not in self.eos_ids:
            return int(current)
        taken = {*self.eos_ids, *self.tokenizer.convert_tokens_to_ids(list(self.control_tokens))}
        names = {
            token: self.tokenizer.convert_ids_to_tokens(token) for token in self._special_ids() if token not in taken
        }
        for wanted in _PAD_NAMES:
            for token, name in names.items():
                if wanted in name.lower():
                    return token
        raise ValueError(
            f"the tokenizer of {self.name!r} has no token to pad with (pad_token is "
            f"{self.tokenizer.pad_token!r}, and an EOS must not pad); add one with "
            "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), resize the model's embeddings, and "
            "save both"
        )
