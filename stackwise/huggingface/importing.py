"""A checkpoint as a rack, or as the first stacks of one. Weights go from file to file a piece at a time."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from stackwise.config.data import TokenizerParams
from stackwise.config.params import Params
from stackwise.data.tokenizer import build_tokenizer, save_tokenizer, vocabulary_of
from stackwise.errors import UserError
from stackwise.growth.racks import SHAPE, TOKENIZER, WEIGHTS
from stackwise.growth.stacks import EMBEDDINGS, HEAD, stack_file
from stackwise.huggingface import native
from stackwise.huggingface.checkpoint import Checkpoint, open_start
from stackwise.huggingface.tensors import Held, Source, Stored, read_tensors, write_tensors
from stackwise.model.rack import RackShape, empty_rack

_IGNORED = (".rotary_emb.inv_freq",)
"""How tensors end that old checkpoints hold, though they follow from the configuration."""


def import_rack(checkpoint: Checkpoint, directory: Path, *, blocks: Iterable[int], tokenizer: str) -> dict[str, Any]:
    """Write a checkpoint as a rack, which predicts the next token; returns the facts of the artifact.

    Args:
        checkpoint: of a model.
        directory: where the rack's files go; it exists.
        blocks: of each stack, bottom to top; all of the model's.
        tokenizer: a directory, or a name in the hub's local cache.

    Raises:
        UserError: the tokenizer does not fit the model, or the checkpoint is not what its configuration says.
    """
    built = build_tokenizer(TokenizerParams(type="pretrained", vocab_size=None, name=tokenizer), lambda: iter(()))
    shape = RackShape.of(checkpoint.model, tuple(blocks), vocabulary_of(built).size)
    save_tokenizer(built, directory / TOKENIZER)
    weights = rack_weights(checkpoint, shape)
    write_tensors(directory / WEIGHTS, weights, torch.float32)
    (directory / SHAPE).write_text(json.dumps(shape.to_json(), indent=1, sort_keys=True) + "\n")
    imported = {"config": checkpoint.config, "generation_config": checkpoint.generation, "dtype": checkpoint.dtype}
    return {
        "shape": shape.to_json(),
        "parameters": sum(prod(tensor.shape) for tensor in weights.values()),
        "steps": 0,
        **{"objective": "clm", "causal": True, "seq_len": checkpoint.length},
        # What it says fits the model only while its vocabulary is the same.
        **({"imported": imported} if shape.vocab_size == checkpoint.config["vocab_size"] else {}),
    }


def import_stacks(params: Params, directory: Path, *, vocab_size: int) -> dict[str, Any]:
    """Write the model that growth starts with as a training of its stacks; returns the facts that `Training` reads.

    Args:
        params: with model, stack.blocks, stacks and growth.start.
        directory: where the files go; it exists.
        vocab_size: V of the tokens.

    Raises:
        UserError: the model is not what the parameters or its own configuration say.
    """
    checkpoint, stacks = open_start(params), range(params.growth.imported)
    shapes = [
        RackShape.of(params.stack_model(k), [params.stack_params(k).blocks], vocab_size).stacks[0] for k in stacks
    ]
    shape = replace(RackShape.of(params.stack_model(0), [], vocab_size), stacks=tuple(shapes))
    weights = rack_weights(checkpoint, shape)

    def part(prefix: str) -> dict[str, Source]:
        return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}

    for k in stacks:
        write_tensors(directory / stack_file(k), part(f"stacks.{k}."), torch.float32)
    write_tensors(directory / HEAD, part("head."), torch.float32)
    write_tensors(directory / EMBEDDINGS, part("embeddings."), torch.float32)
    facts = {"stacks": list(stacks), "adapters": {}, "embeddings": True, "shape": shape.to_json()}
    return {**facts, "steps": 0, "steps_in_all": 0}


def rack_weights(checkpoint: Checkpoint, shape: RackShape) -> dict[str, Source]:
    """The weights of a rack, by our names, from a checkpoint. The mask token, which that lacks, begins as the mean of
    all rows. Rows of the vocabulary beyond the tokenizer's ids are left out.

    Raises:
        UserError: the checkpoint lacks a tensor, or has one that the architecture does not have.
    """
    source, held = checkpoint.source, _tensors(checkpoint.files)
    meta = empty_rack(shape).state_dict()
    names = native.names(shape, meta)
    found: dict[str, Source] = {}
    for ours, theirs in names.items():
        if theirs not in held:
            raise UserError(f"{source}: holds no {theirs}, which its config.json asks for; get the model again")
        tensor, wanted = held[theirs], tuple(meta[ours].shape)
        if ours in ("embeddings.table", "head.projection.weight") and tensor.shape[0] > wanted[0]:
            tensor = tensor.rows(wanted[0])
        if tensor.shape != wanted:
            hint = ": its tokenizer has more ids than it has rows" if len(wanted) == 2 and "table" in ours else ""
            raise UserError(f"{source}: {theirs} is {list(tensor.shape)}, expected {list(wanted)}{hint}")
        found[ours] = tensor
    known = {*names.values(), *(["lm_head.weight"] if shape.model.tie_embeddings else [])}
    for theirs in sorted(held.keys() - known):
        if not theirs.endswith(_IGNORED):
            raise UserError(f"{source}: holds {theirs}, which no architecture here has")
    table = held[names["embeddings.table"]].rows(shape.vocab_size)
    found["embeddings.mask"] = Held(_mean_row(table))
    return found


def _mean_row(table: Stored) -> torch.Tensor:
    """Of a matrix, `[1, width]` fp32."""
    return table.load().float().mean(dim=0, keepdim=True)


def _tensors(files: Iterable[Path]) -> Mapping[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        found |= read_tensors(file)
    return found
