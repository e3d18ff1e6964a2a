"""Text from a trained model on the terminal: `stackwise generate`."""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stackwise.config.allowed import at, in_words
from stackwise.config.compute import ComputeParams
from stackwise.config.generation import GenerationParams
from stackwise.errors import UserError

EXAMPLES = """\
examples:
  stackwise generate --model artifacts/finetuned/clm --prompt "The list" --temperature 0.8 --top-p 0.9
  stackwise generate --model artifacts/fused --prompt "The [MASK:8] of a list" --sampler confidence --steps 16
  stackwise generate --model artifacts/fused --new-tokens 64 --block 16 --samples 3 --seed 1
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.description, parser.epilog = __doc__, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="a rack, such as artifacts/fused")
    what = parser.add_argument_group("what to write")
    what.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="what the text begins with; [MASK] in it, or [MASK:8] for eight, is filled in (may be repeated)",
    )
    what.add_argument("--file", type=Path, help='more prompts: one a line, or, in a .jsonl, objects with a "prompt"')
    what.add_argument("--samples", type=int, default=1, help="texts for each prompt (default: 1)")
    what.add_argument(
        "--new-tokens",
        "--max-new-tokens",
        type=int,
        help="tokens behind the prompt: at most so many from left to right, just so many by unmasking (default: as "
        "many as the model's samples have room for; none if the prompt has a [MASK])",
    )
    what.add_argument("--stop", action="append", help="end before this text (may be given several times)")
    what.add_argument("--no-end", action="store_true", help="go on where the model puts the end of a text")
    how = parser.add_argument_group("how tokens are chosen")
    how.add_argument("--seed", type=int, default=0, help="of the chance (default: 0)")
    how.add_argument("--temperature", type=float, help="what logits are divided by; 0: the likeliest (default: 1)")
    how.add_argument("--top-k", type=int, help="draw from the so many likeliest (default: from all)")
    how.add_argument("--top-p", type=float, help="draw from the fewest that have this probability (default: from all)")
    how.add_argument("--repetition-penalty", type=float, help="above 1: what has occurred becomes less likely")
    unmasking = parser.add_argument_group("how text is unmasked")
    unmasking.add_argument(
        "--sampler",
        choices=["ancestral", "confidence"],
        help="reveal by chance, or the surest first (default: ancestral)",
    )
    unmasking.add_argument("--steps", type=int, help="in which a text is unmasked (default: 64)")
    unmasking.add_argument("--block", type=int, help="unmask blocks of so many tokens, from left to right")
    running = parser.add_argument_group("running and showing")
    running.add_argument("--method", choices=["causal", "diffusion"], help="default: as the model has learned")
    running.add_argument("--context", type=int, help="the most tokens of a text (default: as in training)")
    running.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default: auto)")
    running.add_argument("--batch-size", type=int, default=16, help="texts at a time (default: 16)")
    running.add_argument("--no-live", action="store_true", help="show texts only when they are done")
    running.add_argument("--json", action="store_true", help="print an object for each text, a line each")


def run(arguments: argparse.Namespace) -> None:
    """Generate and show.

    Raises:
        UserError: an argument is wrong, or the model cannot do what is asked.
    """
    params, prompts = settings(arguments), prompts_of(arguments)
    for flag in ("samples", "batch_size", "context"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected an integer of at least 1")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: expected an integer from 0 to 2^32 - 1")
    from stackwise.generation.generator import TextGenerator  # takes seconds
    from stackwise.training.device import choose
    from workflow.screen import Screen

    device = choose(ComputeParams(device=arguments.device), where="--device")
    texts = [prompt for prompt in prompts for _ in range(arguments.samples)]
    generator = TextGenerator.open(
        arguments.model,
        method=arguments.method,
        context=arguments.context,
        device=device,
        batch_size=min(len(texts), arguments.batch_size),
    )
    screen = None if arguments.json else Screen(sys.stdout, prompts=texts, live=not arguments.no_live)
    began, tokens = time.perf_counter(), 0
    for i, text in enumerate(generator.stream(texts, params, seed=arguments.seed, watcher=screen)):
        tokens += len(text.ids)
        if screen is None:
            print(json.dumps({**asdict(text), "text": text.text}, ensure_ascii=False), flush=True)
        else:
            screen.done(i, text)
    if sys.stderr.isatty():
        seconds = time.perf_counter() - began
        print(f"[{tokens} tokens with their prompts, {seconds:.1f} s]", file=sys.stderr)


def settings(arguments: argparse.Namespace) -> GenerationParams:
    """How text is to be made.

    Raises:
        UserError: naming every argument that cannot be.
    """
    given: dict[str, Any] = {key: getattr(arguments, key) for key in GenerationParams.model_fields if key != "ends"}
    given = {key: value for key, value in given.items() if value is not None}
    if arguments.no_end:
        given["ends"] = False
    try:
        params = GenerationParams.model_validate(given)
    except ValidationError as error:
        raise UserError("\n  ".join(_explained(error))) from None
    if problems := params.problems():
        raise UserError("\n  ".join(f"--{key.replace('_', '-')}: {message}" for key, message in problems))
    return params


def _explained(error: ValidationError) -> Iterator[str]:
    schema = GenerationParams.model_json_schema()
    for found in error.errors():
        key = str(found["loc"][0])
        part = at(schema, (key,))
        expected = in_words(schema, part) if part else found["msg"]
        yield f"--{key.replace('_', '-')} {found['input']}: expected {re.sub(',? or null', '', expected)}"


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file; an empty one if there are none.

    Raises:
        UserError: the file cannot be read.
    """
    prompts: list[str] = list(arguments.prompt)
    if (file := arguments.file) is not None:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"--file {file}: no such file") from None
        except OSError as error:
            raise UserError(f"--file {file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"--file {file}: not UTF-8 text; save it as UTF-8") from None
        found = [_prompt_of(line, n, file) for n, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines
        if not found:
            raise UserError(f"--file {file}: has no prompts; expected one a line")
        prompts += found
    return prompts or [""]


def _prompt_of(line: str, n: int, file: Path) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(
            f'--file {file}, prompt {n}: expected an object such as {{"prompt": "Once"}}, found {line[:60]}'
        )
    return prompt
