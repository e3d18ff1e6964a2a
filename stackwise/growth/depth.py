"""Mask rates that go by depth."""

from stackwise.config.growth import BuildingMode
from stackwise.config.model import TimeParams
from stackwise.config.params import Params
from stackwise.objectives.schedules import MaskScheduler


def fraction_of_stack(params: Params, k: int, time: TimeParams) -> float | None:
    """The mask rate that stack `k` owns; None if it has none of its own.

    By `model.time.mode: depth` it falls from `mask_max` at the lowest stack to `mask_min` at the highest, or is that of
    `time_per_stack`; by a schedule over depth it rises from `mask_min`. The depth is that in the finished rack: what
    is added by `prepend` lies the lower the later it comes.
    """
    own = params.objective
    if time.mode == "depth" and time.mapping == "custom":
        return time.time_per_stack[k]
    if time.mode != "depth" and not own.by_depth:
        return None
    last = (own.schedule_stacks or params.n_stacks) - 1
    progress = _place(k, last, params.growth.building_mode) / last if last else 0.0
    if time.mode == "depth":
        assert time.mapping != "custom"
        return MaskScheduler(time.mapping, own.mask_min, own.mask_max).fraction(1 - progress)
    assert own.schedule is not None
    return MaskScheduler(own.schedule, own.mask_min, own.mask_max).fraction(progress)


def _place(k: int, last: int, building_mode: BuildingMode) -> int:
    """The place of stack `k`, from 0 at the bottom, in a finished rack whose highest place is `last`."""
    match building_mode:
        case "append":
            return k
        case "prepend":
            return last - k
        case "insert":
            return k - 1 if k else last
