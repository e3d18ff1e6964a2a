"""The corpus: documents cleaned, freed of duplicates and split into train and validation.

A document is text, or token ids with labels. What is written of it is a line of JSON: `{"text"}`, `{"ids", "labels"}`.
"""

import hashlib
import json
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from stackwise.config.data import DataParams
from stackwise.errors import UserError

KIND = "corpus"
SPLITS = ("train", "validation")
PROGRESS_EVERY = 1000
"""Documents between two calls of a progress callback."""

_LINE_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\n{4,}")


def clean(text: str) -> str:
    r"""`text` in the form in which it is stored, and in which two documents are compared.

    Unicode NFC; every kind of line break is `\n`; no control characters (but tabs), byte order marks or
    lone surrogates; no blanks at the end of lines; at most two blank lines in a row, none at the start and
    the end.
    """
    text = _CONTROL.sub("", _LINE_BREAKS.sub("\n", text))
    text = "\n".join(line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n"))
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")


def split_of(digest: bytes, *, seed: int, validation_fraction: float) -> str:
    """The split of a document, which depends on no other document: "train" or "validation".

    Args:
        digest: of the cleaned document.
        seed: of the split.
        validation_fraction: probability of "validation".
    """
    draw = hashlib.blake2b(digest, digest_size=8, key=b"split", salt=seed.to_bytes(8, "big")).digest()
    return "validation" if int.from_bytes(draw, "big") < validation_fraction * 2**64 else "train"


def write_corpus(
    texts: Iterator[str],
    directory: Path,
    *,
    params: DataParams,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Clean, deduplicate and split documents into `train.jsonl` and `validation.jsonl`.

    Memory holds one document at a time. The digests of those seen so far are in a database without a name,
    which SQLite keeps in the directory for temporary files (TMPDIR) and which ends with this process.

    Args:
        texts: raw documents; of equal ones (after cleaning) the first is kept.
        directory: where the two files go; it exists.
        params: the section `data`: `min_chars` and `validation_fraction` count here.
        seed: of the split.
        progress: called now and then with the number of documents read so far.

    Returns:
        `{"train": {"documents", "bytes"}, "validation": {...}, "dropped_short", "dropped_duplicates"}`; the
        bytes are those of the documents' text in UTF-8.

    Raises:
        UserError: a split is empty, or the source cannot be read.
    """

    def lines() -> Iterator[tuple[dict[str, Any], bytes] | None]:
        for raw in texts:
            text = clean(raw)
            yield ({"text": text}, text.encode()) if len(text) >= params.min_chars else None

    return _write(lines(), directory, params=params, seed=seed, progress=progress)


def write_labelled_corpus(
    documents: Iterator[tuple[list[int], list[int]]],
    directory: Path,
    *,
    params: DataParams,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Deduplicate and split documents of token ids with labels, as `write_corpus` does text.

    Args:
        documents: the ids and labels of each, as many; of equal ones the first is kept, empty ones are dropped.
        directory: where the two files go; it exists.
        params: the section `data`: `validation_fraction` counts here.
        seed: of the split.
        progress: called now and then with the number of documents read so far.

    Returns:
        As `write_corpus`, with `"labelled": True`; the bytes are those of the ids and labels as text.

    Raises:
        UserError: a split is empty, or the source cannot be read.
    """

    def lines() -> Iterator[tuple[dict[str, Any], bytes] | None]:
        for ids, labels in documents:
            yield ({"ids": ids, "labels": labels}, json.dumps([ids, labels]).encode()) if ids else None

    return {**_write(lines(), directory, params=params, seed=seed, progress=progress), "labelled": True}


def _write(
    lines: Iterator[tuple[dict[str, Any], bytes] | None],
    directory: Path,
    *,
    params: DataParams,
    seed: int,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Write documents, each given as its line and as what makes it equal to another; None is one that is too short."""
    kept = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    read = dropped_short = dropped_duplicates = 0
    with ExitStack() as stack:
        files = {}
        for split in SPLITS:
            file = (directory / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n")
            files[split] = stack.enter_context(file)
        seen = stack.enter_context(closing(sqlite3.connect("", isolation_level=None)))
        seen.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;"  # KiB
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN;"
        )
        for read, document in enumerate(lines, start=1):
            if progress and read % PROGRESS_EVERY == 0:
                progress(read)
            if document is None:
                dropped_short += 1
                continue
            line, encoded = document
            digest = hashlib.blake2b(encoded, digest_size=16).digest()
            if not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount:
                dropped_duplicates += 1
                continue
            split = split_of(digest, seed=seed, validation_fraction=params.validation_fraction)
            files[split].write(json.dumps(line, ensure_ascii=False) + "\n")
            kept[split]["documents"] += 1
            kept[split]["bytes"] += len(encoded)
    if progress:
        progress(read)
    facts = {**kept, "dropped_short": dropped_short, "dropped_duplicates": dropped_duplicates}
    _check_splits(facts, read, params)
    return facts


def _check_splits(facts: dict[str, Any], read: int, params: DataParams) -> None:
    documents = {split: facts[split]["documents"] for split in SPLITS}
    total = sum(documents.values())
    if not total and params.ids_column:
        raise UserError(
            f"data.ids_column = {params.ids_column}: all {read} documents are empty; give it some that are not"
        )
    if not total:
        raise UserError(
            f"data.source = {params.source}: no text is left of {read} documents: {facts['dropped_short']} "
            f"are shorter than data.min_chars ({params.min_chars}); give it text or lower data.min_chars"
        )
    for split, change in (("validation", "raise"), ("train", "lower")):
        if not documents[split]:
            raise UserError(
                f"data.validation_fraction = {params.validation_fraction}: none of the {total} documents of "
                f"data.source = {params.source} fell to {split}; {change} the fraction, give more documents "
                "(a long text can be cut into several) or change seed"
            )


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a file that `write_corpus` has written, in its order."""
    for line in _read_lines(path):
        yield line["text"]


def read_labelled_documents(path: Path) -> Iterator[tuple[list[int], list[int]]]:
    """The ids and labels of a file that `write_labelled_corpus` has written, in its order."""
    for line in _read_lines(path):
        yield line["ids"], line["labels"]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
