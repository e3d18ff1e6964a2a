"""Stage train_stack: one training of the rack's growth.

What is in memory, what of it learns and what lies below is told by the arguments; the table of stages makes them from
`growth` and `adapters`.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.cache.boundary import KIND as BOUNDARY
from stackwise.cache.boundary import Link
from stackwise.data.tokens import KIND as TOKENS
from stackwise.growth.phases import Member
from stackwise.growth.stacks import KIND, Training
from stackwise.growth.training import PhaseInputs, train_phase
from stackwise.growth.trunk import trunk_of
from stackwise.precision.trunk import KIND as TRUNK
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.device import set_up
from workflow.training import finish, watcher


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--index", type=int, required=True, help="the stack whose parameters hold, from 0")
    parser.add_argument("--sweep", type=int, default=0, help="0 while the rack grows; which sweep over it, from 1")
    parser.add_argument(
        "--window",
        type=parse_member,
        nargs="+",
        required=True,
        metavar="STACK=ROLE",
        help="the stacks in memory, bottom to top: new, lora, weights, adapters, frozen or initial",
    )
    parser.add_argument("--embeddings", choices=["learn", "frozen"], default="frozen", help="what the embeddings do")
    parser.add_argument(
        "--masks", choices=["fresh", "recurring"], default="recurring", help="in each pass over the data"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--trainings", type=Path, nargs="+", default=[], help="earlier trainings that are gone on from")
    parser.add_argument("--copies", type=int, help="the stack that new ones may begin as a copy of")
    parser.add_argument("--quantized", type=Path, nargs="+", default=[], help="trunk artifacts of stacks in the window")
    parser.add_argument(
        "--trunk", type=Path, nargs="+", default=[], help="trunk artifacts below the window, bottom to top"
    )
    parser.add_argument("--adapted", type=Path, nargs="+", default=[], help="trainings that hold the trunk's adapters")
    parser.add_argument("--activations", type=Path, help="boundary artifact that stands for the trunk")
    parser.add_argument("--chain", type=Link.parse, nargs="+", default=[], help="boundaries up to this one")
    parser.add_argument("--known", type=int, help="the stack whose masks those above a new one have learned to read")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")
    parser.add_argument("--losses", type=Path, required=True, help="JSON file for the loss curve")


def parse_member(text: str) -> Member:
    """`STACK=ROLE`."""
    stack, role = text.split("=")
    return Member(int(stack), role)  # type: ignore[arg-type]


def work(run: StageRun) -> None:
    """Train."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.threads, seed=params.seed)
    roles = ["head" if path == args.trainings[-1] else f"training.{i}" for i, path in enumerate(args.trainings)]
    adapted = [Training(run.read(f"adapted.{i}", path, KIND)) for i, path in enumerate(args.adapted)]
    inputs = PhaseInputs(
        params=params,
        stack=args.index,
        sweep=args.sweep,
        members=args.window,
        embeddings_learn=args.embeddings == "learn",
        fresh=args.masks == "fresh",
        tokens=run.read("tokens", args.tokens, TOKENS),
        trainings=[Training(run.read(role, path, KIND)) for role, path in zip(roles, args.trainings, strict=True)],
        copies=args.copies,
        quantized=trunk_of([run.read(f"quantized.{i}", path, TRUNK) for i, path in enumerate(args.quantized)]),
        below=trunk_of([run.read(f"trunk.{i}", path, TRUNK) for i, path in enumerate(args.trunk)], adapted),
        boundary=None if args.activations is None else run.read("activations", args.activations, BOUNDARY),
        chain=args.chain,
        known=args.known,
    )
    own = params.stack_params(args.index)
    checkpoints = Checkpoints(run.checkpoint_file())
    trained = train_phase(
        inputs,
        device=device,
        checkpoints=checkpoints,
        watcher=watcher(run, steps=own.steps, batch_size=own.batch_size),
        progress=run.rows_made,
    )
    with run.publish(args.out, KIND) as draft:
        draft.facts |= trained.save(draft.directory)
    finish(run, trained.losses, checkpoints)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
