"""Files of multiple-choice questions."""

import json
from dataclasses import dataclass
from pathlib import Path

from stackwise.errors import UserError


@dataclass(frozen=True)
class Choice:
    """A row of a file."""

    prompt: str
    choices: tuple[str, ...]
    """Texts that may follow, each with the space or line break that it begins with."""
    answer: int
    """Place of the right one."""


def read_choices(file: Path) -> list[Choice]:
    """The rows of a JSONL file: `{"prompt": text, "choices": [text, ...], "answer": place or text}`.

    Raises:
        UserError: the file is missing or a row is not so; with the number of the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); correct the path or add the file") from None
    found = [_row(f"{file}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{file}: no rows; expected JSON Lines, each {_EXPECTED}")
    return found


_EXPECTED = '{"prompt": text, "choices": [text, ...], "answer": place from 0, or one of the choices}'


def _row(where: str, line: str) -> Choice:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); expected {_EXPECTED}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {line[:60]!r}: expected {_EXPECTED}")
    if missing := [key for key in ("prompt", "choices", "answer") if key not in row]:
        raise UserError(f"{where}: no {missing[0]}; expected {_EXPECTED}")
    prompt, choices, answer = row["prompt"], row["choices"], row["answer"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: prompt = {prompt!r}: expected a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: choices = {choices!r}: expected a list of at least two texts, none of them empty")
    if len(set(choices)) < len(choices):
        raise UserError(f"{where}: choices = {choices!r}: the same text stands there twice")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        last = len(choices) - 1
        raise UserError(f"{where}: answer = {answer!r}: expected a number from 0 to {last}, or one of the choices")
    return Choice(prompt, tuple(choices), answer)
