"""What a phase, and the rack after it, is made from. Importing this imports no torch."""

from dataclasses import dataclass

from stackwise.config.params import Params
from stackwise.growth.phases import Phase, Version, chain


@dataclass(frozen=True)
class Needs:
    """What a phase goes on from, besides the quantized stacks in its window and below it."""

    trainings: tuple[int, ...]
    """The phases whose artifacts it reads, in order; the last is the one before."""
    adapted: tuple[int, ...]
    """The phases that hold adapters of the stacks below."""
    copies: int | None
    """The stack that new ones begin as a copy of."""
    known: int | None
    """The stack whose masks those above a new one have learned to read, where consistency is asked for."""
    links: tuple[Phase, ...]
    """The phases whose cached boundaries are steps on the way to its own, lowest first."""


def needs_of(params: Params, every: list[Phase], phase: Phase) -> Needs:
    """What `phase` of `every` goes on from."""
    copies = phase.copies if any(params.stack_params(k).init == "copy" for k in phase.new) else None
    tied = params.model.tie_embeddings or params.objective.embedding_weight > 0
    consistent = params.growth.consistency and len(phase.window) > len(phase.new) and not phase.sweep
    return Needs(
        trainings=_sorted(phase.needs(embeddings=phase.number > 0 and (tied or not phase.below), copies=copies)),
        adapted=_sorted({v.adapters for v in phase.below if v.adapters is not None}),
        copies=None if copies is None else copies.stack,
        known=phase.window[len(phase.new)].stack if consistent else None,
        links=tuple(p for p in chain(every, phase) if p.cached) if phase.below else (),
    )


def made_from(phase: Phase) -> tuple[tuple[int, ...], tuple[Version, ...]]:
    """What the rack after a phase is made from: phases without a gap, for each is checked to have gone on from the one
    before, and the quantized stacks that have adapters."""
    numbers = {number for v in phase.kept for number in (v.weights, v.adapters) if number is not None}
    adapted = tuple(v for v in phase.kept if v.adapters is not None)
    return tuple(range(min(numbers | {phase.embeddings}), phase.number + 1)), adapted


def _sorted(numbers: set[int]) -> tuple[int, ...]:
    return tuple(sorted(numbers))
