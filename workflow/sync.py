"""What ties Snakemake to DVC: receipts.

A receipt is an empty file per stage, there if and only if DVC finds the stage current by content. Receipts are the only
outputs that Snakemake sees, so a missing one is the only thing that makes it run a job.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from stackwise.errors import UserError
from workflow.stages import RECEIPTS, Stage, render


def sync(stages: list[Stage]) -> None:
    """Bring dvc.yaml and the receipts up to date. Idempotent, and cheap beside starting Snakemake.

    Raises:
        UserError: DVC cannot tell what is current.
    """
    # DVC's commands say `python`: it must be the one that runs Snakemake.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    render(stages)
    RECEIPTS.mkdir(parents=True, exist_ok=True)
    began = time.time()
    old = stale(stages)
    for stage in stages:
        receipt = Path(stage.receipt)
        if stage.name not in old:
            receipt.touch()
        elif receipt.exists() and receipt.stat().st_mtime < began:  # not one that a running job has just left
            receipt.unlink()


def stale(stages: list[Stage]) -> set[str]:
    """Stages that DVC finds changed, with every stage downstream of one."""
    running: set[str] = set()
    answer = _dvc("status", "--json")
    if answer.returncode and _mend(answer.stderr):
        answer = _dvc("status", "--json")
    if answer.returncode and "is busy" in answer.stderr:  # a stage is running: ask about the others only
        writing = _being_written()
        running = _downstream(stages, {s.name for s in stages if writing & set(_made_by(s))})
        others = [s.name for s in stages if s.name not in running]
        answer = _dvc("status", "--json", *others) if others else subprocess.CompletedProcess([], 0, "{}", "")
    if answer.returncode:
        raise UserError(f"dvc status: {answer.stderr.strip() or 'failed'}")
    return _downstream(stages, running | set(json.loads(answer.stdout)))


def _mend(complaint: str) -> bool:
    """Put right what DVC complains of if a kill has left it; says whether it has.

    DVC writes these two files in place, and refuses every command while one is cut short.
    """
    lock, processes = Path("dvc.lock"), Path(".dvc/tmp/rwlock")
    if re.search(r"RWLock-file .* is corrupted", complaint):
        processes.unlink(missing_ok=True)  # DVC's notes of who is at work: none is that could be heard of
        return True
    if not re.search(r"dvc\.lock' (is invalid|validation failed)", complaint) or b"<<<<<<<" in lock.read_bytes():
        return False
    # What has run since the last commit is in DVC's run-cache: it is put in place, not run again.
    committed = subprocess.run(["git", "show", "HEAD:./dvc.lock"], capture_output=True)
    lock.unlink()
    if committed.returncode == 0:
        partial = lock.with_suffix(".partial")
        partial.write_bytes(committed.stdout)
        partial.replace(lock)
    return True


def _downstream(stages: list[Stage], first: set[str]) -> set[str]:
    """`first` and every stage that reads, directly or not, what one of them makes."""
    made_by = {path: stage.name for stage in stages for path in _made_by(stage)}
    found = set(first)
    for stage in stages:  # in topological order
        if any(made_by.get(path) in found for path in stage.inputs):
            found.add(stage.name)
    return found


def _made_by(stage: Stage) -> tuple[str, ...]:
    return (*stage.outputs, *stage.metrics, *stage.plots)


def _being_written() -> set[str]:
    """Outputs that some DVC process is writing just now (DVC's own record; it holds while a stage's command runs)."""
    try:
        lock = json.loads(Path(".dvc/tmp/rwlock").read_text())
    except (OSError, ValueError):
        return set()
    return {os.path.relpath(path) for path in lock.get("write", {})}


def _dvc(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    return subprocess.run(command, capture_output=True, text=True)
