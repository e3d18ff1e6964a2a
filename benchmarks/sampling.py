"""What unmasking by confidence costs in fewer steps, and what it loses.

A diffusion model writes texts of T tokens in T steps and in T / 4, and a causal model of the same data says how likely
these are. Both are given (`--diffusion`, `--causal`: racks of the pipeline) or trained here first, which takes a few
minutes: the pipeline on English text that every Python carries. Run it on an idle machine:

    python -m benchmarks.sampling --check

- Time: of the texts in T / 4 steps over those in T, at most 0.3; the two take turns, and the ratio of the medians
  counts.
- Loss: generative NLL (nats a token, under the causal model) and the entropy of the tokens of a text (nats), each with
  its standard error over the texts, beside the same for held-out text. An NLL that falls together with the entropy is
  no gain: text that repeats itself is likely.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.table import Line, report, take_turns
from stackwise.artifacts.manifest import read
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.generation.choosing import Choice
from stackwise.generation.draws import draws_of_text
from stackwise.generation.unmasking import Order, unmask
from stackwise.growth.racks import KIND, load_rack
from stackwise.model.rack import Rack
from stackwise.objectives.held_out import spread
from workflow.inprocess import Memory, inside, needed, planned

PROJECT = Path(__file__).resolve().parents[1]
TRAINED = ("fine_tune_clm", "fine_tune_diffusion")


def train(root: Path, steps: int) -> None:
    """Run the pipeline of this project's params.yaml, with other numbers of steps, as far as the two models."""
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    tree["objective"] |= {"mask_min": 0.05, "mask_max": 1.0}
    tree["n_stacks"], tree["stacks"] = 2, []
    tree["stack"] |= {"steps": steps}
    tree["fine_tune"] = {name: {"objective": name, "steps": steps, "batch_size": 8} for name in ("clm", "diffusion")}
    tree["tracking"] = {"enabled": False}
    with inside(root):
        Path("params.yaml").write_text(yaml.safe_dump(tree))
        params, stages = planned()
        Memory(Path(".memory")).bring(needed(stages, lambda stage: stage.name in TRAINED), params)


@torch.inference_mode()
def quality(judge: Rack, texts: np.ndarray) -> dict[str, tuple[float, float]]:
    """NLL under `judge` and entropy of the tokens of texts `[n, T]`: means over the texts, with standard errors."""
    nlls = []
    for part in np.array_split(texts, max(1, len(texts) // 16)):
        tokens = torch.from_numpy(part)
        log_probabilities = judge.logits(tokens, causal=True)[:, :-1].log_softmax(dim=-1)
        nlls.append(-log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0].mean(dim=1).numpy())
    shares = [np.unique(text, return_counts=True)[1] / len(text) for text in texts]
    entropies = np.array([-(share * np.log(share)).sum() for share in shares])
    found = {"NLL": np.concatenate(nlls), "entropy": entropies}
    return {name: (float(v.mean()), float(v.std(ddof=1) / len(v) ** 0.5)) for name, v in found.items()}


def writer(rack: Rack, order: Order, seq: int, options: argparse.Namespace) -> Callable[[int], np.ndarray]:
    """Writes texts `[n, T]` from nothing; those of a round are like those of no other."""

    def write(turn: int) -> np.ndarray:
        n, mask_id = options.texts, rack.shape.vocab_size
        draws = [draws_of_text(turn, i) for i in range(n)]
        choice = Choice(options.temperature)
        return np.array(unmask(rack, [[mask_id] * seq] * n, order=order, choice=choice, draws=draws, eos_id=0))

    return write


def measure(diffusion: Path, causal: Path, held_out: np.ndarray | None, options: argparse.Namespace) -> list[Line]:
    """The lines of all samplers."""
    artifact = read(diffusion, KIND)
    rack, judge, seq = load_rack(diffusion).eval(), load_rack(read(causal, KIND).path).eval(), artifact.facts["seq_len"]
    orders = {
        f"confidence, {seq} steps": Order("confidence", seq),
        f"confidence, {seq // 4} steps": Order("confidence", seq // 4),
        f"confidence, {seq // 4} steps, blocks": Order("confidence", seq // 4, block=seq // 4),
        f"ancestral, {seq} steps": Order("ancestral", seq),
        f"ancestral, {seq // 4} steps": Order("ancestral", seq // 4),
    }
    texts: dict[str, list[np.ndarray]] = {name: [] for name in orders}

    def timed(name: str) -> Callable[[], float]:
        write = writer(rack, orders[name], seq, options)

        def once() -> float:
            began = time.perf_counter()
            texts[name].append(write(len(texts[name])))
            return time.perf_counter() - began

        return once

    times = take_turns({name: timed(name) for name in orders}, options.rounds)
    lines = []
    whole, quarter = list(orders)[:2]
    for name, values in times.items():
        seconds = statistics.median(values)
        at_most = 0.3 if name == quarter else None
        ratio = seconds / statistics.median(times[whole])
        lines.append(Line(f"{name}: time", f"{seconds / options.texts * 1e3:,.0f} ms/text", ratio, at_most=at_most))
    found = {name: quality(judge, np.concatenate(own)) for name, own in texts.items()}
    if held_out is not None:
        found["held-out text"] = quality(judge, held_out)
    for figure in ("NLL", "entropy"):
        for name, own in found.items():
            mean, error = own[figure]
            lines.append(Line(f"{name}: {figure}", f"{mean:.2f} +-{error:.2f}", mean / found[whole][figure][0]))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--diffusion", type=Path, help="a rack that unmasks, such as artifacts/finetuned/diffusion")
    parser.add_argument("--causal", type=Path, help="a rack with the same tokenizer, such as artifacts/finetuned/clm")
    parser.add_argument("--steps", type=int, default=400, help="of every training, if there is one (default: 400)")
    parser.add_argument("--texts", type=int, default=8, help="of a round (default: 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    if (options.diffusion is None) != (options.causal is None):
        parser.error("give --diffusion and --causal, or neither")
    if options.diffusion is not None:
        torch.set_num_threads(options.threads)
        return report(measure(options.diffusion, options.causal, None, options), check=options.check)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        train(root, options.steps)
        torch.set_num_threads(options.threads)
        diffusion, causal = (root / f"artifacts/finetuned/{name}" for name in ("diffusion", "clm"))
        tokens = open_tokens(read(root / "artifacts/tokens", TOKENS), read(diffusion, KIND).facts["seq_len"])
        chosen = spread(len(tokens.validation), options.texts * (options.rounds + 1))
        return report(measure(diffusion, causal, tokens.validation.samples(chosen), options), check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
