"""Sources of raw text: every one a stream of documents in an order that never changes."""

import ast
import glob
import inspect
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stackwise.config.data import DataParams
from stackwise.errors import UserError

TEXT_DOCUMENT_CHARS = 16 * 1024
"""A .txt file with more characters than this is cut into documents of at most this many."""
READERS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffix of a table file -> the reader of `datasets` that streams it."""


def documents(params: DataParams, seed: int) -> Iterator[str]:
    """The raw documents of the source, one at a time, in the same order every time.

    Args:
        params: the section `data`.
        seed: seed of the generator; only the source `dummy` depends on it.

    Raises:
        UserError: while iterating: the source is missing, empty or unreadable.
    """
    source: Callable[[], Iterator[str]] = {
        "python-docs": python_docs,
        "files": lambda: _file_documents(params),
        "hub": lambda: _column(_dataset_rows(params), params.text_column),
        "dummy": lambda: islice(dummy_documents(seed), params.dummy_documents),
    }[params.source]
    return islice(source(), params.max_documents)


def labelled_documents(params: DataParams) -> Iterator[tuple[list[int], list[int]]]:
    """Documents that are token ids with a label for each, one at a time, in the same order every time.

    Args:
        params: the section `data`; `ids_column` and `labels_column` name the columns, the source is `files` or `hub`.

    Raises:
        UserError: while iterating: the source is missing or unreadable, or a row holds something else.
    """
    assert params.ids_column is not None
    assert params.labels_column is not None
    columns = (params.ids_column, params.labels_column)
    if params.source == "hub":
        rows = _dataset_rows(params)
    else:
        rows = (row for file in find_files(params.files) for row in _labelled_rows(file))
    for number, (where, row) in enumerate(islice(rows, params.max_documents)):
        ids, labels = (_integers(row, column, f"document {number} of {where}") for column in columns)
        if len(ids) != len(labels):
            raise UserError(
                f"data.labels_column = {columns[1]}: document {number} of {where} has {len(labels)} labels for "
                f"{len(ids)} ids, expected one each: -100 where there is no target"
            )
        yield ids, labels


def _labelled_rows(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"data.files: {file} cannot hold lists of ids; expected .jsonl or .parquet: narrow the glob")
    return table_rows(file)


def _integers(row: Any, column: str, where: str) -> list[int]:
    """The integers that a row holds in a column; none where it is empty."""
    if column not in row:
        raise UserError(f"data: {where} has no column {column}; its columns are {', '.join(map(str, row))}")
    values = row[column] or []
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"data: {where} holds {str(values)[:40]!r} in column {column}, expected a list of integers")
    return values


# --- python-docs

_SKIPPED = {
    *("test", "tests", "site-packages", "dist-packages", "__pycache__"),
    *("ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"),
}
_WORD = re.compile(r"[A-Za-z]{2,}")


def python_docs() -> Iterator[str]:
    """The docstrings of each standard library module, a document a module, then the topics of `help()`.

    Modules are parsed, never imported. The text is that of the Python that runs this: another version has
    another one.

    Raises:
        UserError: this Python comes without the sources of its standard library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED]  # os.walk goes no further than these
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    modules.sort()
    if not modules:
        raise UserError(
            f"data.source = python-docs: Python {sys.version.split()[0]} has no standard library sources in "
            f"{library}; use another Python or set data.source to files"
        )
    for module in modules:
        docstrings = list(_docstrings(module))
        if docstrings:
            yield "\n\n".join(docstrings)
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield topics[name]


def _docstrings(module: Path) -> Iterator[str]:
    """The docstrings of a module that are prose, from top to bottom."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(module.read_bytes())
    except (SyntaxError, ValueError):  # templates and the like
        return
    owners = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for node in sorted(owners, key=lambda n: n.body[0].lineno if n.body else 0):
        docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if len(_WORD.findall(docstring)) >= 4:
            yield docstring


# --- files


def find_files(globs: list[str], key: str = "data.files") -> list[Path]:
    """The files that some globs name: glob by glob, sorted within each, every file once.

    Args:
        globs: relative to the current directory.
        key: the parameter that holds them, for messages.

    Raises:
        UserError: a glob matches no file, or a file of a type that cannot be read.
    """
    found: dict[Path, None] = {}
    for pattern in globs:
        matches = list(filter(Path.is_file, map(Path, sorted(glob.glob(pattern, recursive=True)))))
        if not matches:
            raise UserError(f"{key}: {pattern!r} matches no file in {Path.cwd()}; correct the glob or add the files")
        found.update(dict.fromkeys(matches))
    for file in found:
        if file.suffix not in (".txt", *READERS):
            known = ", ".join((".txt", *READERS))
            raise UserError(f"{key}: {file} is of an unknown type; expected {known}: narrow the glob")
    return list(found)


def _file_documents(params: DataParams) -> Iterator[str]:
    for file in find_files(params.files):
        if file.suffix == ".txt":
            yield from text_documents(file)
        else:
            yield from _column(table_rows(file, (params.text_column,)), params.text_column)


def text_documents(file: Path, key: str = "data.files") -> Iterator[str]:
    """A text file as documents: one if it is short, else pieces that end with a paragraph or at least a line.

    Pieces are short enough for the split to draw held-out text from within a single long file.

    Args:
        file: in UTF-8.
        key: the parameter that names it, for messages.

    Raises:
        UserError: while iterating: it is unreadable.
    """
    try:
        with file.open(encoding="utf-8-sig") as f:
            rest = ""
            while rest := rest + f.read(TEXT_DOCUMENT_CHARS - len(rest)):
                end = _end_of_piece(rest) if len(rest) == TEXT_DOCUMENT_CHARS else len(rest)
                yield rest[:end]
                rest = rest[end:]
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 ({error.reason}); convert it or leave it out"
        raise UserError(f"{key}: {file} {reason}") from None
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror})") from None


def _end_of_piece(text: str) -> int:
    """Where to cut: after the last blank line of the second half, else the last line, else at the end."""
    for separator in ("\n\n", "\n"):
        if (found := text.rfind(separator, len(text) // 2)) >= 0:
            return found + len(separator)
    return len(text)


def table_rows(file: Path, texts: Collection[str] = (), key: str = "data.files") -> Iterator[tuple[str, Any]]:
    """What it is called, and each row of a table as a mapping of its columns.

    Args:
        file: of a type in `READERS`.
        texts: columns that hold text, whatever a .csv file looks like there.
        key: the parameter that names the file, for messages.

    Raises:
        UserError: while iterating: it is unreadable.
    """
    if file.suffix == ".jsonl" and file.stat().st_size == 0:  # valid, though `datasets` fails on it
        return
    import datasets

    options: dict[str, Any] = {}
    if file.suffix == ".csv":
        # text stays text, also where it says 12 or NA
        converters = dict.fromkeys(texts, str)
        options = {"converters": converters, "keep_default_na": False, "chunksize": 1000}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would print is in the error below
    try:
        rows = datasets.load_dataset(
            READERS[file.suffix],
            data_files=glob.escape(str(file.resolve())),
            split="train",
            streaming=True,
            **options,
        )
        for row in rows:
            yield str(file), row
    except Exception as error:  # each reader fails in its own ways
        raise UserError(
            f"{key}: {file} cannot be read as {file.suffix} ({_first_line(error)}); repair it or leave it out"
        ) from error


# --- hub


def _dataset_rows(params: DataParams) -> Iterator[tuple[str, Any]]:
    return hub_rows(params.dataset or "", params.split)


def hub_rows(dataset: str, split: str, key: str = "data") -> Iterator[tuple[str, Any]]:
    """What it is called, and each row of a data set as a mapping of its columns.

    Args:
        dataset: `name` or `name:configuration`.
        split: of it.
        key: the section that names it, for messages.

    Raises:
        UserError: while iterating: it cannot be read.
    """
    import datasets

    name, _, configuration = dataset.partition(":")
    where = f"{key}.dataset = {dataset}, {key}.split = {split}"
    try:
        for row in datasets.load_dataset(name, configuration or None, split=split, streaming=True):
            yield f"the data set {dataset}", row
    except Exception as error:  # network, hub and file formats fail in their own ways
        raise UserError(
            f"{where}: cannot be read ({_first_line(error)}); check the names (dataset or "
            "dataset:configuration) and the network, or download the data and name its files"
        ) from error


def _column(rows: Iterator[tuple[str, Any]], column: str) -> Iterator[str]:
    """The texts of one column; a row without one gives an empty document, which cleaning drops and counts."""
    for where, row in rows:
        if column not in row:
            columns = ", ".join(map(str, row))
            raise UserError(f"data.text_column = {column}: no column of {where}; its columns are {columns}")
        text = row[column]
        if not isinstance(text, str | None):
            raise UserError(
                f"data.text_column = {column}: {where} holds {type(text).__name__} there "
                f"({str(text)[:40]!r}), expected text; name the column that holds it"
            )
        yield text or ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- dummy

_WORDS = {
    kind: words.split()
    for kind, words in {
        "article": "the a this that every one our their",
        "adjective": "small old quiet bright heavy green early distant broken gentle hungry wooden",
        "noun": "river house farmer window letter garden engine winter market bridge horse lamp village",
        "verb": "finds follows carries remembers opens leaves crosses paints hears keeps builds watches",
        "preposition": "near behind under beside without towards after before",
        "end": ". ; ? !",
    }.items()
}
_SENTENCE = (
    *("article", "adjective", "noun", "verb", "article", "noun"),
    *("preposition", "article", "adjective", "noun", "end"),
)
_ODDS = (0.6, 0.25, 0.1, 0.05)


def dummy_documents(seed: int) -> Iterator[str]:
    """Artificial text without end: sentences of one shape in which each word makes a few next words likely.

    A model can learn the spelling, the sentence and the seed's word pairs, in this order. Document i depends
    on nothing but (seed, i).
    """
    chain = random.Random(f"{seed} chain")
    successors = {
        (word, kind): chain.sample(_WORDS[kind], len(_ODDS))
        for words in _WORDS.values()
        for word in words
        for kind in _WORDS
    }
    index = 0
    while True:
        draw = random.Random(f"{seed} document {index}")
        word = draw.choice(_WORDS["end"])
        text = ""
        for _ in range(draw.randint(4, 16)):
            for kind in _SENTENCE:
                word = draw.choices(successors[word, kind], _ODDS)[0]
                text += word if kind == "end" else f" {word}"
        yield text.lstrip()
        index += 1
