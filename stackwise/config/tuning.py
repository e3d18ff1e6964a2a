"""Section `fine_tune`: what the fused rack is adapted to, each branch by its name."""

import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from stackwise.config.growth import LoRAParams
from stackwise.config.section import Section

Format = Literal["text", "completion", "token_labels", "sequence_labels"]
Method = Literal["full", "lora", "qlora"]

LABELLED = ("token_labels", "sequence_labels")
"""The formats that a classifier learns from."""
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_TAKEN = re.compile(
    r"fused|imported|joint|depth|analysis|boundaries|choices|samples|summary|unigram|loss|rack|tune_jointly|stack_.*"
)
"""What other metrics are called."""


class OwnDataParams(Section):
    """Data of a branch's own: files or a data set, tokenized with the rack's tokenizer."""

    format: Format = "text"
    """`text`: documents, as in the corpus. `completion`: a prompt and what follows it, which alone has a loss.
    `token_labels`: words with a label each. `sequence_labels`: texts with a label each."""
    files: list[str] = Field(default=[])
    """Globs of .jsonl, .parquet or .csv files, with format `text` also .txt, relative to the project."""
    dataset: str | None = None
    """In place of files: name of a Hugging Face data set, or `name:configuration`."""
    split: str = "train"
    """Split of the data set to read."""
    validation_files: list[str] = Field(default=[])
    """Globs of the files that are held out (`[]`: a share of the rows is)."""
    validation_split: str | None = None
    """Split of the data set that is held out (null: a share of the rows is)."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the rows that is held out, drawn from the seed; equal rows fall to the same side."""
    max_rows: int | None = Field(default=None, ge=2)
    """Read no more than this many rows of each source (null: all)."""
    text_column: str = "text"
    """Column that holds the text (formats `text`, `sequence_labels`)."""
    prompt_column: str = "prompt"
    """Column that holds the prompt; it may be empty (format `completion`)."""
    completion_column: str = "completion"
    """Column that holds what follows the prompt (format `completion`)."""
    words_column: str = "words"
    """Column that holds the list of words (format `token_labels`)."""
    labels_column: str = "labels"
    """Column that holds the list of their labels: texts or integers, null or -100 where there is none (format
    `token_labels`)."""
    label_column: str = "label"
    """Column that holds the label: a text, an integer or a truth value (format `sequence_labels`)."""
    labels: list[str] = Field(default=[])
    """All labels, in the order of the classes (`[]`: those of the training rows, sorted)."""

    @property
    def packed(self) -> bool:
        """Whether rows stay whole, packed into samples, and do not see each other."""
        return self.format != "text"

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the source or the format."""
        found = []
        if bool(self.files) == (self.dataset is not None):
            found.append(("files", "expected either files or a dataset: give one of them"))
        for key, needed in (("split", "dataset"), ("validation_split", "dataset"), ("validation_files", "files")):
            if self.changed([key]) and not getattr(self, needed):
                found.append((key, f"has no effect without {needed}: leave it out"))
        if (self.validation_files or self.validation_split) and self.changed(["validation_fraction"]):
            found.append(("validation_fraction", "has no effect where the held-out rows are given: leave it out"))
        if self.validation_split == self.split:
            found.append(("validation_split", "expected another split than that of training"))
        users: dict[str, tuple[Format, ...]] = {
            "text_column": ("text", "sequence_labels"),
            "prompt_column": ("completion",),
            "completion_column": ("completion",),
            "words_column": ("token_labels",),
            "labels_column": ("token_labels",),
            "label_column": ("sequence_labels",),
            "labels": ("token_labels", "sequence_labels"),
        }
        found += [
            (key, f"has no effect with format {self.format} (it has with {', '.join(formats)}): leave it out")
            for key, formats in users.items()
            if self.format not in formats and self.changed([key])
        ]
        if self.labels and len(set(self.labels)) < max(2, len(self.labels)):
            found.append(("labels", "expected at least two labels, each once"))
        return found


class FineTuneParams(Section):
    """One branch of fine-tuning."""

    objective: Literal["clm", "mlm", "diffusion", "classification"]
    """`clm`: every next token, with causal attention. `mlm`: masked tokens at one mask rate. `diffusion`: as in
    pretraining. `classification`: labels of texts or of words, read in both directions, by a head of its own."""
    method: Method = "full"
    """What learns: all weights (`full`), low-rank adapters (`lora`), or adapters on quantized weights (`qlora`). A
    classifier's head always learns."""
    steps: int = Field(default=150, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per step, of `seq_len` tokens each; short rows are packed into one."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    stop_every: int | None = Field(default=None, ge=1)
    """Steps between two validations on the branch's held-out samples, after which training may end before its last step
    with the best weights (null: it takes all steps)."""
    patience: int = Field(default=3, ge=1)
    """Validations without an improvement after which training ends (with `stop_every`)."""
    stop_samples: int = Field(default=32, ge=1)
    """Held-out samples of a validation, spread evenly over the split (with `stop_every`)."""
    lora: LoRAParams | None = None
    """The adapters of methods `lora` and `qlora`; stack 0 is the lowest of the rack (null: every default)."""
    precision: Literal["half", "bfloat16", "int8", "fp8", "fp4", "nf4", "nvfp4"] = "nf4"
    """Format of the weights below the adapters (method `qlora`)."""
    merge: bool = True
    """Whether adapters are merged into the weights that are saved; if not, they lie beside them in PEFT's format and
    are merged when the model is loaded."""
    mask_rate: float = Field(default=0.15, gt=0, le=1)
    """Share of the tokens that is masked (objective `mlm`)."""
    unit: Literal["token", "word"] = "token"
    """What is masked: single tokens, or whole words (objective `mlm`)."""
    random_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the masked tokens that show a random token instead of the mask (objective `mlm`; BERT: 0.1)."""
    keep_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the masked tokens that show themselves (objective `mlm`; BERT: 0.1)."""
    data: OwnDataParams | None = None
    """What it learns from (null: the corpus)."""

    @property
    def adapters(self) -> LoRAParams | None:
        """The settings of its adapters, if it has any."""
        return None if self.method == "full" else self.lora or LoRAParams()

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the objective or the method."""
        found = []
        if self.stop_every is None:
            message = "has no effect without stop_every: give the steps between two validations or leave it out"
            found += [(key, message) for key in self.changed(("patience", "stop_samples"))]
        if self.method == "full":
            found += self._ineffective("with method full, which has no adapters", "lora", "merge")
        if self.method != "qlora":
            found += self._ineffective(f"with method {self.method}, which quantizes nothing", "precision")
        if self.objective != "mlm":
            keys = ("mask_rate", "unit", "random_share", "keep_share")
            found += self._ineffective(f"with objective {self.objective} (it has with mlm)", *keys)
        if self.random_share + self.keep_share > 1:
            found.append(("keep_share", f"expected at most {1 - self.random_share:g}, what random_share leaves"))
        format_ = None if self.data is None else self.data.format
        if self.objective == "classification" and format_ not in LABELLED:
            formats = " or ".join(LABELLED)
            found.append(("data", f"expected data with format {formats}, because objective is classification"))
        if self.objective != "classification" and format_ in LABELLED:
            found.append(
                (
                    "objective",
                    f"expected classification, which reads in both directions, because data.format is {format_}",
                )
            )
        return found

    def _ineffective(self, where: str, *keys: str) -> list[tuple[str, str]]:
        """Keys that say something where they mean nothing."""
        return [(key, f"has no effect {where}: leave it out") for key in self.changed(keys)]


def name_problems(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names of branches that cannot be: each names files, stages and metrics."""
    found = []
    for name in names:
        if not _NAME.fullmatch(name):
            found.append(
                (name, "expected as a name small letters, digits, `_` and `-`, a letter first: it names files")
            )
        elif _TAKEN.fullmatch(name):
            found.append((name, "expected another name: metrics of this name are those of the rack"))
    return found
