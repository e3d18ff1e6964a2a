"""Stage check_params: stop everything, before anything runs, where params.yaml cannot be what is meant.

Every script validates the whole file; this stage makes sure that DVC does too, even when no other stage has to run.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from stackwise.data.choices import read_choices
from stackwise.growth.pretrained import find_matrices
from stackwise.huggingface.checkpoint import check_start
from workflow.stage import StageRun, run_stage


def declare(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def work(run: StageRun) -> None:
    """What the file alone tells was found when it was loaded; left are the files on this disk that it names."""
    find_matrices(run.params.model, download=False)
    check_start(run.params)
    for own in run.params.evaluate.choices:
        read_choices(Path(own.file))
    run.say(f"{run.arguments.params} is valid: {run.params.n_stacks} stacks")


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
