"""Boundaries: the residual stream between two stacks, identified by what determines it, remade when its store is gone.

What the pipeline versions is a boundary's identity. Its bytes lie in a store (`stackwise.cache.store`) in a directory
that is named by the identity, outside the engines' sight; whoever needs a store and does not find all of it makes what
is missing.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackwise.artifacts.code import digest_code
from stackwise.artifacts.manifest import REMEDY, Artifact, digest_json
from stackwise.cache.budget import in_use, make_room
from stackwise.cache.store import ActivationStore, DamagedShard, DamagedStore, StoreLayout, rows_per_shard
from stackwise.config.params import Params
from stackwise.data.tokens import TokenDataset
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
    "stackwise/cache/boundary.py",
    "stackwise/data/order.py",
    "stackwise/data/tokens.py",
    "stackwise/model",
    *(f"stackwise/growth/{name}.py" for name in ("pretraining", "stack_objectives")),
    *(f"stackwise/objectives/{name}.py" for name in ("corruption", "draws", "fixed", "masks")),
    *(f"stackwise/objectives/{name}.py" for name in ("schedules", "targets", "words")),
    "stackwise/precision",
)
"""The sources that determine a boundary's values, besides those of the architectures in the trunk."""

_BATCH_BYTES = 2**23
_BATCH_ROWS = 32
_GROUP_BYTES = 2**27
"""Activations that are in memory at once on their way through a whole trunk."""
_STORE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Source:
    """Everything that determines boundaries 1, 2, ... of a rack."""

    params: Params
    """A view with seed, seq_len, objective, compute and trunk, and with what `objective_of_stack` wants."""
    tokens_artifact: Artifact
    tokens: TokenDataset
    """The training split."""
    mask_id: int
    eos_id: int
    trunk: Sequence[TrunkStack]
    """Stacks 0 ... k - 1."""
    words: Words | None = None
    """Where whole words are masked."""

    def objective(self, k: int) -> Objective:
        """What stack `k` learns on boundary `k`: its masks are those that the boundary is made with."""
        time = self.trunk[0].shape.model.time
        return objective_of_stack(self.params, k, time, tokens=self.tokens, mask_id=self.mask_id, words=self.words)

    def continues(self, k: int) -> bool:
        """Whether boundary `k` is made from boundary k - 1: where both stacks mask the same."""
        return k > 1 and self.objective(k).identity() == self.objective(k - 1).identity()

    def identity(self, k: int) -> dict[str, Any]:
        """What boundary `k` is, as JSON values; `key` names its store."""
        params, objective = self.params, self.objective(k)
        determined_by = {
            "tokens": self.tokens_artifact.digest,
            "trunk": [stack.artifact.digest for stack in self.trunk[:k]],
            "seed": params.seed,
            "seq_len": params.seq_len,
            "objective": objective.identity(),
            "compute": params.compute.model_dump(include={"device", "dtype", "threads", "deterministic"}),
            "store": params.trunk.activations,
            "code": digest_code((*CODE, *variant_sources(s.shape.stack_model(0) for s in self.trunk[:k]))),
        }
        return {
            "index": k,
            "rows": len(self.tokens) * objective.variants,
            "variants": objective.variants,
            "seq": params.seq_len,
            "d_model": self.trunk[0].shape.model.d_model,
            "dtype": _STORE_DTYPES[params.trunk.activations],
            "key": digest_json(determined_by),
        }


class Boundaries:
    """The stores of boundaries 1 ... k over one trunk.

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
            progress: is told (rows done, rows wanted) while something is made.
        """
        self._source = source
        self._device = device
        self._progress = progress
        self._objective = lru_cache(maxsize=2)(source.objective)
        self._loaded: tuple[int, Stack] | None = None
        settings = source.params.activations
        self._directory = Path(settings.directory)
        self._budget = int(settings.budget_gb * 1e9)
        self._shard_bytes = settings.shard_mb * 2**20

    @contextmanager
    def open(self, k: int) -> Iterator["BoundaryReader"]:
        """A reader of boundary `k`, all of which exists; what was missing has been made.

        Raises:
            UserError: the stores do not fit the byte budget.
        """
        with self._store(k) as store:
            self._complete(k, store, store.missing())
            yield BoundaryReader(store, lambda shard: self._remake(k, store, shard))

    @contextmanager
    def _store(self, k: int) -> Iterator[ActivationStore]:
        identity = self._source.identity(k)
        directory = self._directory / identity["key"]
        layout = self._layout(identity)
        with ExitStack() as stack:
            stack.enter_context(in_use(directory))
            try:
                store = ActivationStore.create(directory, layout)
            except (DamagedStore, ValueError):  # unreadable, or of another shard size: nothing in it can be used
                shutil.rmtree(directory, ignore_errors=True)
                store = ActivationStore.create(directory, layout)
            yield stack.enter_context(store)

    def _layout(self, identity: dict[str, Any]) -> StoreLayout:
        seq, d_model, dtype = identity["seq"], identity["d_model"], identity["dtype"]
        row_bytes = seq * d_model * (4 if dtype == "float32" else 2)
        # Whole batches to a shard: then a row is always computed among the same others, whatever the shard size, which
        # keeps its bits the same.
        batch = _batch_rows(row_bytes)
        shard_rows = max(1, rows_per_shard(row_bytes, self._shard_bytes) // batch) * batch
        return StoreLayout(rows=identity["rows"], seq=seq, d_model=d_model, dtype=dtype, shard_rows=shard_rows)

    def _complete(self, k: int, store: ActivationStore, shards: list[int]) -> None:
        """Make `shards` of boundary `k`.

        If the stack below masks the same, from boundary k - 1, of which what is missing is made first; else from the
        tokens through the whole trunk. Either way one stack is in memory at a time, and rows are computed among the
        same others and rounded between stacks: a boundary has the same bits whatever it is made from.
        """
        if not shards:
            return
        source, layout = self._source, store.layout
        read: Callable[[np.ndarray], Tensor]
        with ExitStack() as stack:
            if source.continues(k):
                below = stack.enter_context(self._store(k - 1))
                self._complete(k - 1, below, sorted(set(below.missing()) & set(shards)))
                read = BoundaryReader(below, lambda shard: self._remake(k - 1, below, shard)).read
                stacks = [k - 1]
            else:
                read = self._embed(k)
                stacks = list(range(k))
            # A group of shards passes through all stacks before the next begins.
            size = 1 if len(stacks) == 1 else max(1, _GROUP_BYTES // (layout.shard_rows * layout.row_bytes))
            # Only now: what the boundary below was made from may go, the boundary below may not.
            make_room(store.path, layout.total_bytes, self._budget)
            stack.enter_context(torch.inference_mode())
            stack.enter_context(autocast(self._device, source.params.compute.dtype))
            wanted, done = sum(len(layout.shard_range(g)) for g in shards), 0
            for group in (shards[i : i + size] for i in range(0, len(shards), size)):
                batches = [rows for g in group for rows in _batches(layout, g)]
                streams: Iterable[Tensor] = map(read, batches)
                for i in stacks:
                    module, made = self._stack(i), []
                    for rows, x in zip(batches, streams, strict=True):
                        x = module(x.to(self._device).float(), self._context(k, rows))
                        made.append(x.to(_torch_dtype(layout.dtype)).cpu().contiguous())
                        done += len(rows) * (i == stacks[-1])
                        self._progress(done, wanted)
                    streams = made
                finished = map(_as_stored, streams)
                for g in group:
                    store.write_shard(g, np.concatenate(list(islice(finished, len(_batches(layout, g))))))
            self._loaded = None

    def _embed(self, k: int) -> Callable[[np.ndarray], Tensor]:
        """Makes boundary 0 of some rows of boundary `k`."""
        embeddings = self._source.trunk[0].load_embeddings(self._device)
        return lambda rows: embeddings(torch.from_numpy(self._task(k, rows)[0].inputs).to(self._device))

    def _stack(self, i: int) -> Stack:
        """Stack `i` of the trunk; the latest stays in memory until another is asked for."""
        if self._loaded is None or self._loaded[0] != i:
            self._loaded = None
            self._loaded = i, self._source.trunk[i].load_stack(self._source.params.compute.dtype, self._device)
        return self._loaded[1]

    def _remake(self, k: int, store: ActivationStore, shard: int) -> None:
        store.drop_shard(shard)
        self._complete(k, store, [shard])

    def _task(self, k: int, rows: np.ndarray) -> tuple[Task, np.ndarray]:
        """What the stacks see in `rows` of boundary `k`, and the tokens behind it `[n, seq]`."""
        variants, samples = np.divmod(rows, len(self._source.tokens))
        tokens = self._source.tokens.samples(samples)
        return self._objective(k)(tokens, samples, variants), tokens

    def _context(self, k: int, rows: np.ndarray) -> Context:
        task, tokens = self._task(k, rows)
        segments = None
        if self._source.trunk[0].shape.model.document_mask:
            segments = segments_of_documents(torch.from_numpy(tokens), self._source.eos_id).to(self._device)
        times = torch.from_numpy(task.times.astype(np.float32)).to(self._device)
        return Context(causal=self._objective(k).causal, segments=segments, times=times)


class BoundaryReader:
    """Rows of a boundary; a damaged shard is remade on the way."""

    def __init__(self, store: ActivationStore, remake: Callable[[int], None]) -> None:
        self._store = store
        self._remake = remake

    def read(self, rows: np.ndarray, *, verify: bool = True) -> Tensor:
        """The activations of `rows` `[n]` -> `[n, seq, d_model]` bf16 or fp32 on the CPU.

        Args:
            rows: row numbers.
            verify: check the checksum of each row; once a pass over the store has done so, it need not be done again.
        """
        layout = self._store.layout
        out = torch.empty((len(rows), layout.seq, layout.d_model), dtype=_torch_dtype(layout.dtype))
        buffer = out.view(torch.uint16).numpy() if layout.dtype == "bfloat16" else out.numpy()
        remade: set[int] = set()
        while True:
            try:
                self._store.read_rows(rows, buffer, verify=verify)
                return out
            except DamagedShard as damage:
                if damage.shard in remade:
                    raise UserError(
                        f"{damage.path}: damaged again after it was remade ({damage.reason}); check the disk"
                    ) from None
                remade.add(damage.shard)
                self._remake(damage.shard)


def check_identity(artifact: Artifact, source: Source) -> int:
    """The index of the boundary that `artifact` names.

    Raises:
        UserError: it is the boundary of another trunk, other tokens, parameters or code than those at hand.
    """
    k = int(artifact.facts["index"])
    if artifact.facts != source.identity(k):
        raise UserError(f"{artifact.path}: is a boundary of another trunk, tokens, parameters or code; {REMEDY}")
    return k


def _batch_rows(row_bytes: int) -> int:
    """Rows computed at a time: a power of two, at most 32, of about 8 MiB."""
    rows = _BATCH_ROWS
    while rows > 1 and rows * row_bytes > _BATCH_BYTES:
        rows //= 2
    return rows


def _batches(layout: StoreLayout, shard: int) -> list[np.ndarray]:
    """The rows of a shard, as many at a time as are computed together."""
    rows, size = np.array(layout.shard_range(shard)), _batch_rows(layout.row_bytes)
    return np.split(rows, range(size, len(rows), size))


def _torch_dtype(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _as_stored(x: Tensor) -> np.ndarray:
    """The numbers as `ActivationStore` takes them, without a copy."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
