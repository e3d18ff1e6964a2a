"""What every feed-forward network is, and which is built."""

from torch import nn

from stackwise.config.model import ModelParams
from stackwise.model.variants import class_of


def build_mlp(params: ModelParams) -> nn.Module:
    """The feed-forward network of one block: a module built from `ModelParams` that maps `[batch, seq, d_model]` to the
    same. One that wants a loss of its own keeps it as `balance_loss` (scalar) after a pass in training mode."""
    built: nn.Module = class_of("mlp", params.mlp.type)(params)
    return built
