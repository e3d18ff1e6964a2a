"""The record of one stage execution: a line of JSON per event, written by the stage itself.

MLflow is fed from it by another process (`stackwise.tracking.follow`), so that nothing that happens to a
tracking server can reach a training stage. What ran, and what it read and wrote, is told by these files, not
by an engine's log.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECORDS = Path(".stackwise/records")
"""Where records lie, relative to the project."""
FOLLOWER_LOCK = "follower.lock"
FOLLOWER_LOG = "follower.log"


class Record:
    """Appends events to a new file in `RECORDS`.

    Events (key `event`), each with `time` in seconds since 1970:

    - `start`: stage, stack (or null), pid, argv, git (commit or null), params (those that the stage declares, nested or
      under dotted names), pipeline (all of params.yaml), config (digest, hex, of all that change results), tracking
      (the section).
    - `input`, `output`: role, path, kind, digest of an artifact.
    - `resumed`: step.
    - `metrics`: step, values {name: number}.
    - `steps`: first (step), values {name: [number per step]}: the same for consecutive steps, shorter.
    - `depth`: stack, values {name: number}: a point of curves over the depth of the rack.
    - `result`: values {name: number}; of the whole stage. A name with a dot is `<model>.<measure>`, such as
      `fused.nelbo_bits_per_byte`: measured on a model, and therefore shown for the whole pipeline too.
    - `text`: file, text: something to read, as a file of the run.
    - `end`: status (finished | failed), seconds, peak_memory (bytes), modules (of this project, that were imported).
    """

    def __init__(self, stage: str, facts: dict[str, Any], *, follow: bool) -> None:
        RECORDS.mkdir(parents=True, exist_ok=True)
        self.began = time.time()
        second = time.strftime("%Y%m%d-%H%M%S", time.localtime(self.began))
        milliseconds = int(self.began % 1 * 1000)
        self.path = RECORDS / f"{second}-{milliseconds:03}-{stage}-{os.getpid()}.jsonl"
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._follow = follow
        self.add("start", stage=stage, pid=os.getpid(), argv=sys.argv, git=git_commit(), **facts)
        self._wake_follower()

    def add(self, event: str, **facts: Any) -> None:
        """Append one event."""
        self._file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")

    def close(self, status: str, **facts: Any) -> None:
        """Append the last event."""
        self.add("end", status=status, seconds=time.time() - self.began, **facts)
        self._file.close()
        self._wake_follower()

    def _wake_follower(self) -> None:
        """Start the process that feeds MLflow, unless one is there."""
        if not self._follow:
            return
        # The shell leaves it in the background and is gone: a stage has no child that it did not ask for.
        command = ["/bin/sh", "-c", '"$@" &', "sh", sys.executable, "-m", "stackwise.tracking.follow"]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        try:
            with (RECORDS / FOLLOWER_LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (RECORDS / FOLLOWER_LOG).open("a") as log:
                subprocess.run(
                    command,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": path},
                )
        except OSError:  # BlockingIOError: one is there. All else is no reason for a stage to fail.
            return


_ROOT = Path(__file__).resolve().parents[2]


def git_commit() -> str | None:
    """The checked-out commit, or None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def read_record(path: Path) -> list[dict[str, Any]]:
    """The events of a record; a last line that was cut off by a kill is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events
