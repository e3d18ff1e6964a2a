"""Texts on the terminal while they come about."""

import shutil
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from stackwise.generation.generator import Generation, Piece

_BOLD, _PLAIN = "\033[1m", "\033[0m"
_UP_AND_CLEAR = "\r\033[{}A\033[J"
_CLEAR = "\r\033[J"
_MASK = "░"


class Screen:
    """Shows texts as they come about, if that is wanted: from left to right a single one as it is written, anywhere;
    masks that give way to text in place, on a terminal. Several texts that are written at the same time are shown
    when they are done."""

    def __init__(self, out: TextIO, *, prompts: Sequence[str], live: bool) -> None:
        """
        Args:
            out: where to.
            prompts: of all texts.
            live: whether to show them before they are done.
        """
        self._out, self._prompts, self._live = out, prompts, live
        self._terminal = out.isatty()
        self._streaming = False
        self._frame: dict[int, Sequence[Piece | int]] = {}
        self._lines = 0

    def wrote(self, index: int, text: str) -> None:
        """From left to right: more text."""
        if not self._live or len(self._prompts) > 1:
            return
        if not self._streaming:
            self._streaming = True
            self._out.write(self._given(self._prompts[index]))
        self._out.write(text)
        self._out.flush()

    def unmasked(self, index: int, pieces: Sequence[Piece | int]) -> None:
        """By unmasking: the text so far."""
        if not self._live or not self._terminal:
            return
        self._frame[index] = pieces
        size = shutil.get_terminal_size()
        rows: list[str] = []
        for i, own in sorted(self._frame.items()):
            rows += self._head(i) + _rows(_shown(own), size.columns)
        rows = rows[: size.lines - 1]
        self._erase()
        self._out.write("\n".join(rows))
        self._out.flush()
        self._lines = len(rows)

    def done(self, index: int, text: Generation) -> None:
        """A whole text."""
        self._erase()
        self._frame.clear()
        if self._streaming:
            self._streaming = False
            self._out.write("\n")
        else:
            whole = "".join(piece.text if piece.made else self._given(piece.text) for piece in text.pieces)
            self._out.write("\n".join([*self._head(index), whole, ""]))
        self._out.flush()

    def _head(self, index: int) -> list[str]:
        """What stands above a text, if there are several."""
        return [f"--- {index + 1} of {len(self._prompts)} ---"] if len(self._prompts) > 1 else []

    def _given(self, text: str) -> str:
        return f"{_BOLD}{text}{_PLAIN}" if self._terminal and text else text

    def _erase(self) -> None:
        """What was drawn last."""
        if self._lines:
            self._out.write(_UP_AND_CLEAR.format(self._lines - 1) if self._lines > 1 else _CLEAR)
        self._lines = 0


def _shown(pieces: Sequence[Piece | int]) -> str:
    return "".join(_MASK * piece if isinstance(piece, int) else piece.text for piece in pieces)


def _rows(text: str, columns: int) -> list[str]:
    """A text as the rows of a terminal, one line each: nothing else moves the cursor."""
    rows = []
    for line in text.expandtabs(4).split("\n"):
        row, width = "", 0
        for character in line:
            if not character.isprintable():
                character = "\N{REPLACEMENT CHARACTER}"
            own = 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
            if width + own > columns - 1:
                rows.append(row)
                row, width = "", 0
            row, width = row + character, width + own
        rows.append(row)
    return rows
