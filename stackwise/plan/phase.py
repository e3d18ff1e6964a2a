"""The training step of a phase of growth, from the parameters."""

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
    """The step that a phase takes again and again. With `growth.unfreeze` it is the last, in which all has thawed.

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
        below=() if phase.cached else tuple(_frozen(params, version) for version in phase.below),
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
            return _frozen(params, version)


def _frozen(params: Params, version: Version) -> StackPlan:
    """A quantized stack as an earlier phase has left it."""
    k, adapters = version.stack, params.adapters.trunk
    lora = () if version.adapters is None or adapters is None else (_lora(adapters, k, learns=False),)
    return StackPlan(
        params.stack_model(k), params.stack_params(k).blocks, precision=params.trunk.precision_of(k), adapters=lora
    )


def _lora(params: LoRAParams, k: int, *, learns: bool) -> LoRA:
    targets = None if params.target_modules is None else frozenset(params.target_modules)
    return LoRA(params.rank_of(k), targets, dropout=params.dropout > 0, learns=learns)
