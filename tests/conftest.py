"""What tests tell at the end of a run."""

import pytest

COVERED = "covered"
"""Property of a test: a line for the summary."""


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
