"""Stage fuse: merge the trained stacks, in full precision, into one rack."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import TOKENIZER
from stackwise.growth.depth import fraction_of_stack
from stackwise.growth.fusing import fuse
from stackwise.growth.racks import KIND, facts_of, save_rack
from stackwise.growth.stacks import KIND as STACK
from stackwise.growth.stacks import Training
from stackwise.growth.trunk import adapted_stacks
from stackwise.precision.trunk import KIND as TRUNK


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument(
        "--trainings", type=Path, nargs="+", required=True, help="trainings, in the order they took place"
    )
    parser.add_argument("--order", type=int, nargs="+", required=True, help="the stacks of the rack, bottom to top")
    parser.add_argument(
        "--trunk", type=Path, nargs="+", default=[], help="trunk artifacts that adapters have learned on"
    )
    parser.add_argument("--depth-as-time", action="store_true", help="a sample with fewer masks may enter higher up")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact, for the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Fuse."""
    args, params = run.arguments, run.params
    trainings = [Training(run.read(f"training.{i}", path, STACK)) for i, path in enumerate(args.trainings)]
    trunk = [run.read(f"trunk.{i}", path, TRUNK) for i, path in enumerate(args.trunk)]
    tokens = run.read("tokens", args.tokens, TOKENS)
    times = (fraction_of_stack(params, k, params.model.time) for k in args.order) if args.depth_as_time else ()
    entries = [t for t in times if t is not None]
    rack = fuse(trainings, args.order, adapted_stacks(trunk, trainings), merged=params.adapters.merge, entries=entries)
    learned = params.objective
    with run.publish(args.out, KIND) as draft:
        save_rack(draft.directory, rack, tokens.path / TOKENIZER)
        draft.facts |= {
            **facts_of(rack, objective=learned.type, causal=learned.looks_back, seq_len=params.seq_len),
            "parameters": sum(p.numel() for p in rack.parameters()),
            "steps": trainings[-1].artifact.facts["steps_in_all"],
        }
    run.say(f"{len(args.order)} stacks, {draft.facts['parameters']:,} parameters")


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
