"""One training of a rack's growth: from what earlier ones have left to a window that has learned."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.artifacts.manifest import Artifact
from stackwise.cache.batches import BoundaryBatches
from stackwise.cache.boundary import Boundaries, Link, Source, check_identity
from stackwise.cache.streaming import StreamedTrunk
from stackwise.config.params import Params
from stackwise.data.tokens import Tokens, open_tokens
from stackwise.growth.assembly import Assembly, Ground, assemble
from stackwise.growth.batches import TokenBatches
from stackwise.growth.phases import Member
from stackwise.growth.stack_objectives import objective_of_stack, order_of_stack
from stackwise.growth.stacks import Training
from stackwise.growth.tuning import train_window
from stackwise.growth.validation import Validation, held_out_batches, held_out_objective
from stackwise.growth.window import Batch
from stackwise.objectives.words import Words
from stackwise.precision.trunk import TrunkStack
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import EarlyStopping, Watcher

Progress = Callable[[int, int], None]
"""Is told (rows done, rows wanted) while a boundary is made."""


@dataclass(frozen=True, kw_only=True)
class PhaseInputs:
    """What one training is given."""

    params: Params
    """A view with what `assemble`, `objective_of_stack` and the loop want."""
    stack: int
    """The stack whose parameters hold."""
    sweep: int = 0
    """0 while the rack grows; which sweep over it, from 1."""
    members: Sequence[Member]
    """The stacks of the window, bottom to top."""
    embeddings_learn: bool
    fresh: bool
    """Whether masks are fresh in each pass over the data."""
    tokens: Artifact
    trainings: Sequence[Training] = ()
    """The earlier ones that it goes on from, in the order in which they took place."""
    copies: int | None = None
    """The stack that new ones may begin as a copy of."""
    quantized: Sequence[TrunkStack] = ()
    """The stacks of the window that are frozen or learn only adapters."""
    below: Sequence[TrunkStack] = ()
    """The frozen stacks below the window, bottom to top."""
    boundary: Artifact | None = None
    """The cached boundary that stands for these; None: tokens pass through them in every step."""
    chain: Sequence[Link] = ()
    """The cached boundaries of the same stacks, up to this one."""
    known: int | None = None
    """The stack whose masks those above a new one have learned to read, where consistency with them is asked for."""

    @property
    def reads_tokens(self) -> bool:
        """Whether tokens go in, not a cached boundary."""
        return self.boundary is None


@dataclass
class TrainedPhase:
    """A window that has learned, on the CPU."""

    assembly: Assembly
    losses: list[float]
    """Of every step that was taken (nats)."""
    steps_before: int
    """Of all trainings before this one."""
    best_step: int | None
    """With early stopping: the steps after which the weights were these, the best; 0 if no validation was finite."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Write what has learned; returns the facts of the artifact."""
        steps = {"steps": len(self.losses), "steps_in_all": self.steps_before + len(self.losses)}
        facts = {**self.assembly.save(directory), **steps}
        return facts if self.best_step is None else {**facts, "best_step": self.best_step}


def train_phase(
    inputs: PhaseInputs,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    watcher: Watcher,
    progress: Progress = lambda done, wanted: None,
) -> TrainedPhase:
    """Train, from a checkpoint if there is one. The result depends on the inputs alone.

    Args:
        inputs: what there is.
        device: computes.
        checkpoints: of this training; they stay when it has ended, until its result is published.
        watcher: is told how it goes.
        progress: is told of a cached boundary that has to be made again.

    Raises:
        UserError: the inputs do not belong together, or the machine cannot do what is asked.
    """
    params, own = inputs.params, inputs.params.stack_params(inputs.stack)
    tokens = open_tokens(inputs.tokens, params.seq_len)
    trunk = None
    if inputs.below and inputs.reads_tokens:
        trunk = streamed_trunk(inputs, device, resident=params.activations.trunk == "resident")
    older = any(member.role in ("weights", "adapters") for member in inputs.members)
    assembly = assemble(
        params,
        inputs.members,
        Ground(inputs.trainings, {stack.index: stack for stack in inputs.quantized}, inputs.copies, trunk),
        vocab_size=tokens.vocabulary.size,
        embeddings_learn=inputs.embeddings_learn,
        reads_tokens=inputs.reads_tokens,
        unfreeze_steps=round(params.growth.unfreeze * own.steps) if older else 0,
        consistency=0.0 if inputs.known is None else params.growth.consistency,
        device=device,
    )
    from_tokens = token_batches(inputs, tokens)
    objective = from_tokens.objective
    stopping = None
    if own.stop_every is not None:
        validation = Validation(
            assembly.window,
            _held_out(inputs, tokens, trunk, device),
            causal=objective.causal,
            device=device,
            dtype=params.compute.dtype,
        )
        stopping = EarlyStopping(validation.loss, own.stop_every, own.patience)
    with phase_batches(inputs, tokens, from_tokens, device=device, progress=progress) as batches:
        losses = train_window(
            params,
            assembly.window,
            batches,
            causal=objective.causal,
            steps=own.steps,
            lr=own.lr,
            lrs=assembly.rates(params.adapters) if assembly.adapters else {},
            stopping=stopping,
            device=device,
            checkpoints=checkpoints,
            watcher=watcher,
        )
    assembly.window.cpu()
    before = inputs.trainings[-1].artifact.facts["steps_in_all"] if inputs.trainings else 0
    return TrainedPhase(assembly, losses, before, None if stopping is None else stopping.best.step)


def token_batches(inputs: PhaseInputs, tokens: Tokens) -> TokenBatches:
    """What each step of a training sees, where tokens go into the window.

    Raises:
        UserError: there is not even one batch of samples that share t.
    """
    params, time, vocabulary = inputs.params, inputs.params.model.time, tokens.vocabulary
    objective_of = partial(
        objective_of_stack,
        params,
        time=time,
        tokens=tokens.train,
        mask_id=vocabulary.mask_id,
        words=Words(tokens.word_starts, vocabulary.eos_id),
        fresh=inputs.fresh,
    )
    objective = objective_of(k=inputs.stack, sweep=inputs.sweep)
    return TokenBatches(
        tokens.train,
        order_of_stack(params, inputs.stack, time, len(tokens.train), sweep=inputs.sweep),
        objective,
        params.stack_params(inputs.stack).batch_size,
        params.optimizer.accumulate,
        vocabulary.eos_id if params.model.document_mask else None,
        None if inputs.fresh else objective.variants,
        None if inputs.known is None else objective_of(k=inputs.known),
    )


@contextmanager
def phase_batches(
    inputs: PhaseInputs, tokens: Tokens, from_tokens: TokenBatches, *, device: torch.device, progress: Progress
) -> Iterator[Callable[[int], Sequence[Batch]]]:
    """What each step of a training sees; a cached boundary is open meanwhile, and made again where it is gone.

    Args:
        inputs: of the training.
        tokens: its tokens, open.
        from_tokens: its `token_batches`.
        device: computes what is missing of a boundary.
        progress: is told of that.

    Raises:
        UserError: the boundary is another than that of the inputs, or does not fit the byte budget.
    """
    if inputs.boundary is None:
        yield from_tokens
        return
    source = boundary_source(inputs, tokens)
    check_identity(inputs.boundary, source)
    with Boundaries(source, device=device, progress=progress).open() as reader:
        yield BoundaryBatches(from_tokens, reader, from_tokens.objective.variants)


def _held_out(inputs: PhaseInputs, tokens: Tokens, trunk: StreamedTrunk | None, device: torch.device) -> list[Batch]:
    """What the window is validated on; what the frozen stacks below it make of that is computed now, and kept."""
    params, own, keep = inputs.params, inputs.params.stack_params(inputs.stack), torch.float32
    if inputs.below:
        trunk = trunk or streamed_trunk(inputs, device, resident=False)
        if params.trunk.activations != "fp32":
            keep = torch.bfloat16  # holds what the other formats hold
    return held_out_batches(
        tokens,
        held_out_objective(params.objective, tokens, params.seed),
        samples=own.stop_samples,
        batch_size=own.batch_size,
        document_mask=params.model.document_mask,
        trunk=trunk,
        device=device,
        keep=keep,
    )


def boundary_source(inputs: PhaseInputs, tokens: Tokens) -> Source:
    """What determines the boundary that a training reads."""
    return Source.of(inputs.params, inputs.tokens, tokens, inputs.below, inputs.chain)


def streamed_trunk(inputs: PhaseInputs, device: torch.device, *, resident: bool) -> StreamedTrunk:
    """The frozen stacks below a window, for tokens to pass through."""
    params = inputs.params
    return StreamedTrunk(
        inputs.below,
        compute=params.trunk.compute or params.compute.dtype,
        activations=params.trunk.activations,
        device=device,
        resident=resident,
    )
