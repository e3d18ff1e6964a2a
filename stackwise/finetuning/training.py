"""Fine-tuning for `clm`, `mlm` and `diffusion`: from the fused rack to one that has learned."""

from pathlib import Path

import torch

from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params
from stackwise.data.tokens import Tokens
from stackwise.finetuning.branch import Tuned, learn, load_base
from stackwise.finetuning.objectives import objective_params
from stackwise.growth.tuning import rack_batches
from stackwise.growth.window import Window
from stackwise.model.rack import Rack
from stackwise.objectives.held_out import BoundObjective, CompletionBoundObjective
from stackwise.objectives.targets import CausalObjective, CompletionObjective, MaskDiffusionObjective, Objective
from stackwise.objectives.words import Words
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Watcher


def fine_tune(
    params: Params,
    name: str,
    model: Path,
    tokens: Tokens,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    watcher: Watcher,
) -> Tuned[Rack]:
    """Adapt a rack to `clm`, `mlm` or `diffusion`, from a checkpoint if there is one.

    Of packed completions only what has a label is asked for, and rows do not see each other.

    Args:
        params: with seed, optimizer, compute and `fine_tune.<name>`; with objective for `diffusion`.
        name: of the branch.
        model: directory of the rack.
        tokens: what it learns from.
        device: computes.
        checkpoints: of this run; they stay when it has ended, until its result is published.
        watcher: is told how it goes.

    Raises:
        UserError: the machine cannot do what is asked, or the data is too little.
    """
    branch = params.fine_tune[name]
    rack, own = load_base(model, branch, name=name, seed=params.seed, device=device), objective_params(params, name)
    batches = rack_batches(
        params,
        rack.shape.model,
        tokens,
        own,
        stream=f"fine_tune_{name}",
        steps=branch.steps,
        batch_size=branch.batch_size,
    )
    window = Window.of(rack, checkpointing=params.compute.activation_checkpointing)
    held_out = held_out_objective(own, tokens, params.seed)
    losses, best = learn(
        params, name, window, batches, tokens, held_out, device=device, checkpoints=checkpoints, watcher=watcher
    )
    return Tuned(rack.cpu(), losses, best)


def held_out_objective(params: ObjectiveParams, tokens: Tokens, seed: int) -> Objective:
    """What held-out samples are asked for: the bound of a diffusion model, else what training asks.

    Args:
        params: from `objective_params`.
        tokens: of which the validation split is asked; of packed rows only what has a label.
        seed: of the masks.
    """
    own, vocabulary = tokens.validation, tokens.vocabulary
    if params.type == "clm":
        return CompletionObjective(own) if own.packed else CausalObjective()
    if params.type == "diffusion":
        if own.packed:
            return CompletionBoundObjective(own, seed, vocabulary.mask_id)
        return BoundObjective(seed, vocabulary.mask_id)
    words = Words(tokens.word_starts, vocabulary.eos_id)
    return MaskDiffusionObjective(params, seed, vocabulary.mask_id, words=words, only=own if own.packed else None)
