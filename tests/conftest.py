"""What tests tell at the end of a run."""

import pytest

COVERED = "covered"
"""Property of a test: a line for the summary."""
LONGEST = ("test_killed_in_every_kind_of_stage", "test_commands")
"""What the names of the tests that take minutes begin with."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that take minutes come first, so that at the end no process waits for another."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests say that they have covered."""
    lines = [
        str(value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == COVERED
    ]
    if lines:
        terminalreporter.section("parameters that went through the pipeline, and what they changed")
        for line in sorted(lines):
            terminalreporter.line(line)
