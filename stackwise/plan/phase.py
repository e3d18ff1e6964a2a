"""The training step of a phase of growth, from the parameters."""

from dataclasses import replace
from itertools import pairwise

from stackwise.config.growth import LoRAParams
from stackwise.config.params import Params
from stackwise.growth.depth import fraction_of_stack
from stackwise.growth.phases import Member, Phase, Version
from stackwise.plan.parts import LoRA, Sizes, StackPlan, Vocabulary
from stackwise.plan.rows import Rows, rows_of
from stackwise.plan.step import Step
from stackwise.plan.tape import Device


def rows_of_phase(params: Params, phase: Phase, batch: int) -> Rows:
    """How many tokens of a batch of so many samples the loss asks for."""
    time = params.model.time
    return rows_of(
        params.objective,
        batch=batch,
        seq=params.seq_len,
        fraction=fraction_of_stack(params, phase.stack, time),
        shared=time.sampling == "batch",
    )


def step_of_phase(params: Params, phase: Phase, vocabulary: Vocabulary, *, rows: int, device: Device) -> Step:
    """The step that a phase takes again and again; with `growth.unfreeze` the last, in which everything learns.

    Args:
        params: all of them.
        phase: the training.
        vocabulary: sizes of the ends of the rack.
        rows: tokens of a micro-batch that the loss asks for: for time their mean, for memory the most there may be.
        device: that computes.
    """
    objective, own = params.objective, params.stack_params(phase.stack)
    older = {version.stack: version for version in phase.older}
    return Step(
        window=tuple(_member(params, member, older.get(member.stack)) for member in phase.window),
        vocabulary=vocabulary,
        sizes=Sizes(
            batch=own.batch_size // params.optimizer.accumulate,
            seq=params.seq_len,
            rows=rows,
            causal=objective.looks_back,
            segments=params.model.document_mask,
        ),
        optimizer=params.optimizer,
        compute=params.compute.dtype,
        below=() if phase.cached else tuple(frozen_stack(params, version) for version in phase.below),
        below_stays=params.activations.trunk == "resident",
        from_boundary=phase.cached,
        boundary_bytes=4 if params.trunk.activations == "fp32" else 2,
        embeddings_learn=phase.embeddings_learn,
        embedding_term=objective.embedding_weight > 0,
        consistency_term=params.growth.consistency > 0 and phase.number > 0 and not phase.sweep,
        checkpointing=params.compute.activation_checkpointing,
        trunk_compute=params.trunk.compute,
        device=device,
        prefetch=params.activations.prefetch,
    )


def steps_of_phase(
    params: Params, phase: Phase, vocabulary: Vocabulary, *, rows: int, device: Device
) -> list[tuple[int, Step]]:
    """All steps of a phase: how many of each kind, in order. There are several kinds with `growth.unfreeze`, where the
    older parts of the window begin to learn one after another (`stackwise.growth.window.Unfreezing`).

    Args:
        params, phase, vocabulary, rows, device: as of `step_of_phase`.
    """
    last, total = (
        step_of_phase(params, phase, vocabulary, rows=rows, device=device),
        params.stack_params(phase.stack).steps,
    )
    older = [place for place, member in enumerate(phase.window) if member.role in ("weights", "adapters")]
    over = round(params.growth.unfreeze * total)
    if not older or not over:
        return [(total, last)]
    parts = len(older) + phase.embeddings_learn
    begins = [round(over * (i + 1) / parts) for i in range(parts)]
    found = []
    for thawed, (begin, end) in enumerate(pairwise([0, *begins, total])):
        frozen = older[: max(len(older) - thawed, 0)]  # the topmost thaw first, the embeddings last
        window = tuple(_resting(plan) if place in frozen else plan for place, plan in enumerate(last.window))
        learns = last.embeddings_learn and thawed == parts
        found.append((end - begin, replace(last, window=window, embeddings_learn=learns)))
    return found


def frozen_stack(params: Params, version: Version) -> StackPlan:
    """A quantized stack as an earlier phase has left it."""
    k, adapters = version.stack, params.adapters.trunk
    lora = () if version.adapters is None or adapters is None else (_lora(adapters, k, learns=False),)
    return StackPlan(
        params.stack_model(k), params.stack_params(k).blocks, precision=params.trunk.precision_of(k), adapters=lora
    )


def _resting(plan: StackPlan) -> StackPlan:
    """A stack of which nothing learns yet."""
    return replace(plan, learns=False, adapters=tuple(replace(lora, learns=False) for lora in plan.adapters))


def _member(params: Params, member: Member, version: Version | None) -> StackPlan:
    """A stack in the window."""
    k, adapters = member.stack, params.adapters
    plain = StackPlan(params.stack_model(k), params.stack_params(k).blocks)
    match member.role:
        case "new" | "weights":
            return StackPlan(plain.model, plain.blocks, learns=True)
        case "initial":
            return plain
        case "lora":
            assert adapters.stack is not None
            return StackPlan(plain.model, plain.blocks, adapters=(_lora(adapters.stack, k, learns=True),))
        case "adapters":
            assert adapters.trunk is not None
            lora = (_lora(adapters.trunk, k, learns=True),)
            return StackPlan(plain.model, plain.blocks, precision=params.trunk.precision_of(k), adapters=lora)
        case "frozen":
            assert version is not None
            return frozen_stack(params, version)


def _lora(params: LoRAParams, k: int, *, learns: bool) -> LoRA:
    targets = None if params.target_modules is None else frozenset(params.target_modules)
    return LoRA(params.rank_of(k), targets, dropout=params.dropout > 0, learns=learns)
