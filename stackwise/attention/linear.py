"""Attention whose weights are inner products of features: linear in `seq`, by sums over keys (Katharopoulos et al.
2020, Transformers are RNNs, equations 4-12)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stackwise.model.context import Context

CHUNK = 64
"""Positions that are mixed by their `[chunk, chunk]` weights; between chunks goes a state `[features, v_dim + 1]`."""


class RunningSums:
    """What decoding keeps: the sum of `k v^T` and of `k` over the current segment, however long that is."""

    def __init__(self, sums: Tensor) -> None:
        """
        Args:
            sums: zeros `[batch, n_kv_heads, features, v_dim + 1]`; the last column is for the sum of `k`.
        """
        self.length = 0
        self.sums = sums
        self.counts = torch.zeros(len(sums), dtype=torch.int64, device=sums.device)
        """Positions of the current segment `[batch]`."""

    def bytes(self) -> int:
        """Memory that it takes."""
        return self.sums.nbytes + self.counts.nbytes


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    *,
    least: float,
    cache: RunningSums | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """`sum_j (q_i . k_j) v_j / sum_j (q_i . k_j)` over the positions j that i sees.

    Segments are runs of equal numbers: equal numbers that are not contiguous are different segments.

    Args:
        q: features of the queries `[batch, n_heads, seq, features]`.
        k: features of the keys `[batch, n_kv_heads, seq, features]`.
        v: `[batch, n_kv_heads, seq, v_dim]`.
        context: whether causal, and segments.
        least: the denominator is at least this times the number of keys.
        cache: what precedes; attention is then causal, and the cache has then seen these positions too.
        chunk: positions of a chunk; makes no difference but to time and memory.

    Returns:
        `[batch, n_heads, seq, v_dim]`.
    """
    seq = k.shape[2]
    start = cache.length if cache is not None else 0
    causal = context.causal or cache is not None
    runs = None if context.segments is None else _runs(context.segments[:, : start + seq], start)
    before = torch.zeros(len(k), dtype=torch.int64, device=k.device) if cache is None else cache.counts
    counts = _keys_seen(runs, seq, before, causal=causal)
    v = F.pad(v, (0, 1), value=1.0)  # its sums are the denominators
    if causal or runs is not None:
        state = None if cache is None else cache.sums
        sums, state = _chunked_sums(q, k, v, runs, causal=causal, state=state, chunk=chunk)
        if cache is not None and state is not None:
            # Copies, that do not keep all that they are parts of.
            cache.sums, cache.counts = state.detach().clone(), counts[:, -1].clone()
            cache.length += seq
    else:
        grouped = q.reshape(*k.shape[:2], -1, k.shape[-1])  # the queries of a key's heads one after the other
        sums = (grouped @ (k.mT @ v)).view(*q.shape[:3], -1)
    return sums[..., :-1] / sums[..., -1:].clamp(min=least * counts[:, None, :, None].to(sums.dtype))


def _runs(segments: Tensor, start: int) -> Tensor:
    """Number the runs of equal segments from position `start`; run 0 is that of the position before, if there is one.

    `[batch, start + seq]` -> `[batch, seq]` int64.
    """
    before = max(start - 1, 0)
    previous = torch.cat((segments[:, before : before + 1], segments[:, start:-1]), dim=1)
    return (segments[:, start:] != previous).long().cumsum(dim=1)


def _keys_seen(runs: Tensor | None, seq: int, before: Tensor, *, causal: bool) -> Tensor:
    """How many keys each position sees, `[batch, seq]` int64; `before` `[batch]` more precede in run 0."""
    if runs is None:
        runs = before.new_zeros(len(before), seq)
    # Runs are numbered to seq at most: run 0 may lie in front.
    lengths = runs.new_zeros(len(runs), seq + 1).scatter_add_(1, runs, torch.ones_like(runs))
    if not causal:
        return lengths.gather(1, runs)
    places = torch.arange(1, seq + 1, device=runs.device)
    return places - (lengths.cumsum(dim=1) - lengths).gather(1, runs) + torch.where(runs == 0, before[:, None], 0)


def _chunked_sums(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor | None, *, causal: bool, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """`sum_j (q_i . k_j) v_j` over the positions j of i's run, up to i if `causal`.

    Within a chunk by the masked weights; what comes from other chunks is a state that passes from chunk to chunk for as
    long as a run goes on. Nothing is ever subtracted, so that a segment does not round by the size of its neighbours.

    Args:
        q: `[batch, n_heads, seq, features]`.
        k, v: `[batch, n_kv_heads, seq, features]`, `[batch, n_kv_heads, seq, v_dim]`.
        runs: from `_runs`; None if all is one, which wants `causal`: without it two products do.
        causal: whether a position looks only back.
        state: the sum of `k v^T` that run 0 brings along, `[batch, n_kv_heads, features, v_dim]`; wants `causal`.
        chunk: positions of a chunk.

    Returns:
        The sums `[batch, n_heads, seq, v_dim]`, and the state behind the last position (None if there was none to
        begin with and a single chunk makes none).
    """
    batch, heads, seq, _ = k.shape
    groups = q.shape[1] // heads
    chunk = min(chunk, seq)
    n = -(-seq // chunk)
    padding = n * chunk - seq
    q, k, v = (F.pad(x, (0, 0, 0, padding)) if padding else x for x in (q, k, v))
    q = q.reshape(batch, heads, groups, n, chunk, -1).transpose(2, 3).reshape(batch, heads, n, groups * chunk, -1)
    k, v = (x.reshape(batch, heads, n, chunk, -1) for x in (k, v))
    if runs is not None:
        # A chunk's padding continues its last run: it adds nothing, for its features are 0.
        runs = torch.cat((runs, runs[:, -1:].expand(-1, padding)), dim=1).view(batch, n, chunk)

    # In place: a product's gradient does not need its result.
    weights = (q @ k.mT).masked_fill_(_hidden(runs, chunk, groups, causal, q.device), 0.0)
    sums = weights @ v

    after = None
    if state is not None or n > 1:
        passed, after = _entering(k, v, runs, state, back=True)
        sums = sums + _of_own_run(q @ passed, runs, groups, back=True)
        if not causal:
            passed, _ = _entering(k, v, runs, None, back=False)
            sums = sums + _of_own_run(q @ passed, runs, groups, back=False)
    sums = sums.view(batch, heads, n, groups, chunk, -1).transpose(2, 3).reshape(batch, heads * groups, n * chunk, -1)
    return sums[:, :, :seq], after


def _hidden(runs: Tensor | None, chunk: int, groups: int, causal: bool, device: torch.device) -> Tensor:
    """Which weights within a chunk do not count: bool, `[groups * chunk, chunk]` or
    `[batch, 1, n, groups * chunk, chunk]`."""
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1)
    if runs is None:
        return future.repeat(groups, 1)
    others = runs[..., :, None] != runs[..., None, :]
    return (others | future if causal else others).repeat(1, 1, groups, 1)[:, None]


def _entering(k: Tensor, v: Tensor, runs: Tensor | None, state: Tensor | None, *, back: bool) -> tuple[Tensor, Tensor]:
    """The sums of `k v^T` over the run that ends in front of each chunk (that begins behind it if not `back`).

    Args:
        k, v: `[batch, heads, n, chunk, features]`, `[batch, heads, n, chunk, v_dim]`.
        runs: `[batch, n, chunk]`.
        state: that in front of the first chunk `[batch, heads, features, v_dim]`; zero if None.
        back: which side.

    Returns:
        `[batch, heads, n, features, v_dim]`, and that behind the last chunk (in front of the first).
    """
    if runs is None:
        added = k.mT @ v
    else:
        edge = runs[..., -1] if back else runs[..., 0]
        added = k.mT @ (v * (runs == edge[..., None])[:, None, ..., None])
    if not back:
        added = added.flip(2)
    first = torch.zeros_like(added[:, :, 0]) if state is None else state
    states = torch.cat((first[:, :, None], added), dim=2)
    if runs is None:
        states = states.cumsum(dim=2)
    else:
        through = (edge == _neighbour(runs, back=back)).to(v.dtype)
        through = (through if back else through.flip(1))[..., None, None, None]
        parts = list(states.unbind(2))
        for c in range(len(parts) - 1):
            parts[c + 1] = torch.addcmul(parts[c + 1], through[:, c], parts[c])
        states = torch.stack(parts, dim=2)
    entering = states[:, :, :-1]
    return entering if back else entering.flip(2), states[:, :, -1]


def _neighbour(runs: Tensor, *, back: bool) -> Tensor:
    """The run in front of each chunk, 0 for the first (behind it, -1 for the last, if not `back`).

    `[batch, n, chunk]` -> `[batch, n]`.
    """
    return F.pad(runs[:, :-1, -1], (1, 0)) if back else F.pad(runs[:, 1:, 0], (0, 1), value=-1)


def _of_own_run(sums: Tensor, runs: Tensor | None, groups: int, *, back: bool) -> Tensor:
    """What positions get from the chunks in front of theirs (behind if not `back`): nothing of another run.

    Args:
        sums: `[batch, heads, n, groups * chunk, v_dim]`.
        runs: `[batch, n, chunk]`.
        groups: query heads that share a key.
        back: which side.
    """
    if runs is None:
        return sums
    own = runs == _neighbour(runs, back=back)[..., None]
    return sums * own.repeat(1, 1, groups)[:, None, ..., None]
