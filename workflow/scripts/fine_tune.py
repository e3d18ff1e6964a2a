"""Stage fine_tune: adapt the fused rack to one objective, on the corpus or on own data."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.finetuning.branch import save_tuned
from stackwise.finetuning.training import fine_tune
from stackwise.growth.racks import KIND, facts_of, save_rack
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.device import set_up
from workflow.training import finish, watcher


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--branch", required=True, help="name of the branch")
    parser.add_argument("--model", type=Path, required=True, help="fused rack")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact, of the corpus or of own data")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")
    parser.add_argument("--losses", type=Path, required=True, help="JSON file for the loss curve")


def work(run: StageRun) -> None:
    """Train one branch."""
    args, params = run.arguments, run.params
    branch = params.fine_tune[args.branch]
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    model, checkpoints = run.read("model", args.model, KIND), Checkpoints(run.checkpoint_file())
    tuned = fine_tune(
        params,
        args.branch,
        model.path,
        tokens,
        device=device,
        checkpoints=checkpoints,
        watcher=watcher(run, steps=branch.steps, batch_size=branch.batch_size),
    )
    with run.publish(args.out, KIND) as draft:
        save_tuned(branch, tuned, draft.directory, tokens.tokenizer, save_rack)
        learned = branch.objective
        known = facts_of(tuned.model, objective=learned, causal=learned == "clm", seq_len=params.seq_len)
        draft.facts |= {**known, **tuned.facts}
    finish(run, tuned.losses, checkpoints)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
