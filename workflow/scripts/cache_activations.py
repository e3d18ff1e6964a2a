"""Stage cache_activations: run the training data through the frozen stacks and keep what comes out for the next one.

The artifact is the boundary's identity. The activations lie in a store that is named by it (see
`activations.directory`); whoever needs a store that is gone makes it again.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.cache.boundary import KIND, Boundaries, Link, Source
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.stacks import KIND as STACK
from stackwise.growth.stacks import Training
from stackwise.growth.trunk import trunk_of
from stackwise.precision.trunk import KIND as TRUNK
from stackwise.training.device import set_up


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--index", type=int, required=True, help="the stack that trains on the boundary")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--trunk", type=Path, nargs="+", required=True, help="trunk artifacts below it, bottom to top")
    parser.add_argument("--adapted", type=Path, nargs="+", default=[], help="trainings that hold the trunk's adapters")
    parser.add_argument(
        "--chain",
        type=Link.parse,
        nargs="+",
        required=True,
        metavar="DEPTH:STACK[:SWEEP]",
        help="the boundaries on the way, lowest first: stacks below, and who trains on it; the last is this one",
    )
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Make the store of one boundary and publish its identity."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.threads, seed=params.seed)
    tokens_artifact = run.read("tokens", args.tokens, TOKENS)
    tokens = open_tokens(tokens_artifact, params.seq_len)
    adapted = [Training(run.read(f"adapted.{i}", path, STACK)) for i, path in enumerate(args.adapted)]
    trunk = trunk_of([run.read(f"trunk.{i}", path, TRUNK) for i, path in enumerate(args.trunk)], adapted)
    source = Source.of(params, tokens_artifact, tokens, trunk, args.chain)
    boundaries = Boundaries(source, device=device, progress=run.rows_made)
    with boundaries.open(), run.publish(args.out, KIND) as draft:
        draft.facts |= boundaries.facts()


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
