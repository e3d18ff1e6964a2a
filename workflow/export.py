"""`stackwise export`: a rack as a model that others load."""

import argparse
import subprocess
from pathlib import Path

from stackwise.artifacts.manifest import publish, read
from stackwise.errors import UserError

DTYPES = ("fp32", "bf16", "fp16")


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: for Transformers (default)")
    parser.add_argument("--model", type=Path, required=True, help="rack: artifacts/fused, artifacts/finetuned/...")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=DTYPES, help="format of the weights (default: that of the rack)")
    parser.add_argument("--name", help="of the model, for its card (default: that of the directory)")
    parser.add_argument(
        "--metrics", type=Path, help="JSON file for the model card (default: what the pipeline measured of the rack)"
    )
    parser.add_argument("--force", action="store_true", help="replace what is in the directory")


def run(arguments: argparse.Namespace) -> None:
    """Export."""
    check_empty(arguments.out, force=arguments.force)
    from stackwise.growth.racks import KIND as RACK  # torch takes its time, and what is wrong above needs none of it
    from stackwise.huggingface.exporting import KIND, export_rack, read_metrics

    rack = read(arguments.model, RACK)
    file = arguments.metrics or _metrics_of(arguments.model)
    metrics = None if file is None else read_metrics(file)
    dtype = arguments.dtype
    name = arguments.name or arguments.out.resolve().name
    with publish(arguments.out, kind=KIND, params={"dtype": dtype}, inputs={"model": rack}) as draft:
        done = export_rack(rack, draft.directory, name=name, dtype=dtype, metrics=metrics, commit=_commit())
    trust = ", trust_remote_code=True" if done.reasons else ""
    print(f"{arguments.out}: {done.architecture}, {done.bytes / 1e6:,.1f} MB of {done.dtype} weights")
    print(f'load it with {done.auto_class}.from_pretrained("{arguments.out}"{trust})')
    if done.reasons:
        reasons = "; ".join(done.reasons)
        print(
            f"It brings Python files along, which `trust_remote_code=True` has run: no class of Transformers computes "
            f"{reasons}."
        )
    for adapters in done.adapters:
        print(f'and then PeftModel.from_pretrained(model, "{arguments.out / adapters}")')


def check_empty(directory: Path, *, force: bool) -> None:
    """See to it that nothing is lost.

    Raises:
        UserError: something is there, and is not to be replaced.
    """
    if directory.is_file() or directory.is_symlink():
        raise UserError(f"--out {directory}: is a file or a link; give a directory, or a path where nothing is")
    if not force and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--out {directory}: is not empty; give another directory, or --force to replace what is there")


def _metrics_of(model: Path) -> Path | None:
    """What the pipeline that has made a rack has measured of it."""
    parts = model.resolve().parts
    if "artifacts" not in parts:
        return None
    root = Path(*parts[: len(parts) - parts[::-1].index("artifacts") - 1])
    name = "fused" if parts[-1] == "joint" else parts[-1]
    file = root / "metrics" / f"{name}.json"
    return file if file.is_file() else None


def _commit() -> str | None:
    """The commit that is checked out in the current directory."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
