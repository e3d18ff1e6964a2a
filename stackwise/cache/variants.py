"""The mask variants of a boundary that are on disk at the same time."""

from collections.abc import Callable

from stackwise.cache.sizes import shards_of
from stackwise.cache.store import ActivationStore


class HeldVariants:
    """Keeps those variants of a store on disk that were wanted last; the others make room for them.

    A shard is there as long as any of its rows belongs to a variant that is held. Not to be used by several threads at
    once.
    """

    def __init__(
        self, store: ActivationStore, variants: int, at_once: int, complete: Callable[[list[int]], None]
    ) -> None:
        """Hold as many variants as may be: those that are there already, then the first ones.

        Args:
            store: row `variant * samples + sample` holds a sample under a variant.
            variants: how many there are.
            at_once: how many are held.
            complete: makes shards of the store.
        """
        self.samples = store.layout.rows // variants
        self._store = store
        self._complete = complete
        self._at_once = at_once
        missing = set(store.missing())
        there = [v for v in range(variants) if not self._shards([v]) & missing]
        self._held = [*there, *(v for v in range(variants) if v not in there)][:at_once]
        self._settle()

    def want(self, variant: int) -> None:
        """Have a variant on disk; one that was not there takes the place of the least recently wanted."""
        there = variant in self._held
        self._held = [*(v for v in self._held if v != variant), variant][-self._at_once :]
        if not there:
            self._settle()

    def _settle(self) -> None:
        held = self._shards(self._held)
        for g in range(self._store.layout.shards):
            if g not in held:
                self._store.drop_shard(g)
        self._complete(sorted(held & set(self._store.missing())))

    def _shards(self, variants: list[int]) -> set[int]:
        return shards_of(variants, self.samples, self._store.layout.shard_rows)
