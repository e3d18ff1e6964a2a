"""How fast the training loop is, against the fewest lines of PyTorch that train the same model.

Both train a whole rack end to end, from the same weights on the same batches, with the same loss, AdamW (fused) and
clipping. The loop under test reads its batches ahead in a thread, follows a schedule, watches and can resume; the
control has all batches in memory before it starts and does nothing but train. They take turns, some steps each; the
median over the rounds counts. Run it on an idle machine:

    python -m benchmarks.training_loop --check

- Speed: tokens a second of the loop over those of the control; building the optimizer counts on both sides.
- Waiting: the share of its time that the loop waits for data.
- Checkpoint: what one checkpoint takes, as a share of the steps between two (`checkpoint.every`). The control keeps
  none, so it is not part of the speed above.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.table import Line, report, take_turns
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.training import CheckpointParams, OptimizerParams
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.growth.batches import TokenBatches
from stackwise.growth.init import initialize
from stackwise.growth.window import Batch, Window
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.targets import MaskDiffusionObjective
from stackwise.precision.dtypes import autocast
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Run, train
from stackwise.training.optimizer import build_optimizer

CPU = torch.device("cpu")
LOOP, CONTROL = "training.loop.train", "hand-written loop"
LR = 1e-3
CLIP = 1.0


class Contest:
    """One rack for each of the two, and the batches that both train on."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self.steps: int = options.steps
        self.tokens: int = options.steps * options.batch * options.seq
        self.dtype: str = options.dtype
        self.waiting_shares: list[float] = []
        """Of each call of `loop`: the share of its time that it has waited for data."""
        self.losses: dict[str, list[float]] = {}
        """Of the first call of each."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, options.vocab, 4 * options.batch * options.seq)
        np.save(directory / "tokens.npy", tokens.astype(np.int32))
        dataset = TokenDataset(directory / "tokens.npy", options.seq)
        objective = MaskDiffusionObjective(ObjectiveParams(), seed=0, mask_id=options.vocab)
        order = SampleOrder(len(dataset), seed=0, stream="benchmark")
        self.batches = TokenBatches(dataset, order, objective, options.batch, accumulate=1)
        self.in_memory = [self.batches(step)[0] for step in range(options.steps)]
        model = ModelParams(
            d_model=options.d_model,
            attention=AttentionParams(n_heads=max(1, options.d_model // 32)),
            mlp=MLPParams(hidden=round(options.d_model * 8 / 3 / 32) * 32),
        )
        shape = RackShape.of(model, (options.blocks,) * options.stacks, options.vocab)
        self.windows = {name: new_window(shape) for name in (LOOP, CONTROL)}
        self.checkpoints = Checkpoints(directory / "checkpoint.safetensors")
        # No schedule and no decay: what the control leaves out must not make the losses differ.
        self.optimizer = OptimizerParams(schedule="constant", warmup=0.0, weight_decay=0.0, grad_clip=CLIP)
        self._waited = 0.0

    def loop(self) -> float:
        """Train with the loop under test; returns tokens a second."""
        window = self.windows[LOOP]
        began = time.perf_counter()
        losses = train(
            Run(
                module=window,
                batches=self.batches,
                loss=partial(window.loss, device=CPU, causal=False),
                steps=self.steps,
                lr=LR,
                optimizer=self.optimizer,
                device=CPU,
                dtype=self.dtype,
                checkpoints=self.checkpoints,
                checkpoint_every=self.steps + 1,
            ),
            self,
        )
        seconds = time.perf_counter() - began
        self.waiting_shares.append(self._waited / seconds)
        self.losses.setdefault(LOOP, losses)
        return self.tokens / seconds

    def control(self) -> float:
        """Train with what one would write by hand; returns tokens a second."""
        window = self.windows[CONTROL]
        began = time.perf_counter()
        losses = train_by_hand(window, self.in_memory, self.dtype, self.optimizer)
        seconds = time.perf_counter() - began
        self.losses.setdefault(CONTROL, losses)
        return self.tokens / seconds

    def resumed(self, step: int) -> None:
        """There is nothing to resume from."""

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """Note how long the loop has waited."""
        self._waited = waited

    def checkpoint_seconds(self) -> Iterator[float]:
        """Save the state of the loop's rack a few times."""
        window = self.windows[LOOP]
        parameters = dict(window.named_parameters())
        optimizer = build_optimizer(parameters, self.optimizer, LR, {})
        window.loss(self.in_memory[0], device=CPU, causal=False).backward()
        optimizer.step()
        for _ in range(5):
            began = time.perf_counter()
            self.checkpoints.save(1, parameters, optimizer, {"losses": [0.0] * 100, "scaler": {}})
            yield time.perf_counter() - began
        self.checkpoints.discard()


def new_window(shape: RackShape) -> Window:
    """A whole rack with its initial weights, ready to train."""
    rack = Rack(shape)
    for part, module in rack.named_children():
        initialize(module, name=part, seed=0)
    return Window.of(rack)


def train_by_hand(window: Window, batches: Sequence[Batch], dtype: str, params: OptimizerParams) -> list[float]:
    """The control."""
    parameters = list(window.parameters())
    betas = (params.beta1, params.beta2)
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=betas, eps=params.eps, weight_decay=0.0, fused=True)
    losses = []
    for batch in batches:
        with autocast(CPU, dtype):
            loss = window.loss(batch, device=CPU, causal=False)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_loop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=192, help="width of the residual stream (default: 192)")
    parser.add_argument("--stacks", type=int, default=4, help="stacks of the rack (default: 4)")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of a stack (default: 2)")
    parser.add_argument("--seq", type=int, default=128, help="tokens of a sample (default: 128)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step (default: 32)")
    parser.add_argument("--vocab", type=int, default=1024, help="size of the vocabulary (default: 1024)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="compute format (default: bf16)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each side in a round (default: 10)")
    parser.add_argument("--dir", type=Path, help="where the temporary files go (default: the system's)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.rounds < 1:
        parser.error("--steps and --rounds must be positive")
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stackwise-loop-") as name:
        contest = Contest(Path(name), options)
        speeds = take_turns({LOOP: contest.loop, CONTROL: contest.control}, options.rounds)
        checkpoint = statistics.median(contest.checkpoint_seconds())
    if not np.allclose(contest.losses[LOOP], contest.losses[CONTROL], rtol=1e-3):
        raise RuntimeError("the two do not train the same model")

    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ratio = statistics.median(s / c for s, c in zip(speeds[LOOP], speeds[CONTROL], strict=True))
    waiting = statistics.median(contest.waiting_shares[1:])
    every = CheckpointParams().every
    between = every * contest.tokens / contest.steps / medians[LOOP]
    lines = [
        Line(CONTROL, f"{medians[CONTROL]:,.0f} tok/s", 1.0),
        Line(LOOP, f"{medians[LOOP]:,.0f} tok/s", ratio, at_least=0.97),
        Line("waiting for data", f"{waiting:.2%}", waiting, at_most=0.02),
        Line(f"a checkpoint every {every} steps", f"{checkpoint * 1e3:.0f} ms", checkpoint / between),
    ]
    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
