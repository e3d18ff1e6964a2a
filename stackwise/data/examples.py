"""Own data of a fine-tuning branch: rows of files or data sets, as token files.

Text becomes what the corpus becomes: documents, one after the other, each followed by the end-of-text id. Rows of the
other formats stay whole. They are packed into samples in their order, a new sample where the next row does not fit;
`*_segments.npy` numbers the rows of a sample, so that none sees another, and what is left of a sample is filled with
the end-of-text id. `*_labels.npy` (int32) holds what there is to learn, -100 elsewhere:

- `completion`: prompt, completion, end of text. The label of each position of the completion and of the end is the id
  that stands there. Too long a row loses the beginning of its prompt, and only if the completion alone is too long its
  end.
- `token_labels`: words, with a space between them, end of text. The label of the first token of each word is its class.
- `sequence_labels`: text, end of text. The label of the end is the class.

Of the latter two a row that is too long loses the end of its text.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stackwise.artifacts.manifest import Artifact
from stackwise.config.tuning import OwnDataParams
from stackwise.data.corpus import SPLITS, clean, split_of
from stackwise.data.encoding import BATCH_DOCUMENTS, NO_LABEL, dtype_of, write_header, write_tokens
from stackwise.data.sources import find_files, hub_rows, table_rows, text_documents
from stackwise.data.tokenizer import encode, vocabulary_of
from stackwise.data.tokens import TOKENIZER, WORD_STARTS, Vocabulary
from stackwise.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Encoded:
    """A row as tokens."""

    ids: NDArray[np.int64]
    """`[n]`, n at most the length of a sample."""
    labels: NDArray[np.int64]
    """`[n]`."""
    bytes: int
    """Of the text that is to be predicted, or that has labels, in UTF-8."""
    truncated: bool


class RowFormat(Protocol):
    """What rows hold."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that hold text."""

    def content(self, row: Any, where: str) -> Any:
        """What counts of a row, as JSON values; None if it is empty.

        Raises:
            UserError: the row holds something else.
        """

    def encoded(self, contents: list[Any], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Iterator[Encoded]:
        """Some of them as tokens."""


def write_examples(
    params: OwnDataParams,
    tokens: Artifact,
    directory: Path,
    *,
    seq_len: int | None,
    seed: int,
    key: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the token files of a branch's own data, with a copy of the tokenizer that they were made with.

    Each split is read in a pass of its own, so memory holds a few hundred rows at a time. Rows are held out by their
    content: equal rows fall to the same side.

    Args:
        params: `fine_tune.<name>.data`.
        tokens: those of the corpus, which have the rack's tokenizer.
        directory: where the files go; it exists.
        seq_len: tokens of a sample, into which rows are packed (format `text`: None).
        seed: of the split.
        key: the parameter that `params` are, for messages.
        progress: called now and then with the number of rows of a split written so far.

    Returns:
        Facts: those of the vocabulary; `format`; of each split `tokens` (those with a label), `bytes` of what these
        stand for, and `rows`; of packed rows `packed` (`seq_len`), `labelled`, and `truncated` and `samples` of each
        split; of a classifier `labels`, the names of its classes.

    Raises:
        UserError: the data is missing or unreadable, a row holds something else, or a split is empty.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokens.path / TOKENIZER)
    shutil.copytree(tokens.path / TOKENIZER, directory / TOKENIZER)
    shutil.copy(tokens.path / WORD_STARTS, directory / WORD_STARTS)
    reader = _Reader(params, seed, key)
    facts: dict[str, Any] = {name: tokens.facts[name] for name in ("vocab_size", "mask_id", "eos_id")}
    facts["format"] = params.format
    if not params.packed:
        for split in SPLITS:
            documents = reader.texts(split)
            facts[split], counts = write_tokens(tokenizer, documents, directory / f"{split}.npy", progress)
            reader.check_not_empty(split, facts[split]["tokens"])
            if split == "train":
                np.save(directory / "counts.npy", counts)
        return facts
    assert seq_len is not None, "rows are packed into samples"
    facts |= {"labelled": True, "packed": seq_len}
    row_format = _row_format(params, key)
    if isinstance(row_format, Labelled):
        row_format.names = list(params.labels) or _names(row_format, reader)
        facts["labels"] = row_format.names
    for split in SPLITS:
        with _PackedFile(directory, split, vocabulary_of(tokenizer), seq_len, facts.get("labels")) as file:
            contents = reader.contents(row_format, split)
            while some := list(islice(contents, BATCH_DOCUMENTS)):
                for row in row_format.encoded(some, tokenizer, seq_len):
                    file.write(row)
                if progress:
                    progress(file.rows)
            reader.check_not_empty(split, file.rows)
        facts[split] = file.facts()
        if split == "train":
            np.save(directory / "counts.npy", file.counts)
    return facts


class _Reader:
    """Reads the rows of a split."""

    def __init__(self, params: OwnDataParams, seed: int, key: str) -> None:
        self._params, self._seed, self._key = params, seed, key
        self._given = bool(params.validation_files or params.validation_split)

    def texts(self, split: str) -> Iterator[str]:
        """Documents, cleaned, none empty."""
        column = self._params.text_column
        for where, row in self._rows(split, (column,), text=True):
            text = clean(row if isinstance(row, str) else _text(row, column, f"{self._key}.text_column", where))
            if text and self._is_in(split, text):
                yield text

    def contents(self, row_format: RowFormat, split: str) -> Iterator[Any]:
        """What rows of a format hold."""
        for where, row in self._rows(split, row_format.columns):
            content = row_format.content(row, where)
            if content is not None and self._is_in(split, content):
                yield content

    def check_not_empty(self, split: str, found: int) -> None:
        """See to it that something was found.

        Raises:
            UserError: nothing was.
        """
        if found:
            return
        params, key = self._params, self._key
        source = ", ".join(params.files) if params.files else params.dataset
        if self._given or split == "train":
            raise UserError(f"{key}: no row that is not empty was found in {source} for {split}; give it some")
        raise UserError(
            f"{key}.validation_fraction = {params.validation_fraction}: no row of {source} fell to validation; raise "
            "the fraction, give more rows or name validation_files"
        )

    def _rows(self, split: str, columns: tuple[str, ...], *, text: bool = False) -> Iterator[tuple[str, Any]]:
        """What it is called, and each row; of a text file each document."""
        params, held_out = self._params, split == "validation" and self._given
        rows: Iterable[tuple[str, Any]]
        if params.dataset is not None:
            name = params.validation_split if held_out and params.validation_split else params.split
            rows = hub_rows(params.dataset, name, self._key)
        else:
            key = f"{self._key}.{'validation_files' if held_out else 'files'}"
            globs = params.validation_files if held_out else params.files
            rows = chain.from_iterable(self._file_rows(file, columns, key, text) for file in find_files(globs, key))
        for number, (where, row) in enumerate(islice(rows, params.max_rows)):
            yield f"row {number} of {where}", row

    @staticmethod
    def _file_rows(file: Path, columns: tuple[str, ...], key: str, text: bool) -> Iterator[tuple[str, Any]]:
        if file.suffix != ".txt":
            yield from table_rows(file, columns, key)
        elif text:
            yield from ((str(file), document) for document in text_documents(file, key))
        else:
            raise UserError(f"{key}: {file} has no columns; expected .jsonl, .parquet or .csv: narrow the glob")

    def _is_in(self, split: str, content: Any) -> bool:
        if self._given:
            return True
        digest = hashlib.blake2b(json.dumps(content, ensure_ascii=False).encode(), digest_size=16).digest()
        return split == split_of(digest, seed=self._seed, validation_fraction=self._params.validation_fraction)


# --- formats


def _row_format(params: OwnDataParams, key: str) -> RowFormat:
    match params.format:
        case "completion":
            return _Completions(params, key)
        case "token_labels":
            return _TokenLabels(params, key)
        case _:
            return _SequenceLabels(params, key)


@dataclass
class _Completions:
    params: OwnDataParams
    key: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.params.prompt_column, self.params.completion_column

    def content(self, row: Any, where: str) -> Any:
        columns = ("prompt_column", "completion_column")
        prompt, completion = (_text(row, getattr(self.params, c), f"{self.key}.{c}", where) for c in columns)
        return (prompt, completion) if completion else None

    def encoded(self, contents: list[Any], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Iterator[Encoded]:
        eos_id = vocabulary_of(tokenizer).eos_id
        prompts, completions = (encode(tokenizer, [content[i] for content in contents]) for i in (0, 1))
        for prompt, answer, (_, text) in zip(prompts, completions, contents, strict=True):
            whole = [*answer, eos_id]
            kept = whole[:seq_len]
            n_bytes = len(text.encode())
            if len(kept) < len(whole):
                n_bytes = len(str(tokenizer.decode(kept)).encode())
            context = prompt[max(0, len(prompt) - (seq_len - len(kept))) :]
            yield Encoded(
                np.array([*context, *kept], np.int64),
                np.array([NO_LABEL] * len(context) + kept, np.int64),
                n_bytes,
                len(context) + len(kept) < len(prompt) + len(whole),
            )


@dataclass
class Labelled:
    """Rows with labels: classes by name."""

    params: OwnDataParams
    key: str
    names: list[str] = field(default_factory=list)

    def named(self, content: Any) -> Iterator[Any]:
        """The labels of a row, as they stand there."""
        raise NotImplementedError

    def number(self, label: Any) -> int:
        """The class of a label.

        Raises:
            UserError: there is none.
        """
        name = _name(label)
        if name not in self.names:
            expected = f"one of {', '.join(self.names[:12])}" + (", ..." if len(self.names) > 12 else "")
            origin = f"those of {self.key}.labels" if self.params.labels else "those of the training rows"
            raise UserError(
                f"{self.key}: a row has the label {name}, expected {expected} ({origin}); correct the row or list "
                "all labels"
            )
        return self.names.index(name)


class _TokenLabels(Labelled):
    columns: tuple[str, ...] = ()

    def content(self, row: Any, where: str) -> Any:
        keys = ("words_column", "labels_column")
        words, labels = (_list(row, getattr(self.params, key), f"{self.key}.{key}", where) for key in keys)
        if len(words) != len(labels):
            raise UserError(
                f"{self.key}.labels_column = {self.params.labels_column}: {where} has {len(labels)} labels for "
                f"{len(words)} words, expected one each: null or {NO_LABEL} where there is none"
            )
        if not all(isinstance(word, str) and word for word in words):
            raise UserError(
                f"{self.key}.words_column = {self.params.words_column}: {where}: expected texts, none empty"
            )
        return [
            [word, _label(label, f"{self.key}.labels_column", where)] for word, label in zip(words, labels, strict=True)
        ] or None

    def named(self, content: Any) -> Iterator[Any]:
        yield from (label for _, label in content if label is not None)

    def encoded(self, contents: list[Any], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Iterator[Encoded]:
        eos_id = vocabulary_of(tokenizer).eos_id
        pieces = iter(
            encode(tokenizer, [(" " if i else "") + pair[0] for row in contents for i, pair in enumerate(row)])
        )
        for row in contents:
            ids: list[int] = []
            labels: list[int] = []
            for (_, label), piece in zip(row, pieces, strict=False):
                ids += piece
                labels += [NO_LABEL if label is None else self.number(label), *[NO_LABEL] * len(piece)][: len(piece)]
            kept = seq_len - 1
            n_bytes = len(" ".join(word for word, _ in row).encode())
            own = np.array([*ids[:kept], eos_id], np.int64), np.array([*labels[:kept], NO_LABEL], np.int64)
            yield Encoded(*own, n_bytes, len(ids) > kept)


class _SequenceLabels(Labelled):
    @property
    def columns(self) -> tuple[str, ...]:
        return self.params.text_column, self.params.label_column

    def content(self, row: Any, where: str) -> Any:
        text = _text(row, self.params.text_column, f"{self.key}.text_column", where)
        label = _label(
            _value(row, self.params.label_column, f"{self.key}.label_column", where), f"{self.key}.label_column", where
        )
        if text and (label is None or label == ""):
            raise UserError(
                f"{self.key}.label_column = {self.params.label_column}: {where} has no label there; give it one or "
                "leave the row out"
            )
        return [text, label] if text else None

    def named(self, content: Any) -> Iterator[Any]:
        yield content[1]

    def encoded(self, contents: list[Any], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Iterator[Encoded]:
        eos_id = vocabulary_of(tokenizer).eos_id
        for ids, (text, label) in zip(encode(tokenizer, [text for text, _ in contents]), contents, strict=True):
            kept = ids[: seq_len - 1]
            labels = np.full(len(kept) + 1, NO_LABEL, np.int64)
            labels[-1] = self.number(label)
            yield Encoded(np.array([*kept, eos_id], np.int64), labels, len(text.encode()), len(kept) < len(ids))


def _names(row_format: Labelled, reader: _Reader) -> list[str]:
    """The labels of the training rows, sorted: numbers by size."""
    found = {label for content in reader.contents(row_format, "train") for label in row_format.named(content)}  # type: ignore[arg-type]
    names = sorted(found) if all(isinstance(label, int) for label in found) else sorted(map(_name, found))
    if len(set(map(_name, names))) < 2:
        raise UserError(
            f"{row_format.key}: the training rows have {len(names)} labels"
            f"{''.join(f' ({_name(n)})' for n in names)}, expected two at least; give rows of other labels"
        )
    return list(dict.fromkeys(map(_name, names)))


def _name(label: Any) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def _label(value: Any, key: str, where: str) -> Any:
    """A label as it stands in a row; None for none."""
    if value is None or (type(value) is int and value == NO_LABEL):
        return None
    if not isinstance(value, str | int):
        raise UserError(f"{key}: {where} holds {str(value)[:40]!r}, expected a text, an integer or a truth value")
    return value


def _value(row: Any, column: str, key: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"{key} = {column}: no column of {where}; its columns are {', '.join(map(str, row))}")
    return row[column]


def _text(row: Any, column: str, key: str, where: str) -> str:
    value = _value(row, column, key, where)
    if not isinstance(value, str | None):
        raise UserError(f"{key} = {column}: {where} holds {str(value)[:40]!r} there, expected text")
    return value or ""


def _list(row: Any, column: str, key: str, where: str) -> list[Any]:
    value = _value(row, column, key, where)
    if not isinstance(value, list | None):
        raise UserError(f"{key} = {column}: {where} holds {str(value)[:40]!r} there, expected a list")
    return value or []


# --- files


class _PackedFile:
    """The three files of a split, written row by row."""

    def __init__(
        self, directory: Path, split: str, vocabulary: Vocabulary, seq_len: int, classes: list[str] | None
    ) -> None:
        self._eos_id, self._seq_len = vocabulary.eos_id, seq_len
        dtypes = {"": dtype_of(vocabulary), "_labels": np.dtype("<i4"), "_segments": np.dtype("<u2")}
        self._files = [((directory / f"{split}{part}.npy").open("wb"), dtype) for part, dtype in dtypes.items()]
        self.counts = np.zeros(vocabulary.size if classes is None else len(classes), np.int64)
        """How often each label occurs: ids `[V]`, or classes."""
        self.rows = self._truncated = self._bytes = self._samples = 0
        self._waiting: list[Encoded] = []

    def __enter__(self) -> "_PackedFile":
        for file, dtype in self._files:
            write_header(file, dtype, 0)
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        for file, dtype in self._files:
            file.seek(0)
            write_header(file, dtype, self._samples * self._seq_len)
            file.close()

    def write(self, row: Encoded) -> None:
        """Put a row into the sample that is being filled, or begin another."""
        if sum(len(own.ids) for own in self._waiting) + len(row.ids) > self._seq_len:
            self._flush()
        self._waiting.append(row)
        self.rows += 1
        self._truncated += row.truncated
        self._bytes += row.bytes
        self.counts += np.bincount(row.labels[row.labels != NO_LABEL], minlength=len(self.counts))

    def facts(self) -> dict[str, int]:
        """Of what was written."""
        return {
            "tokens": int(self.counts.sum()),
            "bytes": self._bytes,
            "rows": self.rows,
            "truncated": self._truncated,
            "samples": self._samples,
        }

    def _flush(self) -> None:
        if not self._waiting:
            return
        n = self._seq_len
        ids, labels = np.full(n, self._eos_id), np.full(n, NO_LABEL)
        segments = np.full(n, len(self._waiting))
        end = 0
        for number, row in enumerate(self._waiting):
            place = slice(end, end := end + len(row.ids))
            ids[place], labels[place], segments[place] = row.ids, row.labels, number
        for (file, dtype), values in zip(self._files, (ids, labels, segments), strict=True):
            file.write(values.astype(dtype).tobytes())
        self._samples += 1
        self._waiting.clear()
