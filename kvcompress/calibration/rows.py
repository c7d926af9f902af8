"""One row of a calibration file, checked: text, a conversation, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcompress.checkpoint.paths import quote

FIELDS = ("text", "messages", "input_ids")
EXPECTED = "an object with 'text' (string), 'messages' (a conversation) or 'input_ids' (token ids)"


@dataclass(frozen=True)
class Text:
    """`where` says for messages which file and line it is from; so for the other kinds of row."""

    where: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """Messages of `role` and `content`, both strings, and the tools a template may be told of."""

    where: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[Any] | None


@dataclass(frozen=True)
class Tokens:
    """Ids inside the model's vocabulary."""

    where: str
    ids: list[int]


Row = Text | Dialogue | Tokens


def parse(value: Any, where: str, vocab_size: int) -> Row:
    """A row from its JSON value: a string, or an object with one of `FIELDS`; the first that is not null counts.

    Raises:
        ValueError: another shape, naming the field, what was found and what was expected.
    """
    if isinstance(value, str):
        return _text(value, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {_shown(value)}; expected a string, or {EXPECTED}")
    given = [name for name in FIELDS if value.get(name) is not None]
    if not given:
        empty = [f"{name} is null" for name in FIELDS if name in value]
        keys = ", ".join(quote(str(key)) for key in list(value)[:5]) or "no keys"
        raise ValueError(f"{where}: found {'; '.join(empty) or keys}; expected {EXPECTED}")
    name, field = given[0], value[given[0]]
    if name == "text":
        if not isinstance(field, str):
            raise ValueError(f"{where}: found {_shown(field)} in 'text'; expected a string")
        return _text(field, where)
    if name == "messages":
        tools = value.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise ValueError(f"{where}: found {_shown(tools)} in 'tools'; expected a list")
        return Dialogue(where, _messages(field, where), tools or None)
    return Tokens(where, _ids(field, where, vocab_size))


def _text(text: str, where: str) -> Text:
    _check_characters(text, where)
    return Text(where, text)


def _messages(field: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(field, list) or not field:
        raise ValueError(f"{where}: found {_shown(field)} in 'messages'; expected a list of messages")
    messages = []
    for number, message in enumerate(field):
        at = f"{where}: messages[{number}]"
        if not isinstance(message, dict):
            raise ValueError(f"{at} is {_shown(message)}; expected an object with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"{at} has {_shown(role)} as 'role'; expected a string such as 'user'")
        if content is None and message.get("tool_calls"):
            content = ""  # a call of tools needs no words
        if isinstance(content, list):  # the form that holds pictures as well
            content = _joined(content, at)
        if not isinstance(content, str):
            raise ValueError(f"{at} has {_shown(content)} as 'content'; expected a string")
        _check_characters(role + content, at)
        messages.append({**message, "content": content})
    return messages


def _joined(parts: list[Any], at: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = quote(str(part.get("type"))) if isinstance(part, dict) else _shown(part)
            raise ValueError(f"{at} has a part of 'content' that is {kind}; expected text only")
    return "".join(part["text"] for part in parts)


def _ids(field: Any, where: str, vocab_size: int) -> list[int]:
    if not isinstance(field, list):
        raise ValueError(f"{where}: found {_shown(field)} in 'input_ids'; expected a list of token ids")
    for number, token in enumerate(field):
        if type(token) is not int:
            raise ValueError(f"{where}: input_ids[{number}] is {_shown(token)}; expected a whole number")
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where}: input_ids[{number}] is {_shown(token)}, outside the model's vocabulary of {vocab_size}; "
                "expected ids of this model's own tokenizer"
            )
    return field


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} is half of a surrogate pair ({text[error.start]!a}); expected whole "
            "characters"
        ) from None


def _shown(value: Any) -> str:
    """A JSON value as a message shows it: its kind, and itself where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1 << 64 else "a number beyond 64 bits"
    if isinstance(value, float):
        return f"the number {value!r}"
    if isinstance(value, str):
        return f"the string {quote(value[:40])}"
    return "an empty list" if value == [] else f"a{'n object' if isinstance(value, dict) else ' list'}"
