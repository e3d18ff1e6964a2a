"""What attention does in a pass: the modules of `stackwise.attention`, on a `Tape`.

Each function stands for one of theirs and holds what that holds, for as long.
"""

from collections.abc import Callable

from stackwise.plan.operations import dropout, norm, project, rotate
from stackwise.plan.parts import Block, Sizes
from stackwise.plan.tape import FP32, Gradients, Tape, Tensor, Weight
from stackwise.plan.weights import Heads

_CHUNK = 64
"""Positions of a chunk (`stackwise.attention.linear.CHUNK`)."""


def attention(tape: Tape, block: Block, x: Tensor, sizes: Sizes, *, trains: bool) -> Tensor:
    """`[batch, seq, d_model]` -> `[batch, seq, d_model]`.

    Args:
        tape: that is written to.
        block: the weights.
        x: the normed residual stream.
        sizes: of the batch.
        trains: whether the stack is in training mode.
    """
    attention, heads = block.model.attention, Heads.of(block.model)
    if attention.uses_latents:
        q = _latent_queries(tape, block, heads, x, sizes)
        k, v = _latent_keys_values(tape, block, heads, x, sizes)
    else:
        q, k, v = _queries_keys_values(tape, block, heads, x, sizes)
    if heads.features:
        mixed = _by_features(tape, block, heads, (q, k, v), sizes)
    else:
        mixed = _by_softmax(tape, heads, (q, k, v), sizes, drops=trains and attention.dropout > 0)
        if attention.uses_latents:  # queries that were put together leave another order behind
            mixed = tape.copy(mixed)
    return project(tape, mixed, block.projection("o_proj"))


def _queries_keys_values(
    tape: Tape, block: Block, heads: Heads, x: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (project(tape, x, block.projection(f"{name}_proj")) for name in ("q", "k", "v"))
    if block.model.attention.qk_norm:
        q, k = norm(tape, q, block.norms["attention.q_norm"]), norm(tape, k, block.norms["attention.k_norm"])
    angles = sizes.seq * heads.width
    return rotate(tape, q, angles), rotate(tape, k, angles), v


def _latent_queries(tape: Tape, block: Block, heads: Heads, x: Tensor, sizes: Sizes) -> Tensor:
    if block.model.attention.mla_rq is None:
        q = project(tape, x, block.projection("q_proj"))
    else:
        latents = project(tape, x, block.projection("q_a_proj"))
        q = project(
            tape, norm(tape, latents, block.norms["attention.projections.q_a_norm"]), block.projection("q_b_proj")
        )
        del latents
    positions = sizes.tokens * heads.queries
    nope, rope = tape.split(q, positions * (heads.width - heads.rope), positions * heads.rope)
    return tape.cat((nope, rotate(tape, rope, sizes.seq * heads.rope)))


def _latent_keys_values(tape: Tape, block: Block, heads: Heads, x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    up_projection, tokens = block.projection("kv_b_proj"), sizes.tokens
    parts = tokens * up_projection.weight.columns, tokens * heads.rope
    latent, key = tape.split(project(tape, x, block.projection("kv_a_proj")), *parts)
    normed = norm(tape, latent, block.norms["attention.projections.kv_a_norm"])
    latents = tape.cat((normed, rotate(tape, key, sizes.seq * heads.rope)))
    del latent, key, normed
    latent, rope = tape.split(latents, *parts)
    up, positions = project(tape, latent, up_projection), tokens * heads.keys
    nope, v = tape.split(up, positions * (heads.width - heads.rope), positions * heads.v_width)
    return tape.cat((nope, _repeated(tape, rope, heads.keys))), v


def _repeated(tape: Tape, x: Tensor, times: int) -> Tensor:
    """A view of `x` many times over, whose gradient is a sum."""
    size, width = x.size, x.width
    out = Tensor(size * times, width, x.storage)
    return tape.record(out, [x], lambda gradients: [tape.new(size, width)])


# Softmax.


def _by_softmax(tape: Tape, heads: Heads, parts: tuple[Tensor, Tensor, Tensor], sizes: Sizes, *, drops: bool) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, by the kernel that it takes: a fused one, or products written out."""
    q, k, v = parts
    b, h, s, width = sizes.batch, heads.queries, sizes.seq, q.width
    mask = tape.new(b * s * s, width) if sizes.segments else None  # numbers in place of truth values
    if not _fused(tape, heads, sizes, width, drops=drops):
        return _in_products(tape, heads, parts, sizes, mask, drops=drops)
    lengths = [t.size for t in parts]
    normalizers = tape.new(b * h * s, FP32)
    accumulates = tape.device == "cuda" and width < FP32
    repeats = heads.queries // heads.keys if tape.device == "cuda" else 1

    def backward(gradients: list[Tensor]) -> Gradients:
        # Scores are made again: five products, as `torch.utils.flop_counter` has it.
        tape.flops.to_inputs += 2 * b * h * s * s * (3 * heads.width + 2 * heads.v_width)
        found = [tape.new(length, width) for length in lengths]
        sums = tape.new(b * h * s, FP32)
        exact = tape.new(lengths[0], FP32) if accumulates else None
        repeated = tape.new((lengths[1] + lengths[2]) * repeats, width) if repeats > 1 else None
        del sums, exact, repeated
        return found

    out = tape.new(b * h * s * heads.v_width, width)
    keep = [q.storage, k.storage, v.storage, out.storage, normalizers.storage, mask.storage if mask else None]
    return tape.record(out, parts, backward, keep, flops=2 * b * h * s * s * (heads.width + heads.v_width))


def _fused(tape: Tape, heads: Heads, sizes: Sizes, width: int, *, drops: bool) -> bool:
    """Whether a fused kernel does it.

    CPU: not with dropout, nor where keys and values differ in width. CUDA: FlashAttention for 16 bits without a mask;
    otherwise the memory-efficient kernel, which cannot share keys among queries.
    """
    if tape.device == "cpu":
        return not drops and heads.width == heads.v_width
    by_flash = width < FP32 and not sizes.segments and heads.width == heads.v_width
    return by_flash or heads.keys == heads.queries


def _in_products(
    tape: Tape,
    heads: Heads,
    parts: tuple[Tensor, Tensor, Tensor],
    sizes: Sizes,
    mask: Tensor | None,
    *,
    drops: bool,
) -> Tensor:
    """All `[seq, seq]` scores at once; on CPUs in fp32."""
    width = parts[0].width
    q, k, v = (tape.cast(t, FP32) for t in parts) if tape.device == "cpu" else parts
    b, h, s = sizes.batch, heads.queries, sizes.seq
    if heads.keys < h:
        k, v = (tape.resize(t, t.size * h // heads.keys) for t in (k, v))
    if sizes.causal and mask is None:
        mask = tape.new(s * s, q.width)
    q, k = tape.map(q), tape.map(k)  # both scaled
    scores = tape.product(tape.copy(q), tape.copy(k), b * h, s, heads.width, s)
    if mask is not None:
        scores = tape.add(scores, mask)
    shares = tape.map(scores, "output")
    del scores
    if drops:
        shares = dropout(tape, shares)
    return tape.cast(tape.copy(tape.product(shares, tape.copy(v), b * h, s, s, heads.v_width)), width)


# Kernels.


def _by_features(tape: Tape, block: Block, heads: Heads, parts: tuple[Tensor, Tensor, Tensor], sizes: Sizes) -> Tensor:
    """`stackwise.attention.kernel.attend_by_features`, in fp32."""
    width = parts[2].width
    made: Callable[..., Tensor] = {"softmax": _exponentials, "linear": _elu}.get(
        block.model.attention.kernel or "softmax", _waves
    )
    q, k = (tape.cast(t, FP32) for t in parts[:2])
    q = made(tape, block.features, heads, q, sizes, of_keys=False)
    k = made(tape, block.features, heads, k, sizes, of_keys=True)
    v = _with_ones(tape, heads, tape.cast(parts[2], FP32))
    mixed = (_chunked if sizes.causal or sizes.segments else _summed)(tape, heads, (q, k, v), sizes)
    return tape.cast(tape.copy(mixed), width)


def _with_ones(tape: Tape, heads: Heads, v: Tensor) -> Tensor:
    """A column more."""
    return tape.resize(v, v.size // heads.v_width * (heads.v_width + 1))


def _projected(
    tape: Tape, frequencies: Weight | None, heads: Heads, x: Tensor, sizes: Sizes, *, of_keys: bool
) -> Tensor:
    """The product with random frequencies; both are copied into its order."""
    assert frequencies is not None
    half, groups = heads.features // 2, sizes.batch * heads.keys
    rows = sizes.seq * (1 if of_keys else heads.queries // heads.keys)
    return tape.product(tape.copy(x), tape.new(groups * half * heads.width, FP32), groups, rows, heads.width, half)


def _exponentials(
    tape: Tape, frequencies: Weight | None, heads: Heads, x: Tensor, sizes: Sizes, *, of_keys: bool
) -> Tensor:
    """`PositiveFeatures`."""
    x = tape.map(x)
    projected = _projected(tape, frequencies, heads, x, sizes, of_keys=of_keys)
    squares = tape.map(x, "input") if of_keys else None
    del squares
    both = tape.cat((tape.map(projected), tape.map(projected, steps=2)))
    del projected
    return tape.map(tape.map(both, "input") if of_keys else both, "output")


def _waves(tape: Tape, frequencies: Weight | None, heads: Heads, x: Tensor, sizes: Sizes, *, of_keys: bool) -> Tensor:
    """`FourierFeatures`."""
    angles = _projected(tape, frequencies, heads, tape.map(x, "input"), sizes, of_keys=of_keys)
    return tape.map(tape.cat((tape.map(angles, "input"), tape.map(angles, "input"))))


def _elu(tape: Tape, frequencies: Weight | None, heads: Heads, x: Tensor, sizes: Sizes, *, of_keys: bool) -> Tensor:
    """`EluFeatures`."""
    return tape.map(tape.map(x, "input"))


def _summed(tape: Tape, heads: Heads, parts: tuple[Tensor, Tensor, Tensor], sizes: Sizes) -> Tensor:
    """All positions see all: two products (`stackwise.attention.linear.linear_attention`)."""
    q, k, v = parts
    groups, width = sizes.batch * heads.keys, heads.v_width + 1
    state = tape.product(k, v, groups, heads.features, sizes.seq, width)
    rows = sizes.seq * heads.queries // heads.keys
    return _divided(tape, heads, tape.product(q, state, groups, rows, heads.features, width), sizes)


def _chunked(tape: Tape, heads: Heads, parts: tuple[Tensor, Tensor, Tensor], sizes: Sizes) -> Tensor:
    """Positions see a part of the others (`stackwise.attention.linear._chunked_sums`)."""
    chunk = min(_CHUNK, sizes.seq)
    n, shared = -(-sizes.seq // chunk), heads.queries // heads.keys
    padded = n * chunk
    q, k, v = (t if padded == sizes.seq else tape.resize(t, t.size // sizes.seq * padded) for t in parts)
    if shared > 1 and n > 1:
        q = tape.copy(q)
    groups, rows, width = sizes.batch * heads.keys * n, shared * chunk, heads.v_width + 1
    hidden = tape.new((sizes.batch * n if sizes.segments else 1) * rows * chunk, 1)
    weights = _masked(tape, tape.product(q, k, groups, rows, heads.features, chunk), hidden)
    sums = tape.product(weights, v, groups, rows, chunk, width)
    states = []
    for _ in range(0 if n == 1 else 1 if sizes.causal else 2):
        states.append(_entering(tape, heads, (k, v), n, chunk, sizes))
        others = tape.product(q, tape.copy(states[-1]), groups, rows, heads.features, width)
        sums = tape.add(sums, tape.map(others) if sizes.segments else others)
        del others
    if shared > 1 and n > 1:
        sums = tape.copy(sums)
    if padded != sizes.seq:
        sums = tape.resize(sums, sums.size // padded * sizes.seq, view=True)
    return _divided(tape, heads, sums, sizes)


def _masked(tape: Tape, weights: Tensor, hidden: Tensor) -> Tensor:
    """In place, by a mask that is kept."""
    size, width = weights.size, weights.width
    out = Tensor(size, width, weights.storage)
    return tape.record(out, [weights], lambda gradients: [tape.new(size, width)], [hidden.storage])


def _entering(tape: Tape, heads: Heads, parts: tuple[Tensor, Tensor], n: int, chunk: int, sizes: Sizes) -> Tensor:
    """The state that comes into each of `n` chunks."""
    k, v = parts
    own = tape.map(v) if sizes.segments else v
    added = tape.product(k, own, sizes.batch * heads.keys * n, heads.features, chunk, heads.v_width + 1)
    del own
    states = tape.resize(added, added.size // n * (n + 1))
    return tape.map(states, steps=2 if sizes.segments else 1)


def _divided(tape: Tape, heads: Heads, sums: Tensor, sizes: Sizes) -> Tensor:
    """Sums over their denominators."""
    size, positions = sums.size, sizes.tokens * heads.queries
    values = positions * heads.v_width
    least = tape.new(positions, FP32)

    def backward(gradients: list[Tensor]) -> Gradients:
        of_values, quotients = tape.new(values, FP32), tape.new(values, FP32)
        products = tape.new(values, FP32)
        of_denominators = tape.new(positions, FP32)
        del quotients, products
        found = tape.new(size, FP32)
        del of_values
        other = tape.new(size, FP32)
        del of_denominators, other
        return [found]

    return tape.record(tape.new(values, FP32), [sums], backward, [sums.storage, least.storage])
