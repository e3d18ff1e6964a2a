"""Stage quantize_trunk: a trained stack in the format in which it serves as frozen ground for the next."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.growth.stacks import KIND as STACK
from stackwise.growth.stacks import Training
from stackwise.precision.trunk import KIND, quantize_stack


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--index", type=int, required=True, help="which stack, from 0")
    parser.add_argument("--training", type=Path, required=True, help="the training that has left it so")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Quantize one stack."""
    args, params = run.arguments, run.params
    stack = Training(run.read("training", args.training, STACK)).stack(args.index)
    with run.publish(args.out, KIND) as draft:
        draft.facts |= quantize_stack(stack, draft.directory, params.trunk.precision_of(args.index))
        run.say(f"{draft.facts['precision']}, relative error {draft.facts['relative_error']:.2e}")


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
