"""Text that appears token by token, cut before the texts at which it stops."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What the beginning of a character is shown as whose other bytes are still to come."""


class TextStream:
    """The text behind a prompt.

    A token may end within a character, or within a text at which to stop: what may still become another character or
    must not be shown is held back until the next tokens tell.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """
        Args:
            decode: ids -> text.
            prompt: ids in front, which decide how some tokenizers write what follows (a space before a word).
            stop: texts before which it ends.
        """
        self._decode, self._stop = decode, tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._shown = len(decode(self._ids))
        """Characters of what `_ids` says that have been taken over."""
        self._held = ""
        """Text that may be the beginning of one at which to stop."""
        self.stopped = False
        """Whether such a text has come; nothing is added from then on."""

    def add(self, token: int) -> str:
        """Take in the next token; returns the text that is certain now, in all the text so far."""
        self._ids.append(token)
        text = self._decode(self._ids)
        complete = not text.endswith(_INCOMPLETE)
        new = text[self._shown : len(text) if complete else -1]
        self._shown += len(new)
        if complete and len(self._ids) > 2 * _CONTEXT:  # decode a few tokens, however long the text
            self._ids = self._ids[-_CONTEXT:]
            self._shown = len(self._decode(self._ids))
        return self._released(new)

    def end(self) -> str:
        """What was held back, once it is clear that nothing follows."""
        if self.stopped:
            return ""
        last = self._decode(self._ids)[self._shown :]
        return self._released(last) + ("" if self.stopped else self._held)

    def _released(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


_CONTEXT = 8
"""Tokens in front of a new one that decide how it is written."""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
