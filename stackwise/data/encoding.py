"""From a corpus to token files. `tokens`, which reads them, is apart: training depends on that alone."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from stackwise.config.data import TokenizerParams
from stackwise.data.corpus import SPLITS, read_documents
from stackwise.data.tokenizer import build_tokenizer, encode, save_tokenizer, vocabulary_of
from stackwise.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 256
BATCH_CHARS = 256 * 1024
"""A batch is encoded when it has this many characters or `BATCH_DOCUMENTS` documents."""


def write_token_dataset(
    corpus: Path, directory: Path, params: TokenizerParams, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Build the tokenizer from a corpus and encode the corpus with it.

    Writes `tokenizer/`, `train.npy`, `validation.npy` and `counts.npy` (how often each id occurs in train,
    `[V]` int64).

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
    save_tokenizer(tokenizer, directory / "tokenizer")
    vocabulary = vocabulary_of(tokenizer)
    facts: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "mask_id": vocabulary.mask_id,
        "eos_id": vocabulary.eos_id,
    }
    for split in SPLITS:
        documents = read_documents(corpus / f"{split}.jsonl")
        facts[split], counts = write_tokens(tokenizer, documents, directory / f"{split}.npy", progress)
        if split == "train":
            np.save(directory / "counts.npy", counts)
    return facts


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
    dtype = np.dtype("<u2" if vocabulary.mask_id < 2**16 else "<u4")
    counts = np.zeros(vocabulary.size, np.int64)
    n_documents = n_bytes = 0
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
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
        _write_header(file, dtype, n_tokens)
    return {"tokens": n_tokens, "bytes": n_bytes}, counts


def _write_header(file: BinaryIO, dtype: np.dtype[Any], n: int) -> None:
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
