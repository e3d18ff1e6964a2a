"""How fast, and how clearly, bad params files are refused: each of tests/bad_params.py, by each way into the pipeline.

    python benchmarks/bad_params.py [--only script|snakemake|dvc] [--check]

Prints a table with exit code, time (on the clock, and of the processors, which other work on the machine changes
less) and the first line of the message. Exits with 1 if some file is not refused with exit code 1 (under DVC 255, which
it makes of every failure), without a message, or leaves something behind; with --check also if some refusal takes too
long. Run it on an idle machine.
"""

import argparse
import os
import resource
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


def refuse(root: Path, case: Case, command: tuple[str, ...]) -> tuple[int, float, float, str]:
    """Exit code, seconds, seconds of the processors and the first line that says what is wrong."""
    path = root / "params.yaml"
    path.unlink(missing_ok=True)
    if case.content is not None:
        path.write_bytes(case.content)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    began, used = time.perf_counter(), _processor_time()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]
    return done.returncode, seconds, _processor_time() - used, lines[0] if lines else "(no message)"


def _processor_time() -> float:
    """Of all child processes so far (seconds)."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WAYS, help="one way")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 if a refusal takes more than {LIMIT} s")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_project(root)
        dvc_yaml = (root / "dvc.yaml").read_bytes()
        for way, (expected, command) in WAYS.items():
            if arguments.only not in (None, way):
                continue
            print(f"\n{' '.join(command)}")
            refuse(root, CASES[0], command)  # once, so that Python has compiled everything
            times = {}
            for case in CASES:
                code, seconds, cpu, message = refuse(root, case, command)
                times[case.name] = seconds
                left = [n for n in ("artifacts", "metrics", "logs", ".stackwise", "dvc.lock") if (root / n).exists()]
                if (root / "dvc.yaml").read_bytes() != dvc_yaml:
                    left.append("dvc.yaml")
                wrong = code != expected or "no message" in message or bool(left)
                failed |= wrong
                note = f"  LEFT {left}" if left else "  WRONG" if wrong else ""
                print(f"{case.name:46}{code:4} {seconds:6.2f} s {cpu:6.2f} s cpu  {message[:96]}{note}", flush=True)
            worst = max(times, key=lambda name: times[name])
            failed |= arguments.check and times[worst] > LIMIT
            median = sorted(times.values())[len(times) // 2]
            print(f"{len(times)} files, median {median:.2f} s, worst {times[worst]:.2f} s ({worst}), limit {LIMIT} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
