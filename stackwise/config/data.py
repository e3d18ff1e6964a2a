"""Sections `data` and `tokenizer`: where the text comes from and how it becomes token ids."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section


class DataParams(Section):
    """Where the text comes from and how it is cleaned and split."""

    source: Literal["python-docs", "files", "hub", "dummy"] = "python-docs"
    """`python-docs`: the documentation inside the running Python. `files`: `data.files`. `hub`: the data set named by
    `data.dataset`. `dummy`: seeded artificial text for smoke tests."""
    files: list[str] = Field(default=[])
    """Globs of .txt, .jsonl, .parquet or .csv files, relative to the project (source `files`)."""
    dataset: str | None = None
    """Name of a Hugging Face data set, or `name:configuration` (source `hub`)."""
    split: str = "train"
    """Split of the data set to read (source `hub`)."""
    text_column: str = "text"
    """Column of .jsonl, .parquet, .csv files and of hub data sets that holds the text."""
    ids_column: str | None = None
    """Column of .jsonl, .parquet files and of hub data sets that holds the token ids that the model sees, instead of
    text (`objective.type` custom; null: documents are text)."""
    labels_column: str | None = None
    """Column that holds as many labels: the id to predict at each position, -100 where none is (with `ids_column`)."""
    dummy_documents: int = Field(default=512, ge=2)
    """Number of documents that the generator makes (source `dummy`)."""
    max_documents: int | None = Field(default=None, ge=2)
    """Read no more than this many documents of the source (null: all)."""
    min_chars: int = Field(default=32, ge=1)
    """Documents shorter than this after cleaning are dropped (characters)."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents that is held out for validation, drawn from the seed."""

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the source."""
        found = []
        if self.source == "files" and not self.files:
            found.append(("files", "expected at least one glob, because data.source is files"))
        if self.source == "hub" and not self.dataset:
            found.append(("dataset", "expected the name of a data set, because data.source is hub"))
        if self.source != "files" and self.files:
            found.append(
                ("files", f"has no effect with data.source {self.source}: set data.source to files or files to []")
            )
        if self.source != "hub" and self.dataset is not None:
            found.append(
                ("dataset", f"has no effect with data.source {self.source}: set data.source to hub or dataset to null")
            )
        return [*found, *self._column_problems()]

    def _column_problems(self) -> list[tuple[str, str]]:
        found = []
        for key, other in (("ids_column", "labels_column"), ("labels_column", "ids_column")):
            if getattr(self, key) is None and getattr(self, other) is not None:
                found.append((key, f"expected the name of a column, because data.{other} is given"))
        if self.ids_column is None:
            return found
        if self.source not in ("files", "hub"):
            found.append(("ids_column", f"no column of data.source {self.source}: expected the source files or hub"))
        for key in ("text_column", "min_chars"):
            if getattr(self, key) != type(self).model_fields[key].default:
                found.append((key, "has no effect with data.ids_column, which stands for the text: leave it out"))
        return found


class TokenizerParams(Section):
    """How text becomes token ids."""

    type: Literal["bpe", "byte", "char", "pretrained"] = "bpe"
    """`bpe`: byte-level BPE trained on the corpus. `byte`: the 256 bytes. `char`: the corpus's characters.
    `pretrained`: `tokenizer.name`."""
    vocab_size: int | None = Field(default=1024, ge=2)
    """Number of token ids of a trained `bpe` tokenizer, at least 258, or the most characters that `char` keeps (null:
    all). Must be null for the others."""
    name: str | None = None
    """Local directory or hub name for `AutoTokenizer` (type `pretrained`; null: the tokenizer of the model that
    `model.embeddings.source` or `model.head.source` names)."""
    train_chars: int = Field(default=100_000_000, ge=1)
    """A trained tokenizer sees at most this many characters of the corpus."""

    @property
    def takes_along(self) -> bool:
        """Whether it is the tokenizer of the model that the embeddings or the head come from."""
        return self.type == "pretrained" and self.name is None

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the type."""
        found = []
        if self.type == "bpe" and (self.vocab_size is None or self.vocab_size < 258):
            found.append(
                ("vocab_size", "expected at least 258 for type bpe (256 bytes, the end of a text and one merge)")
            )
        if self.type in ("byte", "pretrained") and self.vocab_size is not None:
            found.append(("vocab_size", f"has no effect with tokenizer.type {self.type}: set it to null"))
        if self.type != "pretrained" and self.name is not None:
            found.append(
                ("name", f"has no effect with tokenizer.type {self.type}: set type to pretrained or name to null")
            )
        return found
