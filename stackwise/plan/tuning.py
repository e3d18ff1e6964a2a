"""The training step of a whole rack: joint fine-tuning and the branches, from the parameters."""

from dataclasses import dataclass

from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params
from stackwise.config.tuning import FineTuneParams
from stackwise.finetuning.objectives import objective_params
from stackwise.plan import weights
from stackwise.plan.parts import LoRA, Sizes, StackPlan, Vocabulary
from stackwise.plan.rows import Rows, rows_of
from stackwise.plan.step import Step
from stackwise.plan.tape import Device

_CLASSES = 16
"""Of a classifier whose labels the data alone tells: they hardly count."""


@dataclass(frozen=True)
class Tuning:
    """A training of a whole rack."""

    step: Step
    """With the most tokens that the loss may ask for."""
    mean_rows: int
    """How many it asks for on average."""
    learns: int
    """Weights that learn."""
    frozen: dict[str, int]
    """Weights that do not, by format."""


def joint_tuning(params: Params, vocabulary: Vocabulary, device: Device) -> Tuning:
    """Joint fine-tuning."""
    return _tuning(params, params.objective, params.joint.batch_size, vocabulary, device, None)


def branch_tuning(params: Params, name: str, vocabulary: Vocabulary, device: Device) -> Tuning:
    """A branch. Of completions all tokens of a sample count as asked for, which is the most there may be; a classifier
    reads them all.

    Args:
        params: all of them.
        name: of the branch.
        vocabulary: sizes of the ends of the rack.
        device: that computes.
    """
    branch = params.fine_tune[name]
    objective = None if branch.objective == "classification" else objective_params(params, name)
    return _tuning(params, objective, branch.batch_size, vocabulary, device, branch)


def _tuning(
    params: Params,
    objective: ObjectiveParams | None,
    batch_size: int,
    vocabulary: Vocabulary,
    device: Device,
    branch: FineTuneParams | None,
) -> Tuning:
    model, batch = params.model, batch_size // params.optimizer.accumulate
    whole = branch is None or branch.method == "full"
    packed = branch is not None and branch.data is not None and branch.data.packed
    rows = Rows(batch * params.seq_len, batch * params.seq_len)
    if objective is not None:
        shared = model.time.sampling == "batch"
        rows = rows_of(objective, batch=batch, seq=params.seq_len, shared=shared)
    ends = (model, vocabulary.size)
    head, embeddings = (
        weights.head_weights(*ends, vocabulary.head_width).learnable,
        weights.embeddings_weights(*ends, vocabulary.embedding_width).learnable,
    )
    classes = None
    if branch is not None and branch.data is not None and objective is None:
        classes = len(branch.data.labels) or _CLASSES
        head = model.d_model * (classes + 1)
    head_learns = whole or classes is not None
    learns, frozen = 0, dict[str, int]()
    for size, trains in ((embeddings, whole), (head, head_learns)):
        learns += size * trains
        frozen["full"] = frozen.get("full", 0) + size * (not trains)
    stacks = []
    for k in range(params.n_stacks):
        plan, lora = _stack(params, k, branch)
        part = weights.stack_weights(plan.model, plan.blocks)
        stacks.append(plan)
        if plan.learns:
            learns += part.learnable
        else:
            assert lora is not None
            learns += weights.lora_weights(part, lora.rank, lora.targets).learnable
            held = plan.precision or "full"
            frozen[held] = frozen.get(held, 0) + part.learnable
    step = Step(
        window=tuple(stacks),
        vocabulary=vocabulary,
        sizes=Sizes(
            batch=batch,
            seq=params.seq_len,
            rows=rows.most,
            causal=objective is not None and (objective.type == "clm" or objective.causal),
            segments=model.document_mask or packed,
        ),
        optimizer=params.optimizer,
        compute=params.compute.dtype,
        embeddings_learn=whole,
        head_learns=head_learns,
        classes=classes,
        embedding_term=objective is not None and objective.embedding_weight > 0,
        checkpointing=params.compute.activation_checkpointing,
        device=device,
        prefetch=params.activations.prefetch,
    )
    return Tuning(step, round(rows.mean), learns, {held: n for held, n in frozen.items() if n})


def _stack(params: Params, k: int, branch: FineTuneParams | None) -> tuple[StackPlan, LoRA | None]:
    """A stack, and its adapters if it has some."""
    own = params.stack_model(k), params.stack_params(k).blocks
    if branch is None or branch.adapters is None:
        return StackPlan(*own, learns=True), None
    settings = branch.adapters
    targets = None if settings.target_modules is None else frozenset(settings.target_modules)
    lora = LoRA(settings.rank_of(k), targets, dropout=settings.dropout > 0)
    return StackPlan(*own, precision=branch.precision if branch.method == "qlora" else None, adapters=(lora,)), lora
