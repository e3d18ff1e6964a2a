"""What the benchmarks have in common: contestants that take turns, and a table of ratios with their targets."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One line of the table: a median, and what it should be at least (or, of a share of time, at most)."""

    name: str
    figure: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value keeps to its target, if it has one."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        target = "-"
        if self.at_least is not None:
            target = f">= {self.at_least:g}"
        elif self.at_most is not None:
            target = f"<= {self.at_most:g}"
        verdict = "" if target == "-" else "pass" if self.passed else "FAIL"
        return f"{self.name:<44} {self.figure:>12} {self.value:>8.3f} {target:>8}  {verdict}"


def take_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contestant returned in each round, after one round that does not count."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(contestants), len(contestants)):
            result = contestants[name]()
            if turn:
                results[name].append(result)
    return results


def report(lines: Iterable[Line], *, check: bool) -> int:
    """Print the table; the exit code: 1 if a target is missed and that counts (`check`), otherwise 0."""
    lines = list(lines)
    print(f"{'':<44} {'median':>12} {'ratio':>8} {'target':>8}")
    for line in lines:
        print(line)
    return int(check and not all(line.passed for line in lines))
