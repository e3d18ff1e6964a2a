"""What a trained model is worth, on the terminal: `stackwise evaluate`."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stackwise.artifacts.manifest import Artifact, read
from stackwise.config.compute import ComputeParams
from stackwise.config.evaluation import EvaluateParams
from stackwise.errors import UserError

EXAMPLES = """\
examples:
  stackwise evaluate --model artifacts/fused                         on the held-out text of the project
  stackwise evaluate --model artifacts/finetuned/clm --file my.txt   on a text: bits per byte
  stackwise evaluate --model artifacts/fused --file quiz.jsonl       multiple choice, a line for each question:
      {"prompt": "The sky is", "choices": [" blue", " made of cheese"], "answer": 0}
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description, parser.epilog = __doc__, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="a rack, such as artifacts/fused")
    parser.add_argument(
        "--file", type=Path, nargs="+", default=[], help="texts (.txt) and questions (.jsonl) instead of held-out text"
    )
    parser.add_argument(
        "--tokens", type=Path, default=Path("artifacts/tokens"), help="held-out text (default: artifacts/tokens)"
    )
    parser.add_argument("--samples", type=int, default=256, help="held-out samples (default: 256)")
    parser.add_argument("--draws", type=int, default=32, help="masks of a text for a diffusion model (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: 0)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts at a time (default: 32)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default: auto)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Measure and show.

    Raises:
        UserError: an argument is wrong, or the model or a file is not what it should be.
    """
    for flag in ("samples", "draws", "batch_size"):
        if (value := getattr(arguments, flag)) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected an integer of at least 1")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: expected an integer from 0 to 2^32 - 1")
    for file in arguments.file:
        if file.suffix not in (".txt", ".jsonl"):
            raise UserError(f"--file {file}: expected a text (.txt) or multiple-choice questions (.jsonl)")
    if not arguments.model.is_dir():
        raise UserError(f"--model {arguments.model}: no such directory; expected a rack, such as artifacts/fused")
    from stackwise.growth.racks import KIND  # takes seconds

    artifact = read(arguments.model, KIND)
    if artifact.facts["objective"] == "custom" and arguments.file:
        raise UserError(f"--file: {arguments.model} has learned labels, not text; leave it out")
    found = dict(_on_files(artifact, arguments) if arguments.file else _on_held_out_text(artifact, arguments))
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    kind = "causal model" if artifact.facts["causal"] else "diffusion model"
    print(f"{arguments.model} ({kind}), with 95 % intervals")
    for name, figures in found.items():
        print(f"\n{name}")
        print("\n".join(f"  {line}" for line in _lines(figures)))


def _on_held_out_text(artifact: Artifact, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from stackwise.data.tokens import KIND, open_tokens
    from stackwise.growth.racks import load_rack
    from stackwise.inference.evaluation import Evaluator
    from stackwise.training.device import choose

    device = choose(ComputeParams(device=arguments.device), where="--device")
    tokens = open_tokens(read(arguments.tokens, KIND), artifact.facts["seq_len"])
    params = EvaluateParams(samples=arguments.samples, draws=min(4, arguments.draws), batch_size=arguments.batch_size)
    evaluator = Evaluator(tokens, params, arguments.seed, device, "fp32")
    rack = load_rack(artifact.path).to(device).eval()
    objective = artifact.facts["objective"]
    if objective == "custom":
        metrics = {"labelled": evaluator.labelled(rack, causal=artifact.facts["causal"])}
    elif artifact.facts["causal"]:
        metrics = {"next_token": evaluator.next_token(rack)}
    else:
        metrics = evaluator.diffusion(rack)
    metrics["unigram"] = evaluator.unigram(labelled=objective == "custom")
    count = min(arguments.samples, len(tokens.validation))
    yield f"held-out text, {count} samples of {artifact.facts['seq_len']} tokens", metrics


def _on_files(artifact: Artifact, arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from transformers import AutoTokenizer

    from stackwise.data.choices import read_choices
    from stackwise.data.tokens import Vocabulary
    from stackwise.growth.racks import TOKENIZER, load_rack
    from stackwise.inference.choices import accuracy, choose
    from stackwise.inference.scoring import BoundScorer, CausalScorer, Scorer
    from stackwise.training.device import choose as choose_device

    questions = {file: read_choices(file) for file in arguments.file if file.suffix == ".jsonl"}
    texts = {file: _text(file) for file in arguments.file if file.suffix == ".txt"}
    device = choose_device(ComputeParams(device=arguments.device), where="--device")
    tokenizer = AutoTokenizer.from_pretrained(artifact.path / TOKENIZER)
    rack = load_rack(artifact.path).to(device).eval()
    vocabulary = Vocabulary(rack.shape.vocab_size, tokenizer.eos_token_id)
    sizes = {"batch_size": arguments.batch_size, "seq_len": artifact.facts["seq_len"]}
    scorer: Scorer
    if artifact.facts["causal"]:
        scorer = CausalScorer(rack, vocabulary, device, **sizes)
    else:
        scorer = BoundScorer(rack, vocabulary, device, seed=arguments.seed, draws=arguments.draws, **sizes)
    for file in arguments.file:
        if file in questions:
            rows = questions[file]
            yield f"{file}, {len(rows)} questions", accuracy(rows, choose(rows, scorer, tokenizer))
        else:
            figure = "next_token" if artifact.facts["causal"] else "nelbo"
            yield str(file), {figure: _of_text(texts[file], scorer, tokenizer, artifact.facts["seq_len"])}


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--file {file}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"--file {file}: cannot be read ({error.strerror})") from None
    if not text:
        raise UserError(f"--file {file}: empty; give a text")
    return text


def _of_text(text: str, scorer: Any, tokenizer: Any, seq_len: int) -> dict[str, Any]:
    """A text in windows of `seq_len` tokens, each read without those before it."""
    import numpy as np

    from stackwise.data.tokenizer import encode
    from stackwise.inference.evaluation import in_units
    from stackwise.inference.intervals import ratio
    from stackwise.inference.scoring import Question

    (ids,) = encode(tokenizer, [text])
    windows = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
    nats = np.array([-score.nats for score in scorer.score([Question((), window) for window in windows])])
    lengths = np.array([float(len(window)) for window in windows])
    return in_units(ratio(nats, lengths), len(text.encode()) / len(ids))


_NAMES = {
    "nelbo": "NELBO",
    "next_token": "NLL of the next token",
    "labelled": "NLL of the labels",
    "unigram": "unigram baseline",
    "accuracy": "right",
    "accuracy_per_byte": "right, by likelihood per byte",
}


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    for name, own in figures.items():
        if name == "masked":
            for rate, at_rate in own.items():
                text = f"{float(rate):.0%} masked"
                yield f"{text:<32}{_share(at_rate, 'accuracy')} right, {at_rate['nats_per_token']:.3f} nats per token"
        elif isinstance(own, Mapping):
            yield f"{_NAMES[name]:<32}{_number(own, 'bits_per_byte')} bits per byte"
            if "accuracy" in own:
                yield f"{'':<32}{_share(own, 'accuracy')} right"
    if "chance" in figures:
        for name in ("accuracy", "accuracy_per_byte"):
            yield f"{_NAMES[name]:<32}{_share(figures, name)}"
        yield f"{'chance':<32}{figures['chance']:.1%}"


def _number(own: Mapping[str, float], key: str) -> str:
    return f"{own[key]:.3f} ({own[f'{key}_low']:.3f} to {own[f'{key}_high']:.3f})"


def _share(own: Mapping[str, float], key: str) -> str:
    return f"{own[key]:.1%} ({own[f'{key}_low']:.1%} to {own[f'{key}_high']:.1%})"
