"""Words of the benchmark: the lists of the wonderwords package, and the 6.2 million adjective-noun keys of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import overload


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """One list (noun, adjective or verb): a word per line, trailing whitespace removed, nothing filtered."""
    with (files("wonderwords") / "assets" / f"{kind}list.txt").open("r", encoding="utf-8") as lines:
        return tuple(line.rstrip() for line in lines)


@cache
def word_pool() -> tuple[str, ...]:
    """The sorted set of all nouns, adjectives and verbs."""
    return tuple(sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")}))


class WordKeys(Sequence[str]):
    """The sorted set of every `adjective-noun`, indexable without being built.

    Strings that begin with different adjectives compare as `adjective-` does, unless one `adjective-` is a prefix of
    the other (`blue-` and `blue-eyed-`). So the list is a run of blocks, one per adjective, in which only adjectives
    related by prefix have to be merged; every other block is the sorted nouns behind one adjective.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._blocks: list[str | list[str]] = []
        heads = sorted({adjective + "-" for adjective in adjectives})
        start = 0
        while start < len(heads):
            end = start + 1
            while end < len(heads) and heads[end].startswith(heads[start]):
                end += 1
            group = heads[start:end]
            self._blocks.append(
                group[0] if len(group) == 1 else sorted({head + noun for head in group for noun in self._nouns})
            )
            start = end
        sizes = (len(self._nouns) if isinstance(block, str) else len(block) for block in self._blocks)
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, index)
        offset = index - (self._ends[at - 1] if at else 0)
        block = self._blocks[at]
        return block + self._nouns[offset] if isinstance(block, str) else block[offset]


@cache
def word_keys() -> WordKeys:
    """The keys of niah."""
    return WordKeys(word_list("adjective"), word_list("noun"))
