"""Boundaries: the residual stream between two stacks, identified by what determines it, remade when its store is gone.

What the pipeline versions is a boundary's identity. Its bytes lie in a store (`stackwise.cache.store`) in a directory
that is named by the identity, outside the engines' sight; whoever needs a store and does not find all of it makes what
is missing.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from stackwise.objectives.targets import MaskDiffusionObjective
from stackwise.precision.dtypes import autocast
from stackwise.precision.trunk import TrunkStack

KIND = "boundary"
CODE = (
    "stackwise/cache/boundary.py",
    "stackwise/data/tokens.py",
    "stackwise/model",
    "stackwise/objectives/masks.py",
    "stackwise/objectives/targets.py",
    "stackwise/precision",
)
"""The sources that determine a boundary's values."""

_BATCH_BYTES = 2**23
_BATCH_ROWS = 32
_STORE_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Source:
    """Everything that determines boundaries 1, 2, ... of a rack."""

    params: Params
    """A view with seed, seq_len, objective, compute and trunk."""
    tokens_artifact: Artifact
    tokens: TokenDataset
    """The training split."""
    mask_id: int
    trunk: Sequence[TrunkStack]
    """Stacks 0 ... k - 1."""

    def identity(self, k: int) -> dict[str, Any]:
        """What boundary `k` is, as JSON values; `key` names its store."""
        params = self.params
        determined_by = {
            "tokens": self.tokens_artifact.digest,
            "trunk": [stack.artifact.digest for stack in self.trunk[:k]],
            "seed": params.seed,
            "seq_len": params.seq_len,
            # The weighting of the loss has no part in what the stacks see.
            "masks": params.objective.model_dump(exclude={"weighting"}),
            "compute": params.compute.model_dump(include={"device", "dtype", "threads", "deterministic"}),
            "store": params.trunk.activations,
            "code": digest_code(CODE),
        }
        return {
            "index": k,
            "rows": len(self.tokens) * params.objective.variants,
            "variants": params.objective.variants,
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
        self._objective = MaskDiffusionObjective(source.params.objective, source.params.seed, source.mask_id)
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
        """Make `shards` of boundary `k`, from boundary k - 1, of which what is missing is made first.

        So one stack is in memory at a time, and a boundary is the same whether it is made from a store or from tokens.
        """
        if not shards:
            return
        source, layout = self._source, store.layout
        with ExitStack() as stack:
            if k == 1:
                embeddings = source.trunk[0].load_embeddings(self._device)

                def read(rows: np.ndarray) -> Tensor:
                    return embeddings(self._masked_tokens(rows))
            else:
                below = stack.enter_context(self._store(k - 1))
                self._complete(k - 1, below, sorted(set(below.missing()) & set(shards)))
                read = BoundaryReader(below, lambda shard: self._remake(k - 1, below, shard)).read
            # Only now: what the boundary below was made from may go, the boundary below may not.
            make_room(store.path, layout.total_bytes, self._budget)
            module = source.trunk[k - 1].load_stack(source.params.compute.dtype, self._device)
            wanted, done = sum(len(layout.shard_range(g)) for g in shards), 0
            for g in shards:
                rows = np.arange(layout.shard_range(g).start, layout.shard_range(g).stop)
                made = []
                for batch in np.split(
                    rows, range(_batch_rows(layout.row_bytes), len(rows), _batch_rows(layout.row_bytes))
                ):
                    with torch.inference_mode(), autocast(self._device, source.params.compute.dtype):
                        made.append(_to_store(module(read(batch).to(self._device).float()), layout.dtype))
                    done += len(batch)
                    self._progress(done, wanted)
                store.write_shard(g, np.concatenate(made))

    def _remake(self, k: int, store: ActivationStore, shard: int) -> None:
        store.drop_shard(shard)
        self._complete(k, store, [shard])

    def _masked_tokens(self, rows: np.ndarray) -> Tensor:
        variants, samples = np.divmod(rows, len(self._source.tokens))
        inputs, _ = self._objective(self._source.tokens.samples(samples), samples, variants)
        return torch.from_numpy(inputs).to(self._device)


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


def _torch_dtype(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _to_store(x: Tensor, dtype: str) -> np.ndarray:
    x = x.to(_torch_dtype(dtype)).cpu().contiguous()
    return x.view(torch.uint16).numpy() if dtype == "bfloat16" else x.numpy()
