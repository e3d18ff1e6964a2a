"""Which stacks are in memory, and which of them learn, in each training of a rack: every regime of growth is one list.

Stacks are numbered in the order in which they are added; `order` gives their places, bottom to top. Importing this
imports no torch: the table of stages is made from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from stackwise.config.growth import GrowthParams

Role = Literal["new", "lora", "weights", "adapters", "frozen", "initial"]
"""What a stack in the window does: `new` begins here and learns; `lora` begins here and learns only adapters; `weights`
goes on learning; `adapters`: its weights are quantized and only adapters learn; `frozen`: quantized, gradients flow
through; `initial`: likewise, but nobody has trained it yet."""
KEPT: tuple[Role, ...] = ("new", "lora", "weights")
"""Of these the weights are kept after the training."""


@dataclass(frozen=True)
class Member:
    """A stack in a window."""

    stack: int
    role: Role


@dataclass(frozen=True)
class Version:
    """A stack as earlier phases have left it."""

    stack: int
    weights: int
    """The phase that trained its weights last."""
    adapters: int | None
    """The phase that trained its adapters last; None if it has none."""


@dataclass(frozen=True)
class Phase:
    """One training."""

    number: int
    """Its place in the list of phases."""
    stack: int
    """The stack whose parameters (steps, learning rate, masks ...) it takes."""
    sweep: int
    """0 while the rack grows; sweeps over the whole rack count from 1."""
    order: tuple[int, ...]
    """The stacks of the rack after it, bottom to top."""
    window: tuple[Member, ...]
    """The stacks in the loop, bottom to top."""
    below: tuple[Version, ...]
    """The frozen stacks below the window, bottom to top."""
    cached: bool
    """Whether what they make of the data is cached on disk."""
    fresh: bool
    """Whether masks are fresh in each pass over the data; if not, `objective.variants` recur."""
    embeddings_learn: bool
    older: tuple[Version, ...]
    """The stacks of the window that there were before, as they were then."""
    copies: Version | None
    """The stack that its new stacks may begin as a copy of."""
    kept: tuple[Version, ...]
    """The stacks of `order` after it."""
    embeddings_before: int
    """The phase that had trained the embeddings last before."""
    embeddings: int
    """The phase that has trained the embeddings last, this one included."""
    rackwise: bool = False
    imported: bool = False
    """Whether its stacks come trained from another model: nothing is trained in it."""

    @property
    def label(self) -> str:
        """Of its artifact: the stack's number, with the sweep's if it is one."""
        if self.rackwise or self.imported:
            return "rack" if self.rackwise else "imported"
        return f"{self.stack}_sweep_{self.sweep}" if self.sweep else str(self.stack)

    @property
    def name(self) -> str:
        """Of its stages."""
        return self.label if self.rackwise or self.imported else f"stack_{self.label}"

    @property
    def path(self) -> str:
        """Of its artifact."""
        return f"artifacts/stacks/{self.label}"

    @property
    def boundary(self) -> str:
        """Of the artifact of the boundary that it trains on."""
        return f"artifacts/activations/{self.label}"

    @property
    def new(self) -> tuple[int, ...]:
        """The stacks that begin here."""
        return tuple(m.stack for m in self.window if m.role in ("new", "lora"))

    @property
    def quantized(self) -> tuple[Version, ...]:
        """The stacks of the window whose weights are quantized."""
        roles = {m.stack: m.role for m in self.window}
        return tuple(v for v in self.older if roles[v.stack] in ("frozen", "adapters"))

    def needs(self, *, embeddings: bool, copies: Version | None) -> set[int]:
        """The phases whose artifacts it goes on from, besides quantized stacks: the one before for the head, others for
        weights, adapters, what is copied, and on request the embeddings."""
        if not self.number:
            return set()
        roles = {m.stack: m.role for m in self.window}
        found = {self.number - 1, *(v.weights for v in self.older if roles[v.stack] == "weights")}
        found |= {v.adapters for v in self.older if v.adapters is not None and roles[v.stack] == "adapters"}
        if copies is not None:
            found.add(copies.weights)
        return found | ({self.embeddings_before} if embeddings else set())


@dataclass
class _Rack:
    """What has been trained so far."""

    order: list[int] = field(default_factory=list)
    weights: dict[int, int] = field(default_factory=dict)
    adapters: dict[int, int] = field(default_factory=dict)
    embeddings: int = 0
    phases: list[Phase] = field(default_factory=list)

    def version(self, stack: int) -> Version:
        return Version(stack, self.weights[stack], self.adapters.get(stack))


def phases(growth: GrowthParams, n_stacks: int, *, lora: bool = False) -> list[Phase]:
    """All trainings of a rack, in order.

    A phase depends on those before it alone: more stacks or sweeps add phases and leave the others as they are (but for
    a rack that is trained end to end).

    Args:
        growth: the regime.
        n_stacks: K.
        lora: whether new stacks but the first learn only a LoRA.
    """
    rack, imported = _Rack(), growth.imported
    if imported:
        rack.order = list(range(imported))
        _add(rack, growth, [Member(k, "new") for k in rack.order], stack=imported - 1, imported=True)
    if growth.strategy == "end_to_end" and growth.end_to_end_scope == "rackwise":
        rack.order = list(range(n_stacks))
        window = [Member(k, "weights" if k in rack.weights else "new") for k in rack.order]
        _add(rack, growth, window, stack=n_stacks - 1, rackwise=True)
        return rack.phases
    if growth.strategy == "end_to_end":
        rack.order = list(range(n_stacks))
    else:
        for new in _groups(imported, n_stacks, growth.stride):
            _grow(rack, growth, new, lora=lora)
    for sweep in range(1, growth.sweeps + 1):
        for place, k in enumerate(rack.order):
            above = [Member(j, "frozen" if j in rack.weights else "initial") for j in rack.order[place + 1 :]]
            own = Member(k, "weights" if k in rack.weights else "new")
            _add(rack, growth, [own, *above], stack=k, sweep=sweep)
    return rack.phases


def _groups(first_new: int, n_stacks: int, stride: int) -> Iterator[list[int]]:
    for first in range(first_new, n_stacks, stride):
        yield list(range(first, min(first + stride, n_stacks)))


def _grow(rack: _Rack, growth: GrowthParams, new: list[int], *, lora: bool) -> None:
    """Add the phase that adds `new` stacks."""
    learns: Role = {"trainable": "weights", "qlora": "adapters", "frozen": "frozen"}[growth.trunk]  # type: ignore[assignment]
    begun = [Member(k, "lora" if lora and rack.order else "new") for k in new]
    copies: int | None
    match growth.building_mode:
        case "append":
            older = rack.order[len(rack.order) - _window(growth, len(rack.order)) :]
            copies = rack.order[-1] if rack.order else None
            rack.order += new
            window = [*(Member(j, learns) for j in older), *begun]
        case "prepend":
            copies = rack.order[0] if rack.order else None
            window = [*begun, *(Member(j, learns) for j in rack.order)]
            rack.order = [*new, *rack.order]
        case "insert":
            top = rack.order[-1:]
            copies = top[0] if top else None
            window = [*begun, *(Member(j, learns) for j in top)]
            rack.order = [*rack.order[:-1], *new, *top]
    _add(rack, growth, window, stack=new[-1], copies=copies)


def _window(growth: GrowthParams, trained: int) -> int:
    """How many of the `trained` stacks stay in the window when others are appended."""
    if growth.mode == "fused":
        return trained if growth.trunk == "trainable" else 0
    return trained if growth.window is None else min(growth.window, trained)


def _add(
    rack: _Rack,
    growth: GrowthParams,
    window: list[Member],
    *,
    stack: int,
    sweep: int = 0,
    copies: int | None = None,
    rackwise: bool = False,
    imported: bool = False,
) -> None:
    number, lowest = len(rack.phases), rack.order.index(window[0].stack)
    older = tuple(rack.version(m.stack) for m in window if m.stack in rack.weights)
    copied, embeddings_before = None if copies is None else rack.version(copies), rack.embeddings
    below = tuple(rack.version(j) for j in rack.order[:lowest])
    # Embeddings learn with the stack at the bottom; prepended stacks must put out what those above them know.
    prepended = growth.building_mode == "prepend" and number > 0 and not sweep
    embeddings_learn = not below and window[0].role in KEPT and not prepended
    if embeddings_learn:
        rack.embeddings = number
    for member in window:
        if member.role in KEPT:
            rack.weights[member.stack] = number
            rack.adapters.pop(member.stack, None)
        elif member.role == "adapters":
            rack.adapters[member.stack] = number
    fused = growth.mode == "fused"
    rack.phases.append(
        Phase(
            number=number,
            stack=stack,
            sweep=sweep,
            order=tuple(rack.order),
            window=tuple(window),
            below=below,
            cached=bool(below) and not fused and growth.cache_activations is not False,
            fresh=fused or not below,
            embeddings_learn=embeddings_learn,
            older=older,
            copies=copied,
            kept=tuple(rack.version(j) for j in rack.order if j in rack.weights),
            embeddings_before=embeddings_before,
            embeddings=rack.embeddings,
            rackwise=rackwise,
            imported=imported,
        )
    )


def chain(all_phases: list[Phase], phase: Phase) -> list[Phase]:
    """The phases whose boundaries are steps on the way to that of `phase`, lowest first; the last is `phase` itself.

    They are cached boundaries of the same frozen stacks, each deeper than the one before.
    """
    found: list[Phase] = [phase]
    for earlier in reversed(all_phases[: phase.number]):
        depth = len(earlier.below)
        if earlier.cached and depth < len(found[0].below) and earlier.below == phase.below[:depth]:
            found.insert(0, earlier)
    return found
