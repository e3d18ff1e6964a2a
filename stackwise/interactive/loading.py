"""The batches of a training, for whoever trains by hand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch

from stackwise.artifacts.manifest import read
from stackwise.cache.loader import PrefetchLoader
from stackwise.data.tokens import KIND, open_tokens
from stackwise.errors import UserError
from stackwise.growth.training import PhaseInputs, phase_batches, token_batches
from stackwise.growth.window import Batch
from stackwise.interactive.configuring import StackWiseConfig

CPU = torch.device("cpu")


class ProgressiveDataLoader:
    """What each step of a training sees: the batches of the pipeline, of tokens or of a cached boundary.

    A step is a list of micro-batches, `optimizer.accumulate` of them. It is a function of its number alone: whoever
    goes on from a step sees what would have come.
    """

    def __init__(self, inputs: PhaseInputs, *, step: int = 0, device: torch.device = CPU) -> None:
        """
        Args:
            inputs: of the training: its tokens, its masks, the boundary that it reads. See also `of_tokens`, and
                `ProgressiveTrainer.data_loader`.
            step: where to begin.
            device: computes what is missing of a cached boundary.

        Raises:
            UserError: `step` is not one of the training, or the tokens are too few.
        """
        self._inputs, self._device = inputs, device
        self._tokens = open_tokens(inputs.tokens, inputs.params.seq_len)
        self._from_tokens = token_batches(inputs, self._tokens)
        self.steps = inputs.params.stack_params(inputs.stack).steps
        """Of the training."""
        self.step = 0
        """The step that comes next."""
        self.seek(step)

    @classmethod
    def of_tokens(cls, config: StackWiseConfig, tokens: str | Path, *, stack: int = 0, step: int = 0) -> Self:
        """Batches of token ids as stack `stack` sees them, with masks that are fresh in each pass over the data.

        Args:
            config: objective, batch size, steps.
            tokens: a tokens artifact.
            stack: whose parameters hold.
            step: where to begin.

        Raises:
            UserError: there is no such stack or artifact, or `step` is not one of the training.
        """
        params = config.params
        if not 0 <= stack < params.n_stacks:
            raise UserError(f"stack = {stack}: expected a number from 0 to {params.n_stacks - 1} (n_stacks - 1)")
        inputs = PhaseInputs(
            params=params,
            stack=stack,
            members=(),
            embeddings_learn=True,
            fresh=True,
            tokens=read(Path(tokens), KIND),
        )
        return cls(inputs, step=step)

    @property
    def vocab_size(self) -> int:
        """V: the ids of the tokenizer."""
        return self._tokens.vocabulary.size

    @property
    def causal(self) -> bool:
        """Whether a position may only look back."""
        return self._from_tokens.objective.causal

    @property
    def depth(self) -> int:
        """The stacks below what it gives: 0 for token ids, else those below the cached boundary."""
        return 0 if self._inputs.reads_tokens else len(self._inputs.below)

    def __len__(self) -> int:
        """Steps that are still to come."""
        return self.steps - self.step

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        """The steps from `step` on, made ahead of time in another thread. A step that has been given out is done: the
        next iteration begins after it."""
        prefetch = self._inputs.params.activations.prefetch
        with self.opened() as batches, PrefetchLoader(batches, range(self.step, self.steps), prefetch) as loader:
            for micro_batches in loader:
                self.step += 1
                yield micro_batches

    def opened(self) -> AbstractContextManager[Callable[[int], Sequence[Batch]]]:
        """The micro-batches of any step, as a function of its number; a cached boundary is open meanwhile, and made
        again where it is gone.

        Raises:
            UserError: the boundary is not that of the inputs, or does not fit the byte budget.
        """
        return phase_batches(
            self._inputs, self._tokens, self._from_tokens, device=self._device, progress=lambda done, wanted: None
        )

    def seek(self, step: int) -> Self:
        """Let `step` come next.

        Raises:
            UserError: it is not one of the training.
        """
        if not 0 <= step <= self.steps:
            raise UserError(f"step = {step}: expected a number from 0 to {self.steps}, the steps of this training")
        self.step = step
        return self

    def state_dict(self) -> dict[str, Any]:
        """Where it is, to go on from there."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: the step is not one of the training.
        """
        self.seek(state["step"])
