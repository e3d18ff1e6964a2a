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
from stackwise.objectives.targets import CausalObjective, MaskDiffusionObjective, Objective
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
    mask_id = tokens.vocabulary.mask_id
    objective: Objective
    if name == "clm":
        objective = CausalObjective()
    elif name == "mlm":
        one_rate = ObjectiveParams(mask_min=branch.mask_rate, mask_max=branch.mask_rate)
        objective = MaskDiffusionObjective(one_rate, params.seed, mask_id)
    else:
        objective = MaskDiffusionObjective(params.objective, params.seed, mask_id)
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
