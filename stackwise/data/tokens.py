"""Token files: a 1-D .npy of ids for each split, perhaps of labels and segments, cut into samples without copying."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stackwise.artifacts.manifest import Artifact
from stackwise.errors import UserError

KIND = "tokens"
TOKENIZER, WORD_STARTS = "tokenizer", "word_starts.npy"


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a tokenizer."""

    size: int
    """V: number of ids that a text can have, with the end of a text."""
    eos_id: int
    """The id that stands after every document."""

    @property
    def mask_id(self) -> int:
        """Id of the mask token, the one after those of texts."""
        return self.size


class TokenDataset:
    """Consecutive samples of equal length in a token file, which stays on disk; the rest is left out."""

    def __init__(self, path: Path, seq_len: int, labels: Path | None = None, segments: Path | None = None) -> None:
        """Open a token file.

        Args:
            path: a 1-D .npy of ids.
            seq_len: tokens of a sample.
            labels: one of the same length with the label of each position, -100 where there is none.
            segments: likewise, with the number of each position's row where whole rows are packed into samples.

        Raises:
            UserError: the file holds not even one sample.
        """
        tokens = np.load(path, mmap_mode="r")
        n = len(tokens) // seq_len
        if n == 0:
            raise UserError(
                f"seq_len = {seq_len}: {path} has only {len(tokens)} tokens, not enough for one sample; "
                "lower seq_len or give more text"
            )
        self.seq_len = seq_len
        self._samples = tokens[: n * seq_len].reshape(n, seq_len)
        self._labels, self._segments = (
            None if file is None else np.load(file, mmap_mode="r")[: n * seq_len].reshape(n, seq_len)
            for file in (labels, segments)
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def samples(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The samples `indices`, `[n, seq_len]`."""
        samples: NDArray[np.int64] = self._samples[indices].astype(np.int64)
        return samples

    def labels(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The labels of the samples `indices`, `[n, seq_len]`; -100 where there is none.

        Raises:
            UserError: the documents came without labels.
        """
        if self._labels is None:
            raise UserError("data.labels_column = null: the corpus has no labels, which objective.type custom needs")
        labels: NDArray[np.int64] = self._labels[indices].astype(np.int64)
        return labels

    @property
    def packed(self) -> bool:
        """Whether its samples are rows that do not see each other, packed whole, with labels."""
        return self._segments is not None

    def segments(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """The number of each position's row in the samples `indices` `[n, seq_len]`, where rows are packed; what fills
        a sample up has a number of its own."""
        assert self._segments is not None, "no rows are packed here"
        segments: NDArray[np.int64] = self._segments[indices].astype(np.int64)
        return segments


@dataclass(frozen=True)
class Tokens:
    """A tokens artifact, open."""

    train: TokenDataset
    validation: TokenDataset
    vocabulary: Vocabulary
    counts: NDArray[np.int64]
    """How often each id occurs in the training tokens, or among their labels where these are given, `[V]`."""
    bytes_per_token: float
    """UTF-8 bytes of the validation documents by their tokens (ends of texts are tokens of no bytes)."""
    tokenizer: Path
    """Directory for `AutoTokenizer.from_pretrained`."""

    @property
    def word_starts(self) -> NDArray[np.bool_]:
        """Which ids begin a word, `[V]`."""
        starts: NDArray[np.bool_] = np.load(self.tokenizer.with_name(WORD_STARTS))
        return starts


def open_tokens(artifact: Artifact, seq_len: int) -> Tokens:
    """Open a tokens artifact for samples of `seq_len` tokens.

    Raises:
        UserError: a split holds not even one sample, or rows were packed into samples of another length.
    """
    facts = artifact.facts
    if facts.get("packed", seq_len) != seq_len:
        raise UserError(
            f"seq_len = {seq_len}: {artifact.path} holds rows packed into samples of {facts['packed']} tokens; run "
            "`dvc repro` or `snakemake`, which pack them again"
        )

    def split(name: str) -> TokenDataset:
        labels = artifact.path / f"{name}_labels.npy" if facts.get("labelled") else None
        segments = artifact.path / f"{name}_segments.npy" if facts.get("packed") else None
        return TokenDataset(artifact.path / f"{name}.npy", seq_len, labels, segments)

    return Tokens(
        train=split("train"),
        validation=split("validation"),
        vocabulary=Vocabulary(size=facts["vocab_size"], eos_id=facts["eos_id"]),
        counts=np.load(artifact.path / "counts.npy"),
        bytes_per_token=facts["validation"]["bytes"] / facts["validation"]["tokens"],
        tokenizer=artifact.path / TOKENIZER,
    )
