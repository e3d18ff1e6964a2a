"""The objective of each stack: stacks may differ in what is masked."""

from stackwise.config.model import TimeParams
from stackwise.config.params import Params
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.growth.pretraining import build_objective, visiting_order
from stackwise.objectives.schedules import MaskScheduler
from stackwise.objectives.targets import Objective
from stackwise.objectives.words import Words


def order_of_stack(params: Params, k: int, time: TimeParams, n: int) -> SampleOrder:
    """The order in which stack `k` visits `n` training samples.

    Args:
        params: with seed; with `stack` and the stack's overrides where a batch shares t.
        k: the stack.
        time: `model.time`.
        n: number of samples.

    Raises:
        UserError: there is not even one batch of samples that stay together.
    """
    batch_size = params.stack_params(k).batch_size if time.sampling == "batch" else 1
    return visiting_order(n, seed=params.seed, stream=f"stacks.{k}", time=time, batch_size=batch_size)


def objective_of_stack(
    params: Params, k: int, time: TimeParams, *, tokens: TokenDataset, mask_id: int, words: Words | None = None
) -> Objective:
    """What stack `k` learns, and so what the frozen stacks below it see.

    Args:
        params: with seed and objective; with `n_stacks` where the mask rate goes by depth, with `stack` and the stack's
            overrides where it goes by training or a batch shares it.
        k: the stack.
        time: `model.time`.
        tokens: the training split.
        mask_id: id of the mask token.
        words: for whole-word masking.
    """
    by_training = params.objective.by_training
    batch_size = params.stack_params(k).batch_size if by_training or time.sampling == "batch" else 1
    return build_objective(
        params.objective,
        time,
        seed=params.seed,
        tokens=tokens,
        mask_id=mask_id,
        words=words,
        order=order_of_stack(params, k, time, len(tokens)),
        batch_size=batch_size,
        steps=params.stack_params(k).steps if by_training else 1,
        cached=k > 0,
        fraction=fraction_of_stack(params, k, time),
    )


def fraction_of_stack(params: Params, k: int, time: TimeParams) -> float | None:
    """The mask rate that stack `k` owns; None if it has none of its own.

    By `model.time.mode: depth` it falls from `mask_max` at the lowest stack to `mask_min` at the highest, or is that of
    `time_per_stack`; by a schedule over depth it rises from `mask_min`.
    """
    own = params.objective
    if time.mode == "depth" and time.mapping == "custom":
        return time.time_per_stack[k]
    if time.mode != "depth" and not own.by_depth:
        return None
    last = (own.schedule_stacks or params.n_stacks) - 1
    progress = k / last if last else 0.0
    if time.mode == "depth":
        assert time.mapping != "custom"
        return MaskScheduler(time.mapping, own.mask_min, own.mask_max).fraction(1 - progress)
    assert own.schedule is not None
    return MaskScheduler(own.schedule, own.mask_min, own.mask_max).fraction(progress)
