"""Boundaries: the residual stream above some frozen stacks, identified by what determines it, remade when it is gone.

What the pipeline versions is a boundary's identity. Its bytes lie in a store (`stackwise.cache.store`) in a directory
that is named by the identity, outside the engines' sight; whoever needs a store and does not find all of it makes what
is missing.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stackwise.artifacts.code import digest_code
from stackwise.artifacts.manifest import REMEDY, Artifact, digest_json
from stackwise.cache.budget import in_use, make_room
from stackwise.cache.narrow import decode, encode
from stackwise.cache.sizes import DTYPES, boundary_bytes, boundary_shard_rows, rows_per_batch
from stackwise.cache.store import ActivationStore, DamagedShard, DamagedStore, StoreLayout
from stackwise.cache.variants import HeldVariants
from stackwise.config.params import Params
from stackwise.data.tokens import TokenDataset, Tokens
from stackwise.errors import UserError
from stackwise.growth.stack_objectives import objective_of_stack
from stackwise.model.context import Context, segments_of_documents
from stackwise.model.stack import Stack
from stackwise.objectives.targets import Objective, Task
from stackwise.objectives.words import Words
from stackwise.precision.dtypes import autocast
from stackwise.precision.trunk import TrunkStack
from stackwise.variants import sources as variant_sources

KIND = "boundary"
CODE = (
    "stackwise/adapters",
    *(f"stackwise/cache/{name}.py" for name in ("boundary", "narrow", "sizes")),
    "stackwise/data/order.py",
    "stackwise/data/tokens.py",
    "stackwise/model",
    *(f"stackwise/growth/{name}.py" for name in ("pretraining", "stack_objectives", "trunk")),
    *(f"stackwise/objectives/{name}.py" for name in ("corruption", "draws", "fixed", "masks")),
    *(f"stackwise/objectives/{name}.py" for name in ("schedules", "targets", "words")),
    "stackwise/precision",
)
"""The sources that determine a boundary's values, besides those of the architectures in the trunk."""

_GROUP_BYTES = 2**27
"""Activations that are in memory at once on their way through several stacks."""


@dataclass(frozen=True)
class Link:
    """A boundary that some training reads."""

    depth: int
    """Stacks below it, at least 1."""
    stack: int
    """The stack that trains on it: its masks are those that the boundary is made with."""
    sweep: int = 0
    """0 when that stack is added; 1, 2, ... when it is trained again."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `DEPTH:STACK[:SWEEP]`.

        Raises:
            ValueError, TypeError: the text is something else.
        """
        return cls(*map(int, text.split(":")))


@dataclass(frozen=True)
class Source:
    """Everything that determines the boundaries of a trunk.

    Raises:
        ValueError: the chain does not rise, or ends above the trunk.
    """

    params: Params
    """A view with seed, seq_len, objective, compute and trunk, and with what `objective_of_stack` wants."""
    tokens_artifact: Artifact
    tokens: TokenDataset
    """The training split."""
    mask_id: int
    eos_id: int
    trunk: Sequence[TrunkStack]
    """The frozen stacks, bottom to top."""
    chain: Sequence[Link]
    """The boundaries that earlier trainings read of the same trunk, each deeper than the one before; last the one that
    is wanted."""
    words: Words | None = None
    """Where whole words are masked."""

    @classmethod
    def of(
        cls, params: Params, artifact: Artifact, tokens: Tokens, trunk: Sequence[TrunkStack], chain: Sequence[Link]
    ) -> Self:
        """Of the training split of a tokens artifact, which is open as `tokens`."""
        vocabulary = tokens.vocabulary
        words = Words(tokens.word_starts, vocabulary.eos_id)
        return cls(params, artifact, tokens.train, vocabulary.mask_id, vocabulary.eos_id, trunk, chain, words)

    def __post_init__(self) -> None:
        depths = [0, *(link.depth for link in self.chain)]
        if not self.chain or any(a >= b for a, b in pairwise(depths)) or depths[-1] > len(self.trunk):
            raise ValueError(f"a chain of depths {depths[1:]} does not rise, or not within {len(self.trunk)} stacks")

    @property
    def compute_dtype(self) -> str:
        """Format of the trunk's matrix products."""
        return self.params.trunk.compute or self.params.compute.dtype

    def objective(self, link: Link) -> Objective:
        """What the stack that trains on a boundary learns: its masks are those that the boundary is made with."""
        return objective_of_stack(
            self.params,
            link.stack,
            self.trunk[0].shape.model.time,
            tokens=self.tokens,
            mask_id=self.mask_id,
            words=self.words,
            sweep=link.sweep,
        )

    def continues(self, i: int) -> bool:
        """Whether link `i` of the chain is made from link i - 1: where the same is masked in both."""
        if i == 0:
            return False
        below, link = self.chain[i - 1 : i + 1]
        return self.objective(link).identity() == self.objective(below).identity()

    def identity(self, link: Link) -> dict[str, Any]:
        """What a boundary is, as JSON values; `key` names its store. Equal boundaries of two trainings are the same."""
        params, objective, trunk = self.params, self.objective(link), self.trunk[: link.depth]
        determined_by = {
            "tokens": self.tokens_artifact.digest,
            "trunk": [stack.digest for stack in trunk],
            "seed": params.seed,
            "seq_len": params.seq_len,
            "objective": objective.identity(),
            "compute": {
                **params.compute.model_dump(include={"device", "threads", "deterministic"}),
                "dtype": self.compute_dtype,
            },
            "store": params.trunk.activations,
            "code": digest_code((*CODE, *variant_sources(stack.shape.stack_model(0) for stack in trunk))),
        }
        return {
            "depth": link.depth,
            "rows": len(self.tokens) * objective.variants,
            "variants": objective.variants,
            "seq": params.seq_len,
            "d_model": self.trunk[0].shape.model.d_model,
            "dtype": DTYPES[params.trunk.activations],
            "key": digest_json(determined_by),
        }


class Boundaries:
    """The stores of a chain of boundaries.

    Row `variant * samples + sample` holds what the frozen stacks make of that sample under that mask variant.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """
        Args:
            source: what determines them.
            device: computes what is missing.
            progress: is told (rows done, rows wanted) while something is made, by the thread that needs it.
        """
        self._source = source
        self._device = device
        self._progress = progress
        self._objective = lru_cache(maxsize=2)(source.objective)
        self._identity = lru_cache(source.identity)
        self._loaded: tuple[int, Stack] | None = None
        self._making = threading.RLock()  # guards _loaded
        self._settings = source.params.activations

    @contextmanager
    def open(self) -> Iterator["BoundaryReader"]:
        """A reader of the last boundary of the chain; what was missing has been made.

        Without `activations.store_all_time_steps` only some mask variants, the time steps of a sample, are there; the
        reader makes the others when it is asked for them.

        Raises:
            UserError: the stores do not fit the byte budget.
        """
        last = len(self._source.chain) - 1
        with self._store(last) as store:
            held = HeldVariants(store, self._variants(last), self._at_once(last), partial(self._complete, last, store))
            yield BoundaryReader(store, partial(self._remake, last, store), held if self._limited(last) else None)

    def facts(self) -> dict[str, Any]:
        """What the artifact of the last boundary tells: its identity, and what its format costs.

        `relative_error` is the Frobenius norm of what rounding to the format has changed in the first rows, over that
        of what the last stack put out in fp32. They are computed from the tokens: it depends on nothing else.
        """
        link = self._source.chain[-1]
        identity = self._identity(link)
        dtype, d_model = identity["dtype"], identity["d_model"]
        if dtype == "float32":
            return {**identity, "relative_error": 0.0}
        rows = _batches(self._layout(identity), 0)[0]
        with self._making, torch.inference_mode(), autocast(self._device, self._source.compute_dtype):
            x = self._embed(link)(rows)
            for i in range(link.depth):
                exact = self._stack(i)(x.to(self._device).float(), self._context(link, rows)).float()
                x = decode(encode(exact, dtype), dtype, d_model)
            self._loaded = None
            exact = exact.cpu().double()
            return {**identity, "relative_error": float((x.double() - exact).norm() / exact.norm())}

    @contextmanager
    def _store(self, i: int) -> Iterator[ActivationStore]:
        """The store of link `i`."""
        directory, layout = self._directory(i), self._layout(self._identity(self._source.chain[i]))
        with ExitStack() as stack:
            stack.enter_context(in_use(directory))
            try:
                store = ActivationStore.create(directory, layout)
            except (DamagedStore, ValueError):  # unreadable, or of another shard size: nothing in it can be used
                shutil.rmtree(directory, ignore_errors=True)
                store = ActivationStore.create(directory, layout)
            yield stack.enter_context(store)

    def _directory(self, i: int) -> Path:
        key: str = self._identity(self._source.chain[i])["key"]
        return Path(self._settings.directory) / key

    def _variants(self, i: int) -> int:
        count: int = self._identity(self._source.chain[i])["variants"]
        return count

    def _at_once(self, i: int) -> int:
        """How many mask variants of link `i` are on disk at the same time."""
        return min(self._settings.time_steps_at_once or self._variants(i), self._variants(i))

    def _limited(self, i: int) -> bool:
        return self._at_once(i) < self._variants(i)

    def _layout(self, identity: dict[str, Any]) -> StoreLayout:
        rows, seq, d_model, dtype = (identity[name] for name in ("rows", "seq", "d_model", "dtype"))
        activations = self._source.params.trunk.activations
        return StoreLayout(
            rows, seq, d_model, dtype, boundary_shard_rows(seq, d_model, activations, self._settings.shard_mb)
        )

    def _make_room(self, i: int, store: ActivationStore) -> None:
        layout, settings = store.layout, self._settings
        size = boundary_bytes(
            *(layout.rows, layout.seq, layout.d_model, self._source.params.trunk.activations, settings.shard_mb),
            variants=self._variants(i),
            at_once=self._at_once(i),
        )
        make_room(store.path, size, int(settings.budget_gb * 1e9))

    def _complete(self, i: int, store: ActivationStore, shards: list[int]) -> None:
        """Make `shards` of link `i`.

        From the boundary below in the chain, if it is made with the same masks; else from the tokens through the whole
        trunk. Either way one stack is in memory at a time, and rows are computed among the same others and rounded to
        the store's format at every stack: a boundary has the same bits whatever it is made from.
        """
        if not shards:
            return
        source, layout, link = self._source, store.layout, self._source.chain[i]
        with self._making, ExitStack() as opened:
            below = self._below(i, shards, opened)
            read: Callable[[np.ndarray], Tensor] = self._embed(link) if below is None else below.read
            stacks = range(0 if below is None else source.chain[i - 1].depth, link.depth)
            # Only now: what the boundary below was made from may go, the boundary below may not.
            self._make_room(i, store)
            # A group of shards passes through all stacks before the next begins.
            size = 1 if len(stacks) == 1 else max(1, _GROUP_BYTES // (layout.shard_rows * layout.row_bytes))
            opened.enter_context(torch.inference_mode())
            opened.enter_context(autocast(self._device, source.compute_dtype))
            wanted, done = sum(len(layout.shard_range(g)) for g in shards), 0
            for group in (shards[first : first + size] for first in range(0, len(shards), size)):
                batches = [rows for g in group for rows in _batches(layout, g)]
                streams: Iterable[Tensor] = map(read, batches)
                for k in stacks:
                    module, made = self._stack(k), []
                    for rows, x in zip(batches, streams, strict=True):
                        x = module(x.to(self._device).float(), self._context(link, rows))
                        made.append(encode(x, layout.dtype))
                        done += len(rows) * (k == stacks[-1])
                        self._progress(done, wanted)
                    streams = (decode(stored, layout.dtype, layout.d_model) for stored in made)
                finished = (stored.numpy() for stored in made)
                for g in group:
                    store.write_shard(g, np.concatenate(list(islice(finished, len(_batches(layout, g))))))
            self._loaded = None

    def _below(self, i: int, shards: list[int], opened: ExitStack) -> "BoundaryReader | None":
        """What link `i` is made from: the boundary below in the chain, with `shards` there; None: the tokens.

        Where few mask variants are on disk at once, it is made from a boundary below that happens to have them. None is
        made for it: all that those below it lack would come and go with each variant.
        """
        if not self._source.continues(i):
            return None
        if self._limited(i) and not self._directory(i - 1).exists():
            return None
        below = opened.enter_context(self._store(i - 1))
        lacking = sorted(set(below.missing()) & set(shards))
        if self._limited(i) and lacking:
            return None
        self._complete(i - 1, below, lacking)
        return BoundaryReader(below, partial(self._remake, i - 1, below))

    def _remake(self, i: int, store: ActivationStore, shard: int) -> None:
        store.drop_shard(shard)
        self._complete(i, store, [shard])

    def _embed(self, link: Link) -> Callable[[np.ndarray], Tensor]:
        """Makes boundary 0 of some rows."""
        embeddings = self._source.trunk[0].load_embeddings(self._device)
        return lambda rows: embeddings(torch.from_numpy(self._task(link, rows)[0].inputs).to(self._device))

    def _stack(self, k: int) -> Stack:
        """Stack `k` of the trunk; the latest stays in memory until another is asked for."""
        if self._loaded is None or self._loaded[0] != k:
            self._loaded = None
            self._loaded = k, self._source.trunk[k].load_stack(self._source.compute_dtype, self._device)
        return self._loaded[1]

    def _task(self, link: Link, rows: np.ndarray) -> tuple[Task, np.ndarray]:
        """What the stacks see in `rows`, and the tokens behind it `[n, seq]`."""
        variants, samples = np.divmod(rows, len(self._source.tokens))
        tokens = self._source.tokens.samples(samples)
        return self._objective(link)(tokens, samples, variants), tokens

    def _context(self, link: Link, rows: np.ndarray) -> Context:
        task, tokens = self._task(link, rows)
        segments = None
        if self._source.trunk[0].shape.model.document_mask:
            segments = segments_of_documents(torch.from_numpy(tokens), self._source.eos_id).to(self._device)
        times = torch.from_numpy(task.times.astype(np.float32)).to(self._device)
        return Context(causal=self._objective(link).causal, segments=segments, times=times)


class BoundaryReader:
    """Rows of a boundary; a damaged shard is remade on the way, and so is a mask variant that is not on disk."""

    def __init__(self, store: ActivationStore, remake: Callable[[int], None], held: HeldVariants | None = None) -> None:
        """
        Args:
            store: of the boundary.
            remake: makes a damaged shard again.
            held: where not all mask variants are on disk at once.
        """
        self._store = store
        self._remake = remake
        self._held = held
        self._reading = threading.Lock()  # or what one thread makes might go while another reads it

    def read(self, rows: np.ndarray, *, verify: bool = True) -> Tensor:
        """The activations of `rows` `[n]` -> `[n, seq, d_model]` on the CPU: fp32 from an fp32 store, else bf16.

        Args:
            rows: row numbers.
            verify: check the checksum of each row; once a pass over the store has done so, it need not be done again.
                Where variants come and go, every row is checked.
        """
        layout, held = self._store.layout, self._held
        stored = torch.empty((len(rows), layout.seq, layout.width), dtype=getattr(torch, layout.storage_dtype.name))
        with self._reading:
            if held is None:
                self._fill(stored.numpy(), rows, verify)
            else:
                turns = np.flatnonzero(np.diff(rows // held.samples)) + 1
                for slots, part in zip(np.split(stored.numpy(), turns), np.split(rows, turns), strict=True):
                    held.want(int(part[0]) // held.samples)
                    self._fill(slots, part, verify=True)
        return decode(stored, layout.dtype, layout.d_model)

    def _fill(self, slots: np.ndarray, rows: np.ndarray, verify: bool) -> None:
        """Read `rows` `[n]` into `slots` `[n, seq, width]`."""
        remade: set[int] = set()
        while True:
            try:
                return self._store.read_rows(rows, slots, verify=verify)
            except DamagedShard as damage:
                # One that is gone again was dropped by another process, which makes others of the same store.
                if damage.shard in remade and damage.path.exists():
                    raise UserError(
                        f"{damage.path}: damaged again after it was remade ({damage.reason}); check the disk"
                    ) from None
                remade.add(damage.shard)
                self._remake(damage.shard)


def check_identity(artifact: Artifact, source: Source) -> None:
    """Make sure that `artifact` names the last boundary of the chain.

    Raises:
        UserError: it is a boundary of another trunk, other tokens, parameters or code than those at hand.
    """
    identity = source.identity(source.chain[-1])
    if {name: artifact.facts.get(name) for name in identity} != identity:
        raise UserError(f"{artifact.path}: is a boundary of another trunk, tokens, parameters or code; {REMEDY}")


def _batches(layout: StoreLayout, shard: int) -> list[np.ndarray]:
    """The rows of a shard, as many at a time as are computed together."""
    rows, size = np.array(layout.shard_range(shard)), rows_per_batch(layout.seq, layout.d_model)
    return np.split(rows, range(size, len(rows), size))
