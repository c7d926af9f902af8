"""The tokenizer of a model folder: token counts, prompts, text, and a hash that names it in every cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcompress.calibration import chat, tokenizer
from kvcompress.calibration.chat import Dialogues

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")


class TextTokenizer:
    """A Hugging Face tokenizer, loaded from a local folder or a hub id without running the repository's code."""

    def __init__(self, model: str | Path) -> None:
        self.model = str(model)
        # One text at a time: threads of the tokenizer's own would only make it warn when an engine forks.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._tokenizer: Any = tokenizer.load(self.model)
        # The Rust tokenizer inside does what tokenize() does, without building the token strings.
        self._fast: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()

    @property
    def size(self) -> int:
        """Ids below this are tokens: added ones are counted."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def end(self) -> list[int]:
        """The tokenizer's own end of a sequence, if it has one."""
        token = self._tokenizer.eos_token_id
        return [] if token is None else [int(token)]

    def token_id(self, token: str) -> int | None:
        """Id of a token given as its text, or None where the vocabulary has none like it."""
        found: int | None = self._tokenizer.get_vocab().get(token)
        return found

    @cached_property
    def has_chat(self) -> bool:
        """Whether a chat template is there that shows a message as it is."""
        try:
            self.chat_turn()
        except ValueError:
            return False
        return True

    def count(self, text: str) -> int:
        """Tokens of the text, special tokens not added: `len(tokenize(text))`."""
        with self._in_words():
            if self._fast is not None:
                # As encode(), but without offsets and without Python's lock: threads count side by side.
                return len(self._fast.encode_batch_fast([text], add_special_tokens=False)[0])
            return len(self._tokenizer.tokenize(text))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of the text, with the tokens that the tokenizer puts around a prompt if `special`."""
        with self._in_words():
            return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=special, verbose=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a whole prompt; what the tokenizer puts before one is not put there twice."""
        tokens = self.encode(text)
        size = len(self.prefix)
        return tokens[size:] if size and tokens[size : 2 * size] == self.prefix else tokens

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation (role and content each) in the model's chat template, open for the assistant's answer.

        Raises:
            ValueError: the tokenizer has no chat template, or it fails.
        """
        if not chat.has_template(self._tokenizer):
            raise ValueError(f"the tokenizer of {self.model} has no chat template; ask without --template chat")
        return chat.render(self._tokenizer, messages, open_answer=True)

    @cached_property
    def _dialogues(self) -> Dialogues:
        return Dialogues(self._tokenizer)

    def conversation(self, messages: Sequence[dict[str, str]]) -> str:
        """A finished conversation as text: in the chat template as far as that shows it, or plainly."""
        return self._dialogues.render(messages)

    def chat_turn(self) -> tuple[str, str]:
        """What the chat template puts before and after a user's only message, up to where the assistant speaks.

        Raises:
            ValueError: there is no chat template, or it does not show the message once and as it is.
        """
        message = "The message of the user."
        text = self.chat([{"role": "user", "content": message}])
        if text.count(message) != 1:
            raise ValueError(f"the chat template of {self.model} shows a message {text.count(message)} times, not once")
        before, after = text.split(message)
        return before, after

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, spaces as they are."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _in_words(self) -> AbstractContextManager[None]:
        return tokenizer.in_words(f"the tokenizer of {self.model} fails on text", "get its files again")

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens that the tokenizer puts before a prompt, often one that begins a sequence."""
        plain = self.encode("a", special=False)
        full = self.encode("a")
        starts = [at for at in range(len(full)) if full[at : at + len(plain)] == plain]
        return full[: starts[0]] if starts else []

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer's files, or of its vocabulary where it was loaded from the hub."""
        folder = Path(self.model)
        found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        digest = hashlib.sha256()
        if found and found[0].name == "tokenizer.json":
            digest.update(found[0].read_bytes())
        elif found:
            for path in found:
                digest.update(path.name.encode() + path.read_bytes())
        else:
            digest.update((self._fast.to_str() if self._fast else repr(sorted(self._tokenizer.get_vocab()))).encode())
        return digest.hexdigest()
