"""Input embeddings and output heads taken from another model.

A source is a directory or a hub repository with safetensors; of all that it holds one matrix is read, without building
its model. Importing this imports no torch: what does not fit is found before anything runs.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from stackwise.config.model import ModelParams, PretrainedParams
from stackwise.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
NAMES = {
    "embed_tokens": ("embed_tokens.weight", "wte.weight", "word_embeddings.weight"),
    "lm_head": ("lm_head.weight",),
}
"""How the names of a model's matrices end: those of Llama and its relatives, of GPT-2, of BERT."""
_NUMBERS = ("F64", "F32", "F16", "BF16")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class PretrainedMatrix:
    """A matrix of another model: a row for each of its token ids."""

    key: str
    """Of the section that asks for it: `model.embeddings` or `model.head`."""
    params: PretrainedParams
    file: Path
    """The safetensors file that holds it."""
    name: str
    """Its name there."""
    rows: int
    width: int

    def check_width(self, d_model: int) -> None:
        """See to it that there is an adapter where there must be one, and nowhere else.

        Raises:
            UserError: there is not.
        """
        hidden, key = self.params.adapter_hidden, f"{self.key}.adapter_hidden"
        if hidden is None and self.width != d_model:
            raise UserError(
                f"{key} = null: {self.name} of {self.params.source} has width {self.width}, model.d_model is {d_model};"
                f" give the hidden width of an adapter between them, or set model.d_model to {self.width}"
            )
        if hidden is not None and self.width == d_model:
            raise UserError(
                f"{key} = {hidden}: {self.name} of {self.params.source} has the width of model.d_model ({d_model}) and "
                "needs no adapter; set it to null"
            )

    def read(self, vocab_size: int) -> "Tensor":
        """The rows of ids 0 ... V - 1, `[vocab_size, width]` fp32; nothing else is read from the disk.

        Raises:
            UserError: there are fewer.
        """
        import torch

        if self.rows < vocab_size:
            raise UserError(
                f"{self.key}.source = {self.params.source}: {self.name} has {self.rows} rows, the tokenizer has "
                f"{vocab_size} ids; take a source that belongs to the tokenizer"
            )
        with safe_open(self.file, framework="pt") as file:
            matrix: Tensor = file.get_slice(self.name)[:vocab_size]
        return matrix.to(torch.float32)


def find_matrices(model: ModelParams, *, download: bool = True) -> list[PretrainedMatrix]:
    """The matrices that a model takes from others, each of a width that fits.

    Args:
        model: the architecture.
        download: whether to look on the hub too; otherwise sources there are left out.

    Raises:
        UserError: a source cannot be used.
    """
    sections = {"model.embeddings": model.embeddings, "model.head": model.head}
    found = []
    for key, params in sections.items():
        if params.source is not None and (download or not is_on_hub(params.source)):
            matrix = find_matrix(key, params)
            matrix.check_width(model.d_model)
            found.append(matrix)
    return found


def vocabulary_widths(model: ModelParams) -> dict[str, int]:
    """`embedding_width` and `head_width` of a `RackShape`, of those that come from another model.

    Raises:
        UserError: a source cannot be used.
    """
    names = {"model.embeddings": "embedding_width", "model.head": "head_width"}
    return {names[matrix.key]: matrix.width for matrix in find_matrices(model)}


def is_on_hub(source: str) -> bool:
    """Whether a source is no directory, but might be the name of a repository."""
    return not Path(source).is_dir() and _HUB_NAME.fullmatch(source) is not None


def find_matrix(key: str, params: PretrainedParams) -> PretrainedMatrix:
    """The matrix that a section asks for; from the hub come its file and what leads to it.

    A model without `lm_head` has its head tied to the input embedding, which then serves.

    Args:
        key: `model.embeddings` or `model.head`, for messages.
        params: that section, with a source.

    Raises:
        UserError: there is no such source, or it holds no such matrix in safetensors.
    """
    assert params.source is not None
    what = f"{key}.source = {params.source}"
    directory = _directory(what, params.source)
    places = _places(what, params.source, directory)
    names = _names_of(params.tensor, places)
    if not names and params.tensor == "lm_head" and _may_be_tied(what, directory):
        names = _names_of("embed_tokens", places)
    if len(names) != 1:
        endings = ", ".join(NAMES[params.tensor])
        held = f"holds several: {', '.join(names)}" if names else "holds none"
        raise UserError(
            f"{key}.tensor = {params.tensor}: expected one matrix in {params.source} whose name ends in {endings}; "
            f"it {held}"
        )
    (name,) = names
    file = directory / places[name]
    if is_on_hub(params.source):
        _download(what, params.source, places[name])
    with _opened(what, file) as content:
        if name not in set(content.keys()):
            raise UserError(f"{what}: {file.name} lacks {name}, which its index says it holds; get the source again")
        part = content.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
    if len(shape) != 2 or dtype not in _NUMBERS:
        raise UserError(
            f"{what}: {name} holds {dtype} {shape}, expected a matrix of {', '.join(_NUMBERS)}; take a source that is "
            "not quantized"
        )
    return PretrainedMatrix(key, params, file, name, *shape)


def _directory(what: str, source: str) -> Path:
    """Where a source lies on this disk; of one on the hub so far only what says where its matrices are."""
    if not is_on_hub(source):
        if not Path(source).is_dir():
            raise UserError(f"{what}: no such directory; give one that holds a model, or a hub name")
        return Path(source)
    return _download(what, source, CONFIG, INDEX)


def _download(what: str, source: str, *files: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # the network and the hub fail in their own ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{what}: no directory here, and cannot be had from the hub ({reason}); give a directory that holds a "
            "model, or a hub name and a network"
        ) from error


def _places(what: str, source: str, directory: Path) -> dict[str, str]:
    """The names of all tensors of a model, each with the file that holds it."""
    if (directory / INDEX).is_file():
        index = _json(what, directory / INDEX).get("weight_map")
        if isinstance(index, dict) and all(isinstance(file, str) for file in index.values()):
            return index
        raise UserError(f"{what}: {INDEX} has no map of weights to files; get the source again")
    if is_on_hub(source):
        _download(what, source, WEIGHTS)
    if not (directory / WEIGHTS).is_file():
        others = sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".h5", ".gguf"))
        held = f"only {others[0]}, which is not read: it may run code" if others else "none of them"
        raise UserError(
            f"{what}: expected {WEIGHTS}, or {INDEX} and its files; there is {held}; save the model with "
            "`save_pretrained` of transformers, or take a source that has them"
        )
    with _opened(what, directory / WEIGHTS) as content:
        return dict.fromkeys(content.keys(), WEIGHTS)


def _names_of(tensor: str, places: dict[str, str]) -> list[str]:
    return sorted(name for name in places if f".{name}".endswith(tuple(f".{end}" for end in NAMES[tensor])))


def _may_be_tied(what: str, directory: Path) -> bool:
    """Whether a model does not say that its head is one of its own."""
    file = directory / CONFIG
    return not file.is_file() or _json(what, file).get("tie_word_embeddings") is not False


def _json(what: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{what}: {file.name} is not readable as JSON; get the source again")
    return content


def _opened(what: str, file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: {file.name} is missing or damaged ({error}); get the source again") from None
