"""Stage fine_tune: adapt the fused rack to one objective; all stacks train."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.config.objective import ObjectiveParams
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.racks import KIND
from stackwise.training.device import set_up
from workflow.training import tune_rack


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--objective", choices=["clm", "mlm", "diffusion"], required=True, help="what to learn")
    parser.add_argument("--model", type=Path, required=True, help="fused rack")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")
    parser.add_argument("--losses", type=Path, required=True, help="JSON file for the loss curve")


def work(run: StageRun) -> None:
    """Train one branch."""
    params, name = run.params, run.arguments.objective
    branch = getattr(params.fine_tune, name)
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", run.arguments.tokens, TOKENS), params.seq_len)
    if name == "clm":
        objective = ObjectiveParams(type="clm")
    elif name == "mlm":
        objective = ObjectiveParams(
            type="mlm",
            mask_min=branch.mask_rate,
            mask_max=branch.mask_rate,
            unit=branch.unit,
            random_share=branch.random_share,
            keep_share=branch.keep_share,
        )
    else:  # as in pretraining, but for the inputs of mlm that show other tokens
        objective = params.objective.model_copy(update={"type": "diffusion", "random_share": 0.0, "keep_share": 0.0})
    tune_rack(
        run,
        run.read("model", run.arguments.model, KIND),
        tokens,
        objective,
        steps=branch.steps,
        batch_size=branch.batch_size,
        lr=branch.lr,
        device=device,
    )


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
