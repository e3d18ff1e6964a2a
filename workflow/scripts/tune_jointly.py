"""Stage tune_jointly: train all stacks of the fused rack together, for a share of the steps they took one by one."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.racks import KIND
from stackwise.training.device import set_up
from workflow.training import tune_rack


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--model", type=Path, required=True, help="fused rack")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")
    parser.add_argument("--losses", type=Path, required=True, help="JSON file for the loss curve")


def work(run: StageRun) -> None:
    """Train the whole rack."""
    params, joint = run.params, run.params.joint
    device = set_up(params.compute, threads=params.compute.threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", run.arguments.tokens, TOKENS), params.seq_len)
    model = run.read("model", run.arguments.model, KIND)
    tune_rack(
        run,
        model,
        tokens,
        params.objective,
        steps=max(1, round(joint.share * model.facts["steps"])),
        batch_size=joint.batch_size,
        lr=joint.lr,
        device=device,
    )


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
