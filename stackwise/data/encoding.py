"""From a corpus to token files. `tokens`, which reads them, is apart: training depends on that alone.

Documents that are token ids with labels, for targets of one's own, become token files beside files of labels, position
by position. An id may be any of the tokenizer's, the mask token too; a label is one of a text's ids, or -100 where
nothing is to be predicted. Whoever makes the data decides what a position predicts: labels of next tokens come shifted,
those of masked tokens stand where the mask token does.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from stackwise.config.data import TokenizerParams
from stackwise.data.corpus import SPLITS, read_documents, read_labelled_documents
from stackwise.data.tokenizer import build_tokenizer, encode, save_tokenizer, vocabulary_of
from stackwise.data.tokens import TOKENIZER, WORD_STARTS, Vocabulary
from stackwise.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100
"""What stands where a document has no label, as in the data of Hugging Face's models."""
BATCH_DOCUMENTS = 256
BATCH_CHARS = 256 * 1024
"""A batch is encoded when it has this many characters or `BATCH_DOCUMENTS` documents."""


def write_token_dataset(
    corpus: Path, directory: Path, params: TokenizerParams, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Build the tokenizer from a corpus and encode the corpus with it.

    Writes `tokenizer/`, `train.npy`, `validation.npy`, `counts.npy` (how often each id occurs in train, `[V]` int64)
    and `word_starts.npy` (which ids begin a word, `[V]` bool).

    Args:
        corpus: directory that `write_corpus` has filled.
        directory: where the files go; it exists.
        params: the section `tokenizer`.
        progress: called now and then with the number of documents of a split encoded so far.

    Returns:
        `{"vocab_size", "mask_id", "eos_id", "train": {"tokens", "bytes"}, "validation": {...}}`.

    Raises:
        UserError: a pretrained tokenizer cannot be loaded or used.
    """
    tokenizer = build_tokenizer(params, partial(read_documents, corpus / "train.jsonl"))
    facts = _write_vocabulary(tokenizer, directory)
    for split in SPLITS:
        documents = read_documents(corpus / f"{split}.jsonl")
        facts[split], counts = write_tokens(tokenizer, documents, directory / f"{split}.npy", progress)
        if split == "train":
            np.save(directory / "counts.npy", counts)
    return facts


def write_labelled_dataset(
    corpus: Path, directory: Path, params: TokenizerParams, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Turn a corpus of token ids with labels into token files.

    Writes what `write_token_dataset` does and `train_labels.npy`, `validation_labels.npy` (int32). The end-of-text id
    stands after each document, without a label. `counts.npy` counts the labels of train.

    Args:
        corpus: directory that `write_labelled_corpus` has filled.
        directory: where the files go; it exists.
        params: the section `tokenizer`: one that is not trained, whose ids the documents are made of.
        progress: called now and then with the number of documents of a split written so far.

    Returns:
        As `write_token_dataset`, with `"labelled": True`; the bytes are those of the decoded ids.

    Raises:
        UserError: a document holds ids or labels that the tokenizer does not have, or a pretrained tokenizer cannot be
            loaded or used.
    """
    tokenizer = build_tokenizer(params, lambda: iter(()))
    facts = _write_vocabulary(tokenizer, directory)
    vocabulary = vocabulary_of(tokenizer)
    for split in SPLITS:
        documents = _checked(read_labelled_documents(corpus / f"{split}.jsonl"), vocabulary, split)
        n_tokens = n_bytes = 0
        counts = np.zeros(vocabulary.size, np.int64)
        with (
            (directory / f"{split}.npy").open("wb") as of_ids,
            (directory / f"{split}_labels.npy").open("wb") as of_labels,
        ):
            parts = ((of_ids, dtype_of(vocabulary)), (of_labels, np.dtype("<i4")))
            for file, dtype in parts:
                write_header(file, dtype, 0)
            for number, document in enumerate(documents, start=1):
                for (file, dtype), values in zip(parts, document, strict=True):
                    file.write(values.astype(dtype).tobytes())
                ids, labels = document
                n_tokens += len(ids)
                n_bytes += len(str(tokenizer.decode(ids[:-1][ids[:-1] < vocabulary.size].tolist())).encode())
                counts += np.bincount(labels[labels >= 0], minlength=vocabulary.size)
                if progress and number % BATCH_DOCUMENTS == 0:
                    progress(number)
            for file, dtype in parts:
                file.seek(0)
                write_header(file, dtype, n_tokens)
        facts[split] = {"tokens": n_tokens, "bytes": n_bytes}
        if split == "train":
            np.save(directory / "counts.npy", counts)
    return {**facts, "labelled": True}


def _checked(
    documents: Iterator[tuple[list[int], list[int]]], vocabulary: Vocabulary, split: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The ids and labels of each document, with the end of a text after it, if the tokenizer has them."""
    known_ids = f"0 to {vocabulary.mask_id}, which is the mask's"
    known_labels = f"0 to {vocabulary.size - 1}, or {NO_LABEL} for none"
    for number, document in enumerate(documents):
        ids, labels = (np.array(values, np.int64) for values in document)
        for what, values, allowed, expected in (
            ("the id", ids, (ids >= 0) & (ids <= vocabulary.mask_id), known_ids),
            ("the label", labels, (labels >= 0) & (labels < vocabulary.size) | (labels == NO_LABEL), known_labels),
        ):
            if not allowed.all():
                raise UserError(
                    f"data.ids_column, data.labels_column: document {number} of the {split} split, which begins with "
                    f"{ids[:8].tolist()}, has {what} {values[~allowed][0]}, expected {expected}; encode the documents "
                    "with the tokenizer that tokenizer.type and tokenizer.name say"
                )
        yield np.append(ids, vocabulary.eos_id), np.append(labels, NO_LABEL)


def _write_vocabulary(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> dict[str, Any]:
    """Save a tokenizer and what training must know of it; returns the facts of its ids."""
    save_tokenizer(tokenizer, directory / TOKENIZER)
    np.save(directory / WORD_STARTS, word_starts(tokenizer))
    vocabulary = vocabulary_of(tokenizer)
    return {"vocab_size": vocabulary.size, "mask_id": vocabulary.mask_id, "eos_id": vocabulary.eos_id}


def word_starts(tokenizer: "PreTrainedTokenizerBase") -> NDArray[np.bool_]:
    """Which ids begin a word: those that, after a letter, begin with anything but a letter or digit.

    So white space and punctuation begin words; `##` pieces and the inner bytes of a letter do not; the end of a text
    does.

    Args:
        tokenizer: of `build_tokenizer`.

    Returns:
        `[V]`.
    """
    vocabulary = vocabulary_of(tokenizer)
    before, as_it_is = encode(tokenizer, ["a"])[0], {"clean_up_tokenization_spaces": False}
    prefix = len(str(tokenizer.decode(before, **as_it_is)))
    texts = tokenizer.batch_decode([[*before, i] for i in range(vocabulary.size)], **as_it_is)
    starts = np.array([_begins_word(text[prefix : prefix + 1]) for text in texts])
    starts[vocabulary.eos_id] = True
    return starts


def _begins_word(first: str) -> bool:
    """Whether a word begins with a character; the replacement character stands for a part of one."""
    return bool(first) and not first.isalnum() and first != "\ufffd"


def write_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterator[str],
    path: Path,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Encode documents, each followed by the end-of-text id, into a 1-D .npy.

    Its type is uint16, or uint32 if V > 65535. Memory holds one batch at a time.

    Args:
        tokenizer: of `build_tokenizer`.
        documents: cleaned documents.
        path: the file to write.
        progress: called after each batch with the number of documents so far.

    Returns:
        `{"tokens", "bytes"}` (the bytes are the documents' in UTF-8), and how often each id occurs, `[V]`.

    Raises:
        UserError: the tokenizer gives a text an id that is none of a text's.
    """
    vocabulary = vocabulary_of(tokenizer)
    dtype = dtype_of(vocabulary)
    counts = np.zeros(vocabulary.size, np.int64)
    n_documents = n_bytes = 0
    with path.open("wb") as file:
        write_header(file, dtype, 0)
        for batch in _batches(documents):
            encoded = [i for ids in encode(tokenizer, batch) for i in (*ids, vocabulary.eos_id)]
            ids = np.array(encoded, np.int64)
            if ids.max() >= vocabulary.size:
                raise UserError(
                    f"tokenizer.name = {tokenizer.name_or_path}: gives a text the id {ids.max()}, expected "
                    f"ids below {vocabulary.size}, which is the mask's; use another tokenizer or train one "
                    "(tokenizer.type: bpe)"
                )
            counts += np.bincount(ids, minlength=vocabulary.size)
            file.write(ids.astype(dtype).tobytes())
            n_bytes += sum(len(text.encode()) for text in batch)
            n_documents += len(batch)
            if progress:
                progress(n_documents)
        n_tokens = int(counts.sum())
        file.seek(0)
        write_header(file, dtype, n_tokens)
    return {"tokens": n_tokens, "bytes": n_bytes}, counts


def dtype_of(vocabulary: Vocabulary) -> np.dtype[Any]:
    """The smallest unsigned type that holds all ids."""
    return np.dtype("<u2" if vocabulary.mask_id < 2**16 else "<u4")


def write_header(file: BinaryIO, dtype: np.dtype[Any], n: int) -> None:
    """Header of a 1-D array of `n` elements; numpy pads it so that its length does not depend on `n`."""
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)}
    npy.write_array_header_1_0(file, header)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
