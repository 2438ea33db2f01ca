"""One example of supervised fine-tuning: the tokens of a conversation and which of them are learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reward_server.schema import Message


class TextEncoding(Protocol):
    """What prompts and texts need of `reward_server.encoding.ChatEncoding`, which documents it."""

    def prompt(self, messages: Sequence[Message]) -> list[int]: ...
    def response(self, text: str, ended: bool) -> list[int]: ...
    def document(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatExample:
    """Tokens with a mark on those whose log-probability is trained."""

    ids: tuple[int, ...]
    """[S] token ids: query, response, EOS"""
    loss_mask: tuple[bool, ...]
    """[S] True where token j is a target, predicted from the tokens before j; never True at 0"""


def chat_example(
    encoding: TextEncoding,
    prompt: Sequence[Message],
    response: str,
    max_tokens: int,
    mask_prompt: bool = True,
) -> ChatExample:
    """Encode a demonstration as `query ++ response ++ EOS`, targets being the response and its EOS.

    A response that does not fit into `max_tokens` is cut off and has no EOS target. With `mask_prompt` False
    the query is learnt too. Raises ValueError when the query leaves no room for a response.
    """
    query = encoding.prompt(prompt)
    if len(query) >= max_tokens:
        raise ValueError(
            f"the prompt has {len(query)} tokens, which leaves no room for a response in {max_tokens}; "
            "remove the example, or raise the maximum length"
        )
    ids = (query + encoding.response(response, ended=True))[:max_tokens]
    first_target = len(query) if mask_prompt else 1
    return ChatExample(ids=tuple(ids), loss_mask=tuple(j >= first_target for j in range(len(ids))))
