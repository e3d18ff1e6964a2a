"""Stage export: a rack as a model that Transformers loads."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.growth.racks import KIND as RACK
from stackwise.huggingface.exporting import KIND, export_rack


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--name", required=True, help="of the model, for its card")
    parser.add_argument("--model", type=Path, required=True, help="rack")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file with what was measured of it")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Export."""
    args = run.arguments
    rack = run.read("model", args.model, RACK)
    with run.publish(args.out, KIND) as draft:
        done = export_rack(
            rack,
            draft.directory,
            name=args.name,
            dtype=run.params.export.dtype,
            metrics=run.read_json(args.metrics),
        )
        draft.facts |= {"class": done.architecture, "code": list(done.reasons), "adapters": list(done.adapters)}
    run.say(f"{done.architecture}, {done.bytes / 1e6:,.1f} MB" + ", with code of its own" * bool(done.reasons))


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
