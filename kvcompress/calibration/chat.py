"""Conversations as text: through the model's own chat template, or plainly where it has none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from kvcompress.calibration.tokenizer import reason

Message = Mapping[str, Any]
"""`role` and `content`; what else it holds is for the template."""

SECONDS = 10.0
"""Time a template may take for one conversation."""
GROWTH = 1 << 20
"""Characters a template may add to a conversation."""

DAY = datetime(2026, 1, 1)
"""What templates take for now."""

_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, open_answer: bool = False
) -> str:
    """A conversation in the model's chat template, special tokens spelled out.

    Templates that tell the date always get the same one: a run that goes on the day after must see the same text.

    Args:
        tools: functions the model may call, as the template expects them.
        open_answer: end where the assistant is to speak.

    Raises:
        ValueError: there is no template, or it fails: a syntax error, a role or an order of roles it does not take,
            something it needs and is not given, too much time or text, or none of the words.
    """
    where = f"the chat template of {tokenizer.name_or_path}"
    if not has_template(tokenizer):
        raise ValueError(f"{tokenizer.name_or_path} has no chat template; use a model that has one, or plain text")
    advice = "mend the template, or use plain text"
    try:
        with _at_most(SECONDS):
            made = tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=open_answer,
                strftime_now=DAY.strftime,
            )
    except Exception as error:  # templates are programs: they raise whatever they like
        raise ValueError(f"{where} fails: {reason(error)}; {advice}") from error
    words = sum(len(_content(message)) for message in messages)
    if not isinstance(made, str) or not made.strip():
        raise ValueError(f"{where} makes no text of a conversation; {advice}")
    if len(made) > 20 * words + GROWTH:
        raise ValueError(f"{where} makes {len(made):,} characters of a conversation of {words:,}; {advice}")
    return made


def plain(messages: Sequence[Message]) -> str:
    """A conversation without any template: `User: ...`, `Assistant: ...`, a line each."""
    return "".join(f"{_speaker(message)}: {_content(message)}\n" for message in messages)


class Dialogues:
    """Renders conversations of no particular model: as its template has them, or as near to it as it can.

    `note` says what was given up, for the user; None where nothing was.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._forms = [_whole, _without_system]
        self.note: str | None = None
        if not has_template(tokenizer):
            self._forms = []
            self.note = "taking dialogue as plain text, because the model has no chat template"

    def render(self, messages: Sequence[Message]) -> str:
        while self._forms:
            said = self._forms[0](messages)
            try:
                made = render(self._tokenizer, said)
                lost = next((text for text in map(_content, said) if text.strip()[:40] not in made), None)
                if lost is None:
                    return made
                why = f"it leaves out {lost[:40]!r}"
            except ValueError as error:
                why = str(error)
            if len(self._forms) > 1 and not _has_system(messages):
                self._forms = self._forms[1:]
            self._forms = self._forms[1:]
            form = "without system messages" if self._forms else "as plain text"
            self.note = f"taking dialogue {form}, because the chat template cannot have it whole ({why})"
        return plain(messages)


def _whole(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _without_system(messages: Sequence[Message]) -> Sequence[Message]:
    return [message for message in messages if message["role"] != "system"]


def _has_system(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "system" for message in messages)


def _speaker(message: Message) -> str:
    role = str(message["role"])
    return _SPEAKERS.get(role, role.capitalize())


def _content(message: Message) -> str:
    return str(message["content"])


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Stops a template that does not end. Only the main thread can be interrupted; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
