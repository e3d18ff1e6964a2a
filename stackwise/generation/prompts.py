"""Prompts: text that is given, with places that are to be filled in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stackwise.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASK = re.compile(r"\[MASK(?::([1-9]\d*))?\]")


@dataclass(frozen=True)
class Given:
    """Text that stays what it is."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt as a model takes it."""

    text: str
    parts: tuple[Given | int, ...]
    """What is given, and in between how many masked tokens are to be filled in."""

    @property
    def masked(self) -> bool:
        """Whether anything is to be filled in."""
        return any(isinstance(part, int) for part in self.parts)

    def ids(self, mask_id: int) -> list[int]:
        """All ids, masks among them."""
        return [token for part in self.parts for token in (part.ids if isinstance(part, Given) else [mask_id] * part)]


def read_prompts(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """Prompts from text in which `[MASK]` is a token to be filled in and `[MASK:8]` are eight.

    What stands between masks is tokenized by itself; nothing is put in front of it.
    """
    cut = [list(_parts(text)) for text in texts]
    given = [part for parts in cut for part in parts if isinstance(part, str)]
    ids = iter(encode(tokenizer, given) if given else [])
    return [
        Prompt(text, tuple(part if isinstance(part, int) else Given(part, tuple(next(ids))) for part in parts))
        for text, parts in zip(texts, cut, strict=True)
    ]


def fills_in(text: str) -> bool:
    """Whether a prompt has a `[MASK]`."""
    return _MASK.search(text) is not None


def _parts(text: str) -> Iterator[str | int]:
    end = 0
    for mask in _MASK.finditer(text):
        if mask.start() > end:
            yield text[end : mask.start()]
        yield int(mask[1] or 1)
        end = mask.end()
    if end < len(text):
        yield text[end:]
