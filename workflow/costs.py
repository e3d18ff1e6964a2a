"""What each stage has cost, from the records of its latest execution."""

from pathlib import Path

from stackwise.tracking.record import RECORDS, read_record
from workflow.stages import Stage


def latest_costs(stages: list[Stage], records: Path = RECORDS) -> list[tuple[str, float, float]]:
    """(name, seconds, peak bytes) of each stage that has finished here, in the order of `stages`."""
    latest: dict[str, tuple[float, float]] = {}
    for path in sorted(records.glob("*.jsonl")):  # names begin with the time
        events = read_record(path)
        if events and events[-1]["event"] == "end" and events[-1]["status"] == "finished":
            latest[events[0]["stage"]] = (events[-1]["seconds"], events[-1]["peak_memory"])
    return [(stage.name, *latest[stage.name]) for stage in stages if stage.name in latest]
