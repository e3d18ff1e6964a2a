"""A small rack with weights that say something, and data of as many ids."""

from pathlib import Path

import numpy as np
import torch

from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.data.tokens import TokenDataset, Tokens, Vocabulary
from stackwise.growth.init import initialize
from stackwise.model.rack import Rack, RackShape

CPU = torch.device("cpu")
VOCAB, SEQ = 17, 12
MODEL = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=24))


def new_rack(vocab: int = VOCAB) -> Rack:
    """Two stacks of a block, whose embeddings are large enough to make a difference."""
    rack = Rack(RackShape.of(MODEL, (1, 1), vocab))
    for name, part in (("embeddings", rack.embeddings), ("stacks", rack.stacks), ("head", rack.head)):
        initialize(part, name=name, seed=0)
    with torch.no_grad():
        rack.embeddings.table.mul_(30)
        rack.embeddings.mask.mul_(30)
    return rack


def tokens_of(directory: Path, samples: np.ndarray) -> Tokens:
    """Samples `[n, seq]` as both splits; a token is a byte."""
    np.save(directory / "tokens.npy", samples.reshape(-1).astype(np.uint16))
    data = TokenDataset(directory / "tokens.npy", samples.shape[1])
    return Tokens(data, data, Vocabulary(VOCAB, 0), np.ones(VOCAB, np.int64), 1.0, directory)
