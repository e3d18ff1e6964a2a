"""Stage sample: texts of one model, for the report."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.config.generation import GenerationParams
from stackwise.generation.generator import TextGenerator
from stackwise.generation.prompts import fills_in
from stackwise.growth.racks import KIND as RACK
from stackwise.training.device import set_up

KIND = "samples"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--model", type=Path, required=True, help="fused or fine-tuned rack")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Generate."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    generator = TextGenerator.of(run.read("model", args.model, RACK), device=device)
    own = params.samples
    prompts = [prompt for prompt in own.prompts if generator.method == "diffusion" or not fills_in(prompt)]
    # Only what means something to this model is declared, and there.
    settings = {key: getattr(own, key) for key in GenerationParams.model_fields if key in vars(own)}
    texts = generator.generate(
        [prompt for prompt in prompts for _ in range(own.number)], GenerationParams(**settings), seed=params.seed
    )
    for text in texts:
        run.say(repr(text.text if len(text.text) <= 100 else f"{text.text[:97]}..."))
    run.record.add("text", file="samples.txt", text="\n\n".join(text.text for text in texts) + "\n")
    with run.publish(args.out, KIND) as draft:
        lines = (json.dumps(asdict(text), ensure_ascii=False) + "\n" for text in texts)
        (draft.directory / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        draft.facts |= {"method": generator.method, "texts": len(texts)}


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
