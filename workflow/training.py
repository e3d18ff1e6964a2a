"""What the stages that train have in common: who is told how it goes, and what is left when it has ended."""

import torch

from stackwise.artifacts.manifest import Artifact
from stackwise.config.objective import ObjectiveParams
from stackwise.data.tokens import Tokens
from stackwise.growth import tuning
from stackwise.growth.racks import KIND, facts_of, load_rack, save_rack
from stackwise.training.checkpoint import Checkpoints
from workflow.stage import StageRun, TrainingWatcher


def watcher(run: StageRun, *, steps: int, batch_size: int) -> TrainingWatcher:
    """Tells the terminal, the log and the record how the training of this stage goes."""
    return TrainingWatcher(run, steps=steps, tokens_per_step=batch_size * run.params.seq_len)


def finish(run: StageRun, losses: list[float], checkpoints: Checkpoints) -> None:
    """Write the loss curve to `--losses` and drop the checkpoint, once the result has been published."""
    run.write_json(run.arguments.losses, tuning.loss_curve(losses))
    checkpoints.discard()


def tune_rack(
    run: StageRun,
    model: Artifact,
    tokens: Tokens,
    objective: ObjectiveParams,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    device: torch.device,
) -> None:
    """Train all stacks of a rack together and publish the result as `--out`, with its tokenizer."""
    rack, checkpoints = load_rack(model.path), Checkpoints(run.checkpoint_file())
    losses = tuning.tune_rack(
        run.params,
        rack,
        tokens,
        objective,
        stream=run.stage.name,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        device=device,
        checkpoints=checkpoints,
        watcher=watcher(run, steps=steps, batch_size=batch_size),
    )
    with run.publish(run.arguments.out, KIND) as draft:
        save_rack(draft.directory, rack, tokens.tokenizer)
        known = facts_of(rack, objective=objective.type, causal=objective.looks_back, seq_len=run.params.seq_len)
        draft.facts |= {**known, "steps": steps}
    finish(run, losses, checkpoints)
