"""Who is told how training goes, where nobody else asks."""

from collections.abc import Sequence


class Silent:
    """A watcher that tells nobody."""

    def resumed(self, step: int) -> None:
        """As `stackwise.training.loop.Watcher` says."""

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """As `stackwise.training.loop.Watcher` says."""
