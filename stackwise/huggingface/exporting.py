"""A rack as a directory that Transformers loads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from stackwise.artifacts.manifest import MANIFEST, REMEDY, Artifact
from stackwise.errors import UserError
from stackwise.growth.racks import ADAPTERS, SHAPE, TOKENIZER, WEIGHTS
from stackwise.huggingface import native, shipped
from stackwise.huggingface.adapters import adapted_projections, write_adapters
from stackwise.huggingface.card import Card
from stackwise.huggingface.tensors import read_tensors, write_tensors
from stackwise.huggingface.tokenizer import SpecialTokens, write_tokenizer
from stackwise.model.rack import RackShape

KIND = "export"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    architecture: str
    """The class that loads it."""
    auto_class: str
    """By which Transformers finds that."""
    reasons: tuple[str, ...]
    """Why it brings code along; none: it is a class of Transformers."""
    adapters: tuple[str, ...]
    """Directories of PEFT adapters."""
    dtype: str
    """As `config.json` says it."""
    bytes: int
    """Of all weights."""


def export_rack(
    artifact: Artifact,
    directory: Path,
    *,
    name: str,
    dtype: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    commit: str | None = None,
) -> Exported:
    """Write a rack for Transformers: weights, configuration, tokenizer, model card, adapters, and code if it needs any.

    Weights go from file to file a piece at a time. Equal arguments give equal bytes.

    Args:
        artifact: the rack.
        directory: where the files go; it exists.
        name: of the model, for its card.
        dtype: format of the weights (a key of `DTYPES`); None: that of the rack, or of the model that it was imported
            from.
        metrics: what was measured of it.
        commit: of the project that made it.

    Raises:
        UserError: a file of the rack is damaged, or its manifest does not say what it has learned.
    """
    facts = artifact.facts
    if missing := {"objective", "causal", "seq_len"} - facts.keys():
        raise UserError(
            f"{artifact.path}: its manifest does not say {', '.join(sorted(missing))}, so an older version of this "
            f"project has made it; {REMEDY}"
        )
    shape = RackShape.from_json(json.loads((artifact.path / SHAPE).read_text()))
    causal, length, imported = bool(facts["causal"]), int(facts["seq_len"]), facts.get("imported")
    adapted = adapted_projections(artifact.path / ADAPTERS)
    reasons = (
        tuple(native.obstacles(shape, adapted)) if causal else (f"bidirectional attention ({facts['objective']})",)
    )
    dtype = dtype or (imported["dtype"] if imported else "fp32")
    tokens = write_tokenizer(
        artifact.path / TOKENIZER,
        directory,
        mask_id=shape.vocab_size,
        masked=not causal,
        length=None if imported else length,
    )
    stored = dict(read_tensors(artifact.path / WEIGHTS))
    if reasons:
        weights = shipped.weights_of(shape, {**stored})
        config = shipped.config_of(shape, causal=causal, length=length)
        for file, text in shipped.code_of(shape).items():
            (directory / file).write_text(text, encoding="utf-8")
    else:
        weights = native.weights_of(shape, stored)
        config = native.config_of(shape, length=length)
    config |= {"dtype": _DTYPE_NAMES[dtype]} | _ids(tokens, masked=not causal)
    generation: dict[str, Any] | None = _ids(tokens, masked=False) if causal else None
    if imported and not reasons:  # what it said then holds still, and says more
        config = imported["config"] | ({"dtype": _DTYPE_NAMES[dtype]} if dtype != imported["dtype"] else {})
        generation = imported["generation_config"]
    _write(directory / "config.json", config)
    if generation is not None:
        _write(directory / "generation_config.json", generation)
    size = write_tensors(directory / WEIGHTS, weights, DTYPES[dtype])

    def rename(path: str) -> str:
        ours = f"{path}.weight"
        theirs = f"rack.{ours}" if reasons else native.names(shape, [ours])[ours]
        return theirs.removesuffix(".weight")

    kinds = write_adapters(artifact.path / ADAPTERS, directory / ADAPTERS, rename)
    adapters = tuple(f"{ADAPTERS}/{kind}" for kind in kinds)
    auto_class = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    lineage = {"rack": artifact.digest, "inputs": dict(artifact.inputs), "params": manifest["params"]}
    card = Card(
        name=name,
        shape=shape,
        objective=facts["objective"],
        auto_class=auto_class,
        architecture=config["architectures"][0],
        reasons=reasons,
        needs=shipped.NEEDED,
        dtype=_DTYPE_NAMES[dtype],
        parameters=sum(prod(tensor.shape) for tensor in weights.values()),
        length=length,
        lineage=lineage | ({"commit": commit} if commit else {}),
        metrics=metrics,
        adapters=adapters,
    )
    (directory / "README.md").write_text(card.text(), encoding="utf-8")
    return Exported(card.architecture, auto_class, reasons, adapters, card.dtype, size)


def read_metrics(file: Path) -> dict[str, Any]:
    """What an evaluation has found.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        metrics = None
    if not isinstance(metrics, dict):
        raise UserError(f"{file}: missing or damaged (not a mapping in JSON); give a file that an evaluation wrote")
    return metrics


def _ids(tokens: SpecialTokens, *, masked: bool) -> dict[str, Any]:
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    return ids | ({"mask_token_id": tokens.mask} if masked else {})


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """As Transformers writes them."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
