"""Fine-tuning the racks of runs, and using the classifiers that come of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stackwise.artifacts.manifest import Artifact, read
from stackwise.data.examples import write_examples
from stackwise.data.tokenizer import encode, vocabulary_of
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import TOKENIZER, open_tokens
from stackwise.errors import UserError
from stackwise.finetuning.branch import save_tuned
from stackwise.finetuning.classification import fine_tune_classifier
from stackwise.finetuning.classifier import KIND as CLASSIFIER
from stackwise.finetuning.classifier import Classifier, load_classifier, save_classifier
from stackwise.finetuning.training import fine_tune
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import facts_of, load_rack, save_rack
from stackwise.growth.run import GrowthRun
from stackwise.inference.classification import classification_metrics
from stackwise.inference.completions import completion_metrics
from stackwise.inference.evaluation import Evaluator
from stackwise.interactive.growing import ProgressiveTrainer
from stackwise.interactive.watching import Silent
from stackwise.model.rack import Rack
from stackwise.training.loop import Watcher


class FineTuner:
    """Fine-tunes the finished rack of a run, as the branches in `fine_tune` say.

    It leaves `artifacts/prepared/<branch>` and `artifacts/finetuned/<branch>` in the run's directory, as the pipeline
    does; what is there already is taken as it is, and a training that was interrupted goes on.
    """

    def __init__(self, trainer: ProgressiveTrainer) -> None:
        """
        Args:
            trainer: of the run, whose config has the branches.
        """
        self._trainer = trainer

    def fine_tune(self, branch: str, run_id: str | None = None, *, watcher: Watcher | None = None) -> Rack | Classifier:
        """Train a branch; the rack of the run must have been trained.

        Args:
            branch: its name in `fine_tune`.
            run_id: name of the run (None: that of the config).
            watcher: is told how it goes.

        Returns:
            The model in evaluation mode, its adapters merged: a classifier for `classification`.

        Raises:
            UserError: there is no such branch, its data cannot be used, or the run is not complete.
        """
        artifact = self._tuned(self._trainer.run(run_id), branch, watcher or Silent())
        model = load_classifier(artifact.path) if artifact.kind == CLASSIFIER else load_rack(artifact.path)
        return model.eval()

    def evaluate(self, branch: str, run_id: str | None = None) -> dict[str, Any]:
        """What a branch is worth on the held-out rows of its own data, as `evaluate` says.

        Args:
            branch: its name; of completions or labels.
            run_id: name of the run.

        Returns:
            As `completion_metrics` or `classification_metrics`.

        Raises:
            UserError: it has no such data; or as `fine_tune`.
        """
        run, settings = self._trainer.run(run_id), self._settings(branch)
        if settings.data is None or not settings.data.packed:
            raise UserError(f"fine_tune.{branch}.data: expected completions or labels, of which some are held out")
        model, params = self.fine_tune(branch, run_id).to(run.device), run.params
        tokens = open_tokens(self._data(run, branch), params.seq_len)
        evaluator = Evaluator(tokens, params.evaluate, params.seed, run.device, params.compute.dtype)
        if isinstance(model, Classifier):
            return classification_metrics(
                model, tokens, params.evaluate, seed=params.seed, device=run.device, dtype=params.compute.dtype
            )
        return completion_metrics(model, evaluator, causal=settings.objective == "clm")

    def _settings(self, branch: str) -> Any:
        branches = self._trainer.config.params.fine_tune
        if branch not in branches:
            known = ", ".join(branches) or "none; give the config some in fine_tune"
            raise UserError(f"branch = {branch}: no such branch of fine-tuning; the config has {known}")
        return branches[branch]

    def _data(self, run: GrowthRun, branch: str) -> Artifact:
        """The tokens that a branch learns from."""
        own, tokens = self._settings(branch).data, run.tokens()
        if own is None:
            return tokens
        length, seed = run.params.seq_len if own.packed else None, run.params.seed
        return run.made(
            f"artifacts/prepared/{branch}",
            TOKENS,
            {"tokens": tokens},
            lambda directory: write_examples(
                own, tokens, directory, seq_len=length, seed=seed, key=f"fine_tune.{branch}.data"
            ),
        )

    def _tuned(self, run: GrowthRun, branch: str, watcher: Watcher) -> Artifact:
        settings, params = self._settings(branch), run.params
        inputs = {"tokens": self._data(run, branch), "model": run.fused()}
        tokens, model = inputs["tokens"], inputs["model"].path
        checkpoints = run.checkpoints(f"fine_tune_{branch}", inputs)
        how: dict[str, Any] = {"device": run.device, "checkpoints": checkpoints, "watcher": watcher}
        classifies = settings.objective == "classification"

        def tune_into(directory: Path) -> dict[str, Any]:
            if classifies:
                tuned: Any = fine_tune_classifier(params, branch, model, tokens, **how)
                facts = {"shape": tuned.model.shape.to_json(), "labels": tokens.facts["labels"]}
            else:
                learned, length = settings.objective, params.seq_len
                tuned = fine_tune(params, branch, model, open_tokens(tokens, length), **how)
                facts = facts_of(tuned.model, objective=learned, causal=learned == "clm", seq_len=length)
            run.write_losses(branch, tuned.losses)
            save: Any = save_classifier if classifies else save_rack
            save_tuned(settings, tuned, directory, tokens.path / TOKENIZER, save)
            return {**facts, **tuned.facts}

        made = run.made(f"artifacts/finetuned/{branch}", CLASSIFIER if classifies else RACK, inputs, tune_into)
        checkpoints.discard()
        return made


class TextClassifier:
    """A fine-tuned classifier with its tokenizer."""

    def __init__(self, directory: str | Path, *, device: str = "cpu") -> None:
        """
        Args:
            directory: an artifact such as `artifacts/finetuned/<branch>`.
            device: computes.

        Raises:
            UserError: it is no classifier, or damaged.
        """
        from transformers import AutoTokenizer

        artifact = read(Path(directory), CLASSIFIER)
        self._device = torch.device(device)
        self.model = load_classifier(artifact.path).to(self._device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(artifact.path / TOKENIZER)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, by number."""
        return self.model.classes.labels

    def classify(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probability of every label for each text.

        Raises:
            UserError: it labels words, not texts.
        """
        if not self.model.classes.pooled:
            raise UserError("this classifier labels words: use tag, which takes lists of words")
        probabilities = self._probabilities([[text] for text in texts])  # of a whole text the same at all positions
        return [dict(zip(self.labels, own[-1].tolist(), strict=True)) for own in probabilities]

    def tag(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """The likeliest label of each word of each sentence, which is given as its words.

        Raises:
            UserError: it labels texts, not words.
        """
        if self.model.classes.pooled:
            raise UserError("this classifier labels whole texts: use classify")
        pieces = [[(" " if i else "") + word for i, word in enumerate(sentence)] for sentence in sentences]
        found = []
        for sentence, own in zip(pieces, self._probabilities(pieces), strict=True):
            lengths = [len(ids) for ids in encode(self._tokenizer, sentence)]
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            found.append([self.labels[int(own[start].argmax())] for start in starts])
        return found

    @torch.inference_mode()
    def _probabilities(self, texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Of each text, in pieces that are tokenized one by one, `[tokens + 1, labels]`; the last are of its end."""
        eos_id, found = vocabulary_of(self._tokenizer).eos_id, []
        for pieces in texts:
            ids = [i for piece in encode(self._tokenizer, list(pieces)) for i in piece]
            logits = self.model(torch.tensor([[*ids, eos_id]], device=self._device))
            found.append(logits[0].softmax(dim=-1).cpu())
        return found
