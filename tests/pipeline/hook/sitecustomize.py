"""Holds one stage's script at a chosen point. The tests put it on PYTHONPATH; the product knows nothing of it.

So a test can kill a stage in the middle of what it does without hoping for good timing. The variable HOLD is JSON:
    stages: {stage: point}; a point is [event, pattern, count]: hold when the event happens for the count-th time.
        The event is one of Python's audit events (`open`, `os.rename`, ...) whose arguments match the pattern, or
        `call`: a function is entered whose name, `path/of/file.py:function`, ends with the pattern.
    marks: directory where the script says, in a file named after the stage, that it is held, and its process id.
        It goes on when there is a file `go`.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from types import FrameType


def _hold(stage: str, event: str, pattern: str, count: int, marks: Path) -> None:
    seen = 0

    def reached() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            partial = marks / f".{stage}.partial"
            partial.write_text(str(os.getpid()))
            partial.replace(marks / stage)
            while not (marks / "go").exists():
                time.sleep(0.02)

    def entered(frame: FrameType, what: str, _: object) -> None:
        if what == "call" and f"{frame.f_code.co_filename}:{frame.f_code.co_name}".endswith(pattern):
            reached()

    def audit(name: str, arguments: tuple[object, ...]) -> None:
        if name == event and re.search(pattern, " ".join(map(str, arguments))):
            reached()

    if event == "call":
        sys.setprofile(entered)
    else:
        sys.addaudithook(audit)


if "HOLD" in os.environ and any("workflow/scripts/" in word for word in sys.orig_argv):
    _orders = json.loads(os.environ["HOLD"])
    _stage = os.environ.get("DVC_STAGE", "")  # DVC tells every command whose it is
    if _stage in _orders["stages"]:
        _event, _pattern, _count = _orders["stages"][_stage]
        _hold(_stage, _event, _pattern, _count, Path(_orders["marks"]))
