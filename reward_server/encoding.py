"""The text format of a model: messages and replies to token ids, for serving and for training alike."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.pretrained import open_with
from reward_server.schema import Message

log = logging.getLogger(__name__)

_PAD_NAMES = ("pad", "endoftext", "reserved", "unused", "unk")
_NO_TEXT = "\u00ff"  # a byte-level tokenizer's name of byte 0xff, which no UTF-8 text has
_PROBE = (
    Message(role="user", content="a"),
    Message(role="assistant", content="Yes, I do."),
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
        positions: int | None = None,
        chat_date: date = UNTRUSTED.chat_date,
    ) -> None:
        """Take a tokenizer with its EOS.

        `chat_template` replaces the tokenizer's own (Jinja text); `stop_ids` are further ids that end a
        response; `positions` are those of the model beside it, its longest sequence, where it says; `chat_date` is what
        a template is given that asks for the current day. Raises ValueError when there is no template, one that does
        not open the assistant's turn, no EOS, or no token that could be a dedicated PAD.
        """
        self.tokenizer: Any = tokenizer  # transformers types its results as unions over every way to call it
        self.positions = positions
        self.name = name or tokenizer.name_or_path or type(tokenizer).__name__
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.chat_template = self._one_template(chat_date)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {self.name!r} has no eos_token; set it in its tokenizer_config.json")
        self.document_end = int(self.tokenizer.eos_token_id)
        self.bos_id = self._required_bos()
        self.eos_id = self._reply_end()
        self.eos_ids = frozenset({self.eos_id, self.document_end, *map(int, stop_ids)})
        self.control_tokens = self._control_tokens()
        self.pad_id = self._dedicated_pad()
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)
        tokenizer.padding_side = "right"
        self._check_reply()

    @classmethod
    def load(cls, path: str | Path, loading: LoadingConfig = UNTRUSTED, chat_template: str | None = None) -> Self:
        """Load the tokenizer of a model folder or Hub id, with the stop ids of its generation_config.json.

        Raises ValueError when it knows ids that the model does not.
        """
        tokenizer: Any = open_with(AutoTokenizer, path, loading)
        try:
            stop = GenerationConfig.from_pretrained(str(path)).eos_token_id
        except OSError:
            stop = None
        stop_ids = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        try:
            config = open_with(AutoConfig, path, loading).get_text_config()
        except (OSError, ValueError):  # a tokenizer's folder
            config = None
        size, positions = (getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings"))
        largest = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        if size is not None and largest[1] >= size:
            raise ValueError(
                f"the tokenizer of {str(path)!r} has the token {largest[0]!r} with id {largest[1]}, but the model's "
                f"vocabulary has {size}; resize the model's embeddings (resize_token_embeddings), or save the "
                "tokenizer that the model was trained with beside it"
            )
        return cls(tokenizer, chat_template, stop_ids, str(path), positions, loading.chat_date)

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

    def ends_twice(self, text: str) -> bool:
        """Whether a reply spells an end of its own, to which the encoding would add another."""
        return text.rstrip().endswith(tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.eos_ids))))

    def plain(self, text: str) -> list[int]:
        """Encode the beginning of a text that is no chat: with the BOS where the model wants one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.response(text, ended=False)]

    def document(self, text: str) -> list[int]:
        """Encode a text that is no chat: as `plain` does, ended by the tokenizer's EOS."""
        return [*self.plain(text), self.document_end]

    def describe(self, model: PreTrainedModel) -> None:
        """Write PAD and what ends a response into a model's configs, for whoever generates with its folder."""
        model.config.pad_token_id, model.config.eos_token_id = self.pad_id, self.eos_id
        if model.can_generate() and model.generation_config is not None:
            ends = [self.eos_id, *sorted(self.eos_ids - {self.eos_id})]
            model.generation_config.pad_token_id = self.pad_id
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]

    def text(self, ids: Sequence[int]) -> str:
        """Decode a reply without its EOS and without special tokens."""
        end = len(ids)
        while end and ids[end - 1] in self.eos_ids:
            end -= 1
        return self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token of a reply adds to its `text`; of a character in several tokens, the last one adds it.

        Empty where they would not add up to the text, or the tokenizer is none of the library tokenizers.
        """
        backend, text = getattr(self.tokenizer, "backend_tokenizer", None), self.text(ids)
        if not isinstance(backend, Tokenizer):
            return []
        stream = DecodeStream(skip_special_tokens=True)
        found = [stream.step(backend, one) or "" for one in ids]
        if found and text.startswith(whole := "".join(found)):
            found[-1] += text[len(whole) :]  # of a character that was cut off
        return found if "".join(found) == text else []

    def _encode_chat(self, messages: Sequence[Message], opened: bool = True) -> list[int]:
        return list(self._render(messages, opened, tokenize=True))

    def _render(self, messages: Sequence[Message], opened: bool, tokenize: bool = False) -> Any:
        """A conversation by the template, as text or token ids; with the assistant's turn `opened` at the end."""
        turns = [message.model_dump() for message in messages]
        try:
            # transformers 5 returns a BatchEncoding unless told otherwise
            return self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=opened, tokenize=tokenize, return_dict=False
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise ValueError(f"the chat template of {self.name!r} refuses the roles [{roles}]: {error}") from error

    def _one_template(self, day: date) -> str:
        """The tokenizer's template, the default of several, in which the current day is `day`."""
        found = self.tokenizer.chat_template
        if isinstance(found, dict) and "default" not in found:
            raise ValueError(
                f"the tokenizer of {self.name!r} has the chat templates {sorted(found)} and no default; set "
                "models.chat_template to the Jinja text of one, or a file with it"
            )
        template = found["default"] if isinstance(found, dict) else found
        if not template:
            raise ValueError(
                f"the tokenizer of {self.name!r} has no chat template; set models.chat_template to "
                "its Jinja text, or a file with it, or use a model that brings one"
            )
        frozen = re.sub(
            r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: json.dumps(day.strftime(call[2])), template
        )
        if "strftime_now(" in frozen:
            raise ValueError(
                f"the chat template of {self.name!r} prints the current day in a way that cannot be frozen; set "
                "models.chat_template to one with strftime_now('a format')"
            )
        if frozen != template:
            _warn(
                f"the chat template of {self.name!r} prints the current day. In this run, and in the models that it "
                f"writes, that is always {day}: models.chat_date"
            )
        return frozen

    def _required_bos(self) -> int | None:
        """The BOS, where the tokenizer puts it before any text; written into a template that leaves it out."""
        bos, plain = self.tokenizer.bos_token_id, self.tokenizer("a")["input_ids"]
        if bos is None or plain[0] != bos:
            return None
        if self._encode_chat(_PROBE)[0] != bos:
            self.tokenizer.chat_template = "{{ bos_token }}" + self.tokenizer.chat_template
        return int(bos)

    def _reply(self) -> tuple[str, str, str]:
        """An opened turn, and what the template puts between it and a reply, and behind the reply."""
        opened, whole = self._render(_PROBE[:1], opened=True), self._render(_PROBE[:2], opened=False)
        reply = _PROBE[1].content
        if reply not in whole:
            raise ValueError(
                f"the chat template of {self.name!r} renders the reply {reply!r} as {whole!r}, without it; set "
                "models.chat_template to one that keeps what the assistant says"
            )
        before, _, behind = whole.rpartition(reply)
        return opened, before.removeprefix(opened), behind

    def _reply_end(self) -> int:
        """The special token that the template puts behind a reply; else the tokenizer's EOS."""
        ids = self.tokenizer(self._reply()[2].strip(), add_special_tokens=False)["input_ids"]
        return ids[0] if ids and ids[0] in self._special_ids() else self.document_end

    def _check_reply(self) -> None:
        """Compare prompt ++ reply with the template's own rendering of the whole conversation.

        Raises ValueError where the assistant's turn is not opened; warns where past replies will look
        otherwise than trained ones.
        """
        opened, between, _ = self._reply()
        if opened == self._render(_PROBE[:1], opened=False) and any(token in between for token in self.control_tokens):
            raise ValueError(
                f"the chat template of {self.name!r} does not open the assistant's turn when add_generation_prompt is "
                f"set: {between!r} still stands before a reply; set models.chat_template to one that does"
            )
        whole, query = self._encode_chat(_PROBE[:2], opened=False), self._encode_chat(_PROBE[:1])
        trained = [*query, *self.response(_PROBE[1].content, ended=self.eos_id in whole[len(query) :])]
        if whole[: len(trained)] != trained:
            _warn(
                f"the chat template of {self.name!r} renders a reply in a conversation as "
                f"{self.tokenizer.decode(whole)!r}, but it is trained and sampled as "
                f"{self.tokenizer.decode(trained)!r}, or in other tokens: past replies will look new to the model. "
                "Remedy: a models.chat_template whose opening of the assistant's turn has no space at its end and "
                "nothing between it and the reply"
            )

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
        unused = self.tokenizer.get_vocab().get(_NO_TEXT)
        if unused is not None and unused not in self.tokenizer(_NO_TEXT, add_special_tokens=False)["input_ids"]:
            return unused
        raise ValueError(
            f"the tokenizer of {self.name!r} has no token to pad with (pad_token is "
            f"{self.tokenizer.pad_token!r}, and an EOS must not pad); add one with "
            "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), resize the model's embeddings, and "
            "save both"
        )


@cache
def _warn(text: str) -> None:
    """Warn once a process: a run loads the same tokenizer several times."""
    log.warning(text)
