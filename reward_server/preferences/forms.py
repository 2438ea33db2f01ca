"""The forms in which rows of public data sets say a prompt and a reply; what is read of each is in docs/data.md.

A prompt is a text, a transcript "\\n\\nHuman: ..\\n\\nAssistant: .." or a list of messages; Alpaca has an "instruction"
with an "input". A whole conversation is a list of messages, {"role", "content"} or ShareGPT's {"from", "value"}.
"""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from reward_server.schema import Message

_PROMPTS = ("prompt", "instruction", "question")
_REPLIES = ("response", "completion", "output", "answer")
_TALKS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "prompter": "user"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def kinds_of(row: dict[str, Any]) -> list[str]:
    """What kinds of files a row can be from, by its keys, the likeliest first; none where that cannot be told."""
    asks = any(isinstance(row.get(key), str | list) for key in _PROMPTS)
    talk = _first(row, _TALKS) is not None
    kinds = {
        "comparisons": "completions" in row
        or {"chosen", "rejected"} <= row.keys()
        or isinstance(row.get("prompt"), dict),
        "demonstrations": talk or (asks and _first(row, _REPLIES) is not None),
        "prompts": asks or talk or {"chosen", "rejected"} <= row.keys(),
        "pretraining text": "text" in row,
    }
    return [kind for kind, fits in kinds.items() if fits]


def has_prompt(row: dict[str, Any]) -> bool:
    """Whether a prompt stands by itself in a row, rather than in a whole conversation."""
    return _first(row, _PROMPTS) is not None


def row_text(row: dict[str, Any], key: str) -> str:
    """Read a text that must be there and not be blank. Raises ValueError."""
    value = row.get(key)
    if key not in row:
        kinds = kinds_of(row)
        like = f", as in a file of {kinds[0]}: is it the right file?" if kinds else "; add it"
        raise ValueError(f'"{key}" is missing; the row has {sorted(row)}{like}')
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be a string, not {value!r:.60}; write it in quotes')
    if not value.strip():
        raise ValueError(f'"{key}" is blank; give it a text or remove the row')
    return value


def row_texts(row: dict[str, Any], key: str) -> list[str]:
    """Read a list of texts that must be there, with one at least and none of them blank. Raises ValueError."""
    value = row.get(key)
    if not isinstance(value, list):
        row_text(row, key)
        raise ValueError(f'"{key}" must be a list of texts, not {value!r:.60}')
    if not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError(f'"{key}" must hold one or more texts, and no blank one; it is {value!r:.60}')
    return value


def row_demonstration(row: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    """Read a prompt and the reply to it: the last turn of a whole conversation where there is no reply by itself.

    Raises ValueError for a malformed row, and for a reply that people disliked (a "label" that is false).
    """
    if str(row.get("label")).lower() == "false":
        raise ValueError('"label" is false: people disliked this reply; leave such rows out')
    key, talk = _first(row, _REPLIES), _first(row, _TALKS)
    if key is None and talk is not None:
        prompt, response = split_talk(row, talk)
    else:
        prompt, response = row_prompt(row), row_reply(row, key or _REPLIES[0])
    if not response.strip():
        raise ValueError("the reply is blank; give it a text or remove the row")
    return prompt, response


def row_prompt(row: dict[str, Any]) -> tuple[Message, ...]:
    """Read the conversation that a reply is wanted to, as of a prompt, a demonstration or a pair. Raises ValueError."""
    key, talk = _first(row, _PROMPTS), _first(row, _TALKS)
    if key is None and talk is None and "chosen" in row:
        talk = "chosen"
    if key is None and talk is not None:
        turns = talk_turns(row, talk)
        return row_conversation({talk: turns[:-1] if _role(turns[-1]) == "assistant" else turns}, talk)
    messages = list(row_conversation(row, key or _PROMPTS[0]))
    if key == "instruction":
        more = next((row[name] for name in ("input", "context") if str(row.get(name, "")).strip()), "")
        if not isinstance(more, str):
            raise ValueError(f'"input" must be a string, not {more!r:.60}')
        messages[-1] = Message(
            role="user", content=f"{messages[-1].content}\n\n{more}" if more else messages[-1].content
        )
    if row.get("history"):
        raise ValueError('"history" is not read; put its turns into "messages"')
    if (system := _first(row, ("system", "system_prompt"))) and str(row[system]).strip():
        messages.insert(0, Message(role="system", content=row_text(row, system)))
    return tuple(messages)


def row_reply(row: dict[str, Any], key: str) -> str:
    """Read a reply: a text, or a list with one message of the assistant. Raises ValueError."""
    value = row.get(key)
    if not isinstance(value, list):
        return row_text(row, key)
    turns = _turns(value)
    if len(turns) != 1 or _role(turns[0]) != "assistant":
        raise ValueError(f'"{key}" must be a text or one message of the assistant, not {value!r:.60}')
    return _content(turns[0], key)


def row_reference(row: dict[str, Any]) -> str | None:
    """Read the reply to a prompt where the row has one: "reference", or as of a demonstration. Raises ValueError."""
    if "reference" in row:
        return row_text(row, "reference")
    talk = _first(row, _TALKS)
    ends = talk is not None and _role(talk_turns(row, talk)[-1]) == "assistant"
    return row_demonstration(row)[1] if ends or _first(row, _REPLIES) else None


def row_conversation(row: dict[str, Any], key: str = "prompt") -> tuple[Message, ...]:
    """Read a conversation that a reply is wanted to: a text (one user message), a transcript, or a list of messages.

    Blank system messages are left out. Raises ValueError unless it ends with a user message, every role is known, and
    no message is blank.
    """
    value = row.get(key)
    if isinstance(value, str) and _TURN.match(value):
        value = transcript(value)
        if value[-1]["role"] == "assistant" and not value[-1]["content"]:
            value.pop()
    if not isinstance(value, list):
        return (Message(role="user", content=row_text(row, key)),)
    messages = []
    for number, message in enumerate(_turns(value)):
        if _role(message) == "system" and not str(message.get("content", "")).strip():
            continue
        try:
            messages.append(Message.model_validate(message))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (key, number, *first["loc"])))
            raise ValueError(f'{where}: {first["msg"]}; a message is {{"role", "content"}}') from error
        if not messages[-1].content.strip():
            raise ValueError(f"{key}.{number}.content is blank; give it a text or remove the message")
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "nothing"
        raise ValueError(f'"{key}" must end with a user message, it ends with {last}; remove what follows the user')
    return tuple(messages)


def split_talk(row: dict[str, Any], key: str) -> tuple[tuple[Message, ...], str]:
    """Split a whole conversation into the prompt and the assistant's last turn. Raises ValueError."""
    turns = talk_turns(row, key)
    if _role(turns[-1]) != "assistant":
        raise ValueError(f'"{key}" must end with a turn of the assistant, not {turns[-1]!r:.60}')
    return row_conversation({key: turns[:-1]}, key), _content(turns[-1], key)


def side_of_pair(row: dict[str, Any], key: str, prompt: Sequence[Message] | None) -> tuple[tuple[Message, ...], str]:
    """Read "chosen" or "rejected": a reply to the `prompt` that stands beside it, or a whole conversation.

    Raises ValueError, also where the conversation has not the prompt in it.
    """
    value = row.get(key)
    if prompt is not None and isinstance(value, str) and not _TURN.match(value):
        return tuple(prompt), row_text(row, key)
    turns = talk_turns(row, key)
    if prompt is not None and len(turns) == 1:
        return tuple(prompt), row_reply(row, key)
    before, reply = split_talk(row, key)
    said = {(message.role, message.content.strip()) for message in before}
    if any((message.role, message.content.strip()) not in said for message in prompt or ()):
        raise ValueError(f'"{key}" is a whole conversation, and "prompt" is not in it; remove "prompt", or correct it')
    return before, reply


def talk_turns(row: dict[str, Any], key: str) -> list[Any]:
    """The turns of a whole conversation, at least one. Raises ValueError."""
    value = row.get(key)
    if isinstance(value, str):
        if not _TURN.match(value):
            raise ValueError(f'"{key}" must start with "\\n\\nHuman:", not {value[:40]!r}; or give a "prompt" too')
        value = transcript(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{key}" must be a transcript or a list of messages, not {value!r:.60}')
    return _turns(value)


def transcript(text: str) -> list[Any]:
    """The messages of "\\n\\nHuman: ..\\n\\nAssistant: ..", without the spaces around them."""
    pieces = _TURN.split(text)[1:]
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _turns(value: list[Any]) -> list[Any]:
    """Messages in one form; ShareGPT's are {"from": "human", "value": ..}. What is none is left as it is."""
    turns = []
    for message in value:
        if isinstance(message, dict) and "from" in message and "role" not in message:
            message = {"role": message["from"], "content": message.get("value")}
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            message = {**message, "role": _ROLES.get(message["role"], message["role"])}
        turns.append(message)
    return turns


def _content(turn: Any, key: str) -> str:
    if not isinstance(turn.get("content"), str):
        raise ValueError(f'the last turn of "{key}" must have a text as its content, not {turn!r:.60}')
    return turn["content"]


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _first(row: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys that the row has."""
    return next((key for key in keys if key in row), None)
