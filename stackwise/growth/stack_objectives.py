"""The objective of each stack: stacks may differ in what is masked."""

import hashlib

from stackwise.config.model import TimeParams
from stackwise.config.objective import MASKED
from stackwise.config.params import Params
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.growth.depth import fraction_of_stack
from stackwise.growth.pretraining import build_objective, visiting_order
from stackwise.objectives.targets import Objective
from stackwise.objectives.words import Words


def order_of_stack(params: Params, k: int, time: TimeParams, n: int, *, sweep: int = 0) -> SampleOrder:
    """The order in which stack `k` visits `n` training samples.

    Args:
        params: with seed; with `stack` and the stack's overrides where a batch shares t.
        k: the stack.
        time: `model.time`.
        n: number of samples.
        sweep: 0 when the stack is added; 1, 2, ... when it is trained again.

    Raises:
        UserError: there is not even one batch of samples that stay together.
    """
    batch_size = params.stack_params(k).batch_size if time.sampling == "batch" else 1
    return visiting_order(n, seed=params.seed, stream=_stream(k, sweep), time=time, batch_size=batch_size)


def objective_of_stack(
    params: Params,
    k: int,
    time: TimeParams,
    *,
    tokens: TokenDataset,
    mask_id: int,
    words: Words | None = None,
    sweep: int = 0,
    fresh: bool = False,
) -> Objective:
    """What stack `k` learns, and so what the frozen stacks below it see.

    Args:
        params: with seed, objective and `growth.masks`; with `n_stacks` and `growth.building_mode` where the mask rate
            goes by depth, with `stack` and the stack's overrides where it goes by training or a batch shares it.
        k: the stack.
        time: `model.time`.
        tokens: the training split.
        mask_id: id of the mask token.
        words: for whole-word masking.
        sweep: 0 when the stack is added; 1, 2, ... when it is trained again.
        fresh: whether each pass over the data has masks of its own, instead of `objective.variants` that recur.
    """
    by_training = params.objective.by_training
    batch_size = params.stack_params(k).batch_size if by_training or time.sampling == "batch" else 1
    redrawn = params.objective.type in MASKED and params.growth.masks == "redraw"
    return build_objective(
        params.objective,
        time,
        seed=_seed_of_masks(params.seed, _stream(k, sweep)) if redrawn else params.seed,
        tokens=tokens,
        mask_id=mask_id,
        words=words,
        order=order_of_stack(params, k, time, len(tokens), sweep=sweep),
        batch_size=batch_size,
        steps=params.stack_params(k).steps if by_training else 1,
        cached=not fresh,
        fraction=fraction_of_stack(params, k, time),
    )


def _stream(k: int, sweep: int) -> str:
    return f"stacks.{k}.sweep.{sweep}" if sweep else f"stacks.{k}"


def _seed_of_masks(seed: int, stream: str) -> int:
    """The seed of the masks that only one training draws."""
    return int.from_bytes(hashlib.sha256(f"{seed}/masks/{stream}".encode()).digest()[:4], "little")
