"""How fast, and how clearly, bad params files are refused: every one of tests/bad_params.py, by every way into the pipeline.

Prints a table with exit code, seconds and the first line of the message, and the worst time of each way; exits with 1
if some file is not refused with exit code 1 (DVC: 255, which it makes of every failure) or leaves something behind.

    python benchmarks/bad_params.py [--only script|snakemake|dvc]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.bad_params import CASES, Case

WAYS = {
    "script": (1, ("python", "workflow/scripts/train_stack.py")),
    "snakemake": (1, ("snakemake", "--cores", "1")),
    "dvc": (255, ("dvc", "repro")),
}
LIMIT = 1.5
"""Seconds."""


def make_project(root: Path) -> None:
    """A copy of this repository's working tree without what it has made."""
    names = ("stackwise", "workflow", "profiles", "Snakefile", "dvc.yaml", ".dvc/config", ".dvcignore", ".gitignore")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(root / name)], check=True)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)


def refuse(root: Path, case: Case, command: tuple[str, ...]) -> tuple[int, float, str]:
    """Exit code, seconds and the first line that says what is wrong."""
    path = root / "params.yaml"
    path.unlink(missing_ok=True)
    if case.content is not None:
        path.write_bytes(case.content)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]
    return done.returncode, seconds, lines[0] if lines else "(no message)"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WAYS, help="one way")
    only = parser.parse_args().only
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_project(root)
        dvc_yaml = (root / "dvc.yaml").read_bytes()
        for way, (expected, command) in WAYS.items():
            if only not in (None, way):
                continue
            print(f"\n{' '.join(command)}")
            refuse(root, CASES[0], command)  # once, so that Python has compiled everything
            times = {}
            for case in CASES:
                code, times[case.name], message = refuse(root, case, command)
                left = [n for n in ("artifacts", "metrics", "logs", ".stackwise", "dvc.lock") if (root / n).exists()]
                wrong = (
                    code != expected or "no message" in message or left or (root / "dvc.yaml").read_bytes() != dvc_yaml
                )
                failed |= bool(wrong)
                note = f"  LEFT {left}" if left else "  WRONG" if wrong else ""
                print(f"{case.name:48}{code:4}  {times[case.name]:5.2f} s  {message[:100]}{note}", flush=True)
            worst = max(times, key=lambda name: times[name])
            median = sorted(times.values())[len(times) // 2]
            print(f"{len(times)} files, median {median:.2f} s, worst {times[worst]:.2f} s ({worst}), limit {LIMIT} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
