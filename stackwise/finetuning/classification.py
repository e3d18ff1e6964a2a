"""The branch of a classifier: from the fused rack to one that labels texts or words."""

from pathlib import Path

import torch

from stackwise.artifacts.manifest import Artifact
from stackwise.config.params import Params
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import open_tokens
from stackwise.finetuning.branch import Tuned, learn, load_base
from stackwise.finetuning.classifier import Classes, Classifier
from stackwise.growth.batches import TokenBatches
from stackwise.objectives.targets import ClassesObjective
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Watcher


def fine_tune_classifier(
    params: Params,
    name: str,
    model: Path,
    data: Artifact,
    *,
    device: torch.device,
    checkpoints: Checkpoints,
    watcher: Watcher,
) -> Tuned[Classifier]:
    """Teach a rack labels, from a checkpoint if there is one. The loss is the mean over all labels of a batch.

    Args:
        params: with seed, seq_len, optimizer, compute and `fine_tune.<name>`.
        name: of the branch.
        model: directory of the rack.
        data: its rows with labels.
        device, checkpoints, watcher: as of `fine_tune`.

    Raises:
        UserError: the machine cannot do what is asked.
    """
    branch, tokens = params.fine_tune[name], open_tokens(data, params.seq_len)
    rack = load_base(model, branch, name=name, seed=params.seed, device=device)
    classes = Classes(tuple(data.facts["labels"]), pooled=data.facts["format"] == "sequence_labels")
    classifier = Classifier.of(rack, classes)
    batches = TokenBatches(
        tokens.train,
        SampleOrder(len(tokens.train), seed=params.seed, stream=f"fine_tune_{name}"),
        ClassesObjective(tokens.train),
        branch.batch_size,
        params.optimizer.accumulate,
    )
    window = classifier.window(checkpointing=params.compute.activation_checkpointing)
    held_out = ClassesObjective(tokens.validation)
    losses, best = learn(
        params, name, window, batches, tokens, held_out, device=device, checkpoints=checkpoints, watcher=watcher
    )
    return Tuned(classifier.cpu(), losses, best)
