"""A training step before it runs: its operations and its peak memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from stackwise.config.training import OptimizerParams
from stackwise.plan import passes
from stackwise.plan.parts import WIDTHS, Builder, Compute, Embeddings, Head, Sizes, Stack, StackPlan, Vocabulary
from stackwise.plan.tape import FP32, GRANULARITY, Device, Flops, Kind, Meter, Storage, Tape, Tensor, Weight

_STATE_BLOCK, _LEAST_QUANTIZED = 256, 4096
"""Numbers of an 8-bit state that share a scale, and the fewest of a tensor that has such a state
(`stackwise.training.quantized_adamw`)."""
_UPDATED_AT_ONCE, _COPIES = 2**20, 5
"""Numbers that it updates at a time, and the copies in fp32 that its kernel for CPUs makes of them."""
_TARGET_BYTES = 20
"""Of a token that the loss asks for: its row, its id, its weight."""
_ID = 8
_WORKSPACES: dict[Device, int] = {"cpu": 0, "cuda": 2 * 2**25}
"""What cuBLAS takes for itself in deterministic use: 32 MiB for each thread, forwards and backwards."""


@dataclass(frozen=True)
class Step:
    """A training step of a window."""

    window: tuple[StackPlan, ...]
    """The stacks in the loop, bottom to top."""
    vocabulary: Vocabulary
    sizes: Sizes
    """Of a micro-batch."""
    optimizer: OptimizerParams
    compute: Compute
    below: tuple[StackPlan, ...] = ()
    """The frozen stacks that compute what goes into the window in every step, bottom to top."""
    below_stays: bool = False
    """Whether they are all in memory all the time; if not, one after another."""
    from_boundary: bool = False
    """Whether a cached boundary goes in, and no tokens."""
    boundary_bytes: int = 2
    """Of a number in the boundary, as it is read, or as what is computed below is rounded."""
    embeddings_learn: bool = False
    head_learns: bool = True
    classes: int | None = None
    """Of a classifier, whose head is one of its own: how many it tells apart."""
    embedding_term: bool = False
    """Whether there is a loss in embedding space (`objective.embedding_weight`)."""
    consistency_term: bool = False
    """Whether there is one between the lowest stack and what stood in its place (`growth.consistency`)."""
    checkpointing: bool = False
    """Whether blocks keep only what goes into them."""
    trunk_compute: Compute | None = None
    """The format of the products of quantized stacks (None: `compute`)."""
    device: Device = "cpu"
    prefetch: int = 4
    """Batches that are kept ready."""


@dataclass(frozen=True)
class Cost:
    """What it takes."""

    flops: Flops
    """Of the whole step."""
    memory: dict[Kind, int]
    """On the device at the moment of the peak (bytes)."""
    batches: int
    """Of the batches that are kept ready, in the memory of the host (bytes)."""

    @property
    def peak(self) -> int:
        """The most memory on the device (bytes): on CUDA `torch.cuda.max_memory_allocated`, on CPUs what PyTorch's
        allocator has given out. The memory of a process on a CPU is larger, for what lies idle in pieces between."""
        return sum(self.memory.values())


def cost_of_step(step: Step) -> Cost:
    """Rehearse a step with optimizer states in place, as all but the first are."""
    return _Rehearsal(step).run()


def cost_of_pass(stack: StackPlan, sizes: Sizes, compute: Compute, device: Device = "cpu") -> Cost:
    """Of a frozen stack that makes a boundary of the one below, without gradients.

    Args:
        stack: the stack.
        sizes: of what goes through at once.
        compute: the format of its products.
        device: that computes.
    """
    meter = Meter(GRANULARITY[device])
    tape = Tape(meter, compute=WIDTHS[compute], device=device)
    with tape.no_grad():
        parts = Builder(meter, device).stack(stack, compute)
        passes.stack(tape, parts, tape.new(sizes.tokens * stack.model.d_model, FP32), sizes)
    return Cost(tape.flops, dict(meter.peak), 0)


def state_bytes(weight: int, optimizer: OptimizerParams) -> int:
    """The two moments of a tensor of so many numbers."""
    if optimizer.state == "fp32" or weight < _LEAST_QUANTIZED:
        return 2 * FP32 * weight
    return 2 * (weight + FP32 * -(-weight // _STATE_BLOCK))


class _Rehearsal:
    def __init__(self, step: Step) -> None:
        self._step = step
        self._meter = meter = Meter(GRANULARITY[step.device])
        self._tape = Tape(meter, compute=WIDTHS[step.compute], device=step.device)
        self._builder = Builder(meter, step.device)
        self._trunk_compute = step.trunk_compute or step.compute
        own = step.vocabulary
        tied = own.model.tie_embeddings and step.classes is None
        used = tied or step.embedding_term or step.consistency_term
        self._embeddings = None
        if used or not (step.from_boundary or step.below):
            self._embeddings = self._builder.embeddings(own, learns=step.embeddings_learn)
        self._stacks = [self._builder.stack(plan, step.compute, self._trunk_compute) for plan in step.window]
        if step.classes is None:
            self._head = self._builder.head(own, self._embeddings, learns=step.head_learns)
        else:
            self._head = self._builder.classification_head(own.model, step.classes)
        self._trunk = self._load_trunk() if step.below and step.below_stays else None
        self._learning = _learning(*self._stacks, self._head, self._embeddings)
        self._states = [Storage(meter, state_bytes(w.size, step.optimizer), "optimizer") for w in self._learning]
        if step.optimizer.in_backward:
            for weight in self._learning:
                weight.update = partial(self._update, [weight])
        self._workspaces = Storage(meter, _WORKSPACES[step.device])

    def run(self) -> Cost:
        step, tape = self._step, self._tape
        for _ in range(min(step.optimizer.accumulate, 2)):  # the second finds gradients
            tape.flops = Flops()
            loss = self._forward()
            tape.end_autocast()
            tape.backward(loss)
            del loss
        if not step.optimizer.in_backward:
            self._update(self._learning)
        for weight in self._learning:
            weight.gradient = None
        return Cost(tape.flops.times(step.optimizer.accumulate), dict(self._meter.peak), self._batches())

    def _load_trunk(self) -> tuple[Embeddings, list[Stack]]:
        embeddings = self._builder.embeddings(self._step.vocabulary, learns=False)
        return embeddings, [self._builder.stack(plan, self._trunk_compute) for plan in self._step.below]

    def _forward(self) -> Tensor:
        """`Window.loss`."""
        step, tape = self._step, self._tape
        given = self._given()
        streams = [self._entering() if given is None else tape.cast(given, FP32)]
        for parts in self._stacks:
            streams.append(passes.stack(tape, parts, streams[-1], step.sizes, checkpointing=step.checkpointing))
        loss = passes.loss(tape, self._head, streams[-1], step.sizes)
        if step.embedding_term:
            assert self._embeddings is not None
            loss = tape.add(loss, passes.embedding_loss(tape, self._embeddings, streams[-1], step.sizes))
        if step.consistency_term:
            assert self._embeddings is not None
            loss = tape.add(loss, passes.consistency_loss(tape, self._embeddings, streams[1], step.sizes))
        return loss

    def _given(self) -> Tensor | None:
        """The boundary that goes in; on a CPU the batch itself, which counts with the batches."""
        step = self._step
        if not step.from_boundary:
            return None
        size = step.sizes.tokens * step.vocabulary.model.d_model
        if step.device == "cpu":
            return Tensor(size, step.boundary_bytes, Storage(Meter(), 0))
        return self._tape.new(size, step.boundary_bytes)

    def _entering(self) -> Tensor:
        """What goes into the window where that is no boundary."""
        if self._step.below:
            return self._through_trunk()
        assert self._embeddings is not None
        return passes.embed(self._tape, self._embeddings, self._step.sizes.tokens)

    def _through_trunk(self) -> Tensor:
        """`stackwise.cache.streaming.StreamedTrunk`."""
        step, tape = self._step, self._tape
        with tape.no_grad(), tape.autocast(WIDTHS[self._trunk_compute]):
            own = self._builder.embeddings(step.vocabulary, learns=False) if self._trunk is None else self._trunk[0]
            x = passes.embed(tape, own, step.sizes.tokens)
            del own
            for k, plan in enumerate(step.below):
                parts = self._builder.stack(plan, self._trunk_compute) if self._trunk is None else self._trunk[1][k]
                out = passes.stack(tape, parts, x, step.sizes)
                del parts
                x = tape.cast(tape.cast(out, step.boundary_bytes), FP32)
                del out
        return x

    def _update(self, weights: Iterable[Weight]) -> None:
        """The optimizer's step: what is in memory besides while a tensor changes."""
        if self._step.optimizer.state == "int8" and self._step.device == "cpu":
            for weight in weights:
                part = min(weight.size, _UPDATED_AT_ONCE) if weight.size >= _LEAST_QUANTIZED else 0
                copies = self._tape.new(_COPIES * part, FP32)
                del copies

    def _batches(self) -> int:
        step = self._step
        tokens = step.sizes.tokens
        ids = _ID * tokens * (1 + step.sizes.segments)
        inputs = step.boundary_bytes * tokens * step.vocabulary.model.d_model if step.from_boundary else 0
        one = (ids + inputs + _TARGET_BYTES * step.sizes.rows) * step.optimizer.accumulate
        return one * (step.prefetch + 1)


def _learning(*parts: Stack | Head | Embeddings | None) -> list[Weight]:
    """The weights that learn, each once."""
    found = dict.fromkeys(weight for part in parts if part is not None for weight in part)
    return [weight for weight in found if weight.learns]
