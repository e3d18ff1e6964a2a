"""Training several layers of a rack together."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from stackwise.errors import UserError
from stackwise.growth.tuning import train_window
from stackwise.growth.window import Window
from stackwise.interactive.building import ProgressiveRackBuilder
from stackwise.interactive.configuring import StackWiseConfig
from stackwise.interactive.loading import ProgressiveDataLoader
from stackwise.interactive.watching import Silent
from stackwise.model.rack import Rack
from stackwise.precision.stored import StoredLinear
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.device import set_up
from stackwise.training.loop import Watcher

ALL = "all"


class UnifiedTrainer:
    """Trains any layers of a rack together, whatever the regime in which it has grown."""

    def __init__(self, config: StackWiseConfig, rack: Rack | None = None) -> None:
        """
        Args:
            config: optimizer, compute, and the learning rate of stacks.
            rack: what trains, in place (None: a new one of `n_stacks` stacks, made when training begins).
        """
        self._config = config
        self.rack = rack

    def train_all_layers(
        self,
        dataloader: ProgressiveDataLoader,
        layers: Sequence[str] | str = ALL,
        *,
        lr: float | None = None,
        checkpoint: str | Path | None = None,
        watcher: Watcher | None = None,
    ) -> list[float]:
        """Train some layers together for the steps that the loader has left; all others are frozen meanwhile.

        Threads and determinism of the process are set as `compute` says.

        Args:
            dataloader: of tokens, or of a cached boundary: then what lies below it is passed by.
            layers: `all`, or names such as `stacks.1`, `stacks.0.blocks.1`, `head` or `embeddings`. Of a quantized
                stack its adapters learn.
            lr: peak learning rate (None: that of `stack`).
            checkpoint: file to write the state to every `checkpoint.every` steps, and to go on from (None: none).
            watcher: is told how it goes.

        Returns:
            The loss of every step (nats).

        Raises:
            UserError: a name of nothing that can learn here.
        """
        params = self._config.params
        device = set_up(params.compute, threads=params.compute.threads, seed=params.seed)
        rack = self.rack = self.rack or self._new(dataloader.vocab_size)
        done, depth = dataloader.step, dataloader.depth
        with (
            _only(_learning(rack, layers, depth), rack),
            dataloader.opened() as batches,
            tempfile.TemporaryDirectory() as directory,
        ):
            losses = train_window(
                params,
                Window(
                    list(rack.stacks)[depth:],  # type: ignore[arg-type]
                    rack.head,
                    rack.embeddings,
                    checkpointing=params.compute.activation_checkpointing,
                ),
                lambda step: batches(done + step),
                causal=dataloader.causal,
                steps=len(dataloader),
                lr=lr or params.stack.lr,
                device=device,
                checkpoints=Checkpoints(Path(checkpoint or Path(directory) / "state.safetensors")),
                watcher=watcher or Silent(),
            )
        dataloader.seek(dataloader.steps)
        rack.cpu().eval()
        return losses

    def _new(self, vocab_size: int) -> Rack:
        """A rack of all stacks of the config, as they begin."""
        builder = ProgressiveRackBuilder(self._config, vocab_size=vocab_size)
        for _ in range(self._config.params.n_stacks):
            builder.append_stack()
        return builder.build_rack()


def _learning(rack: Rack, layers: Sequence[str] | str, depth: int) -> list[nn.Parameter]:
    """The parameters that learn in some layers.

    Args:
        rack: the model.
        layers: `all` that lies above `depth`, or names.
        depth: the stacks that are passed by.

    Raises:
        UserError: a name of nothing that can learn.
    """
    parts: dict[str, nn.Module] = {} if depth else {"embeddings": rack.embeddings}
    for k, stack in list(enumerate(rack.stacks))[depth:]:
        parts[f"stacks.{k}"] = stack
        parts |= {f"stacks.{k}.blocks.{i}": block for i, block in enumerate(stack.blocks)}  # type: ignore[arg-type]
    parts["head"] = rack.head
    names = list(parts) if layers == ALL else [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in names if name not in parts]:
        below = f" above the boundary at depth {depth}" if depth else ""
        raise UserError(f"layers = {unknown[0]}: no layer{below}; expected {ALL}, or some of {', '.join(parts)}")
    found: list[nn.Parameter] = []
    for name in names:
        own = _learnable(rack, parts[name])
        if not own and layers != ALL:
            raise UserError(
                f"layers = {name}: its weights are quantized and it has no adapters, so nothing of it can learn; "
                "build the rack with freeze_all_but_qlora(), or leave it out"
            )
        found += own
    if not found:
        raise UserError(f"layers = {layers}: expected at least one layer that can learn")
    return found


def _learnable(rack: Rack, part: nn.Module) -> list[nn.Parameter]:
    """What of a part can learn: adapters, if it is quantized; of matrices from other models only those that may."""
    if any(isinstance(module, StoredLinear) for module in part.modules()):
        return [p for name, p in part.named_parameters() if ".lora_" in name]
    model, fixed = rack.shape.model, set()
    if not model.embeddings.train:
        fixed.add(id(rack.embeddings.table))
    if not model.head.train:
        fixed.add(id(rack.head.weight))
    return [p for p in part.parameters() if id(p) not in fixed]


@contextmanager
def _only(parameters: Sequence[nn.Parameter], rack: Rack) -> Iterator[None]:
    """Of a rack only these learn, until the block ends."""
    before = [(p, p.requires_grad) for p in rack.parameters()]
    try:
        rack.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, learned in before:
            parameter.requires_grad_(learned)
