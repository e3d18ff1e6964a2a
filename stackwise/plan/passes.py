"""What the modules of a rack and the losses do in a pass, on a `Tape`.

Each function stands for a module of `stackwise.model` or `stackwise.mlp`, or for a loss of `stackwise.objectives`, and
holds what that holds, for as long.
"""

from itertools import pairwise

from stackwise.plan.attention import attention
from stackwise.plan.operations import norm, project
from stackwise.plan.parts import Block, Embeddings, Head, Projection, Sizes, Stack
from stackwise.plan.tape import FP32, Device, Gradients, Tape, Tensor, Weight

_CHUNK_ELEMENTS: dict[Device, int] = {"cpu": 2**21, "cuda": 2**26}
"""Logits that exist at once (`stackwise.objectives.loss`)."""
_ID = 8
"""Bytes of a token's number."""


def embed(tape: Tape, embeddings: Embeddings, tokens: int) -> Tensor:
    """So many token ids -> their embeddings `[tokens, d_model]`."""
    table, mask, width = embeddings.table, embeddings.mask, embeddings.table.columns
    ids, hidden = tape.new(tokens, _ID), tape.new(tokens, 1)
    rows = tape.new(tokens * width, FP32)
    tape.record(rows, [table], lambda gradients: [tape.new(table.size, FP32)], [ids.storage])
    wanted = tape.wants(rows), tape.wants(mask)

    def backward(gradients: list[Tensor]) -> Gradients:
        of_rows, of_masked = (tape.new(tokens * width, FP32) if wants else None for wants in wanted)
        return [of_rows, None if of_masked is None else tape.new(width, FP32)]

    x = tape.record(tape.new(tokens * width, FP32), [rows, mask], backward, [hidden.storage])
    del rows
    return _adapted(tape, embeddings.adapter, x)


def stack(tape: Tape, parts: Stack, x: Tensor, sizes: Sizes, *, checkpointing: bool = False) -> Tensor:
    """A boundary `[batch, seq, d_model]` -> the next.

    Args:
        tape: that is written to.
        parts: the weights.
        x: the residual stream.
        sizes: of the batch.
        checkpointing: whether blocks keep only what goes into them.
    """
    time = _time(tape, parts, sizes) if parts.time else None
    for own in parts.blocks:

        def through(x: Tensor, own: Block = own) -> Tensor:
            return _block(tape, own, x, time, sizes, trains=parts.trains)

        x = tape.checkpoint(through, x, learns=any(w.learns for w in own)) if checkpointing else through(x)
    return x


def loss(tape: Tape, head: Head, x: Tensor, sizes: Sizes) -> Tensor:
    """The residual stream below the head `[batch, seq, d_model]` -> the cross-entropy of `sizes.rows` rows."""
    rows = tape.resize(x, sizes.rows * head.norm.size)
    features = _adapted(tape, head.adapter, norm(tape, rows, head.norm))
    return _cross_entropy(tape, features, head.projection, sizes.rows)


def embedding_loss(tape: Tape, embeddings: Embeddings, x: Tensor, sizes: Sizes) -> Tensor:
    """`stackwise.objectives.loss.embedding_loss`."""
    rows = tape.resize(x, x.size // sizes.tokens * sizes.rows)
    with tape.no_grad():
        truth = embed(tape, embeddings, sizes.rows)
        wanted = tape.map(truth, steps=2)
    found = tape.map(tape.map(rows, "input"), "input")
    return _squared(tape, tape.add(found, wanted))


def consistency_loss(tape: Tape, embeddings: Embeddings, x: Tensor, sizes: Sizes) -> Tensor:
    """`stackwise.objectives.loss.consistency_loss`, of what comes out of the lowest stack."""
    with tape.no_grad():
        known = embed(tape, embeddings, sizes.tokens)
    return _squared(tape, tape.add(x, known))


def _squared(tape: Tape, x: Tensor) -> Tensor:
    """The sum of the squares."""
    return tape.resize(tape.map(x, "input"), 1)


def _time(tape: Tape, parts: Stack, sizes: Sizes) -> Tensor:
    hidden = parts.time["time.hidden"]
    x = tape.new(sizes.batch * hidden.weight.columns, FP32)
    if "time.table" in parts.time:
        table = parts.time["time.table"].weight
        tape.record(x, [table], lambda gradients: [tape.new(table.size, FP32)])
    return project(tape, tape.map(project(tape, x, hidden), "input"), parts.time["time.output"])


def _block(tape: Tape, block: Block, x: Tensor, time: Tensor | None, sizes: Sizes, *, trains: bool) -> Tensor:
    before, between = block.norms["attention_norm"], block.norms["mlp_norm"]
    if time is None:
        x = tape.add(x, attention(tape, block, norm(tape, x, before), sizes, trains=trains))
        return tape.add(x, _mlp(tape, block, norm(tape, x, between), sizes, trains=trains))
    modulation = project(tape, tape.map(time, "input"), block.projection("modulation"))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = tape.split(modulation, *[modulation.size // 6] * 6)
    mixed = attention(tape, block, _modulated(tape, norm(tape, x, before), shift, scale), sizes, trains=trains)
    x = tape.add(x, tape.scale(mixed, gate))
    del mixed
    made = _mlp(tape, block, _modulated(tape, norm(tape, x, between), mlp_shift, mlp_scale), sizes, trains=trains)
    return tape.add(x, tape.scale(made, mlp_gate))


def _modulated(tape: Tape, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tape.add(tape.scale(x, tape.map(scale)), shift)


def _mlp(tape: Tape, block: Block, x: Tensor, sizes: Sizes, *, trains: bool) -> Tensor:
    if block.model.mlp.type == "moe":
        return _mixture(tape, block, x, sizes, trains=trains)
    return _swiglu(tape, block, "mlp", 0, x)


def _swiglu(tape: Tape, block: Block, path: str, number: int, x: Tensor) -> Tensor:
    """The network at `path`, or the expert of that number."""
    gate, up, down = (block.projections[f"{path}.{name}_proj"][number] for name in ("gate", "up", "down"))
    return project(tape, _gated(tape, project(tape, x, gate), project(tape, x, up)), down)


def _gated(tape: Tape, gate: Tensor, up: Tensor) -> Tensor:
    size, width = gate.size, gate.width

    def backward(gradients: list[Tensor]) -> Gradients:
        product = tape.new(size, width)
        of_gate = tape.new(size, width)
        del product
        return [of_gate, tape.new(size, width)]

    return tape.record(tape.new(size, width), [gate, up], backward, [gate.storage, up.storage])


def _mixture(tape: Tape, block: Block, x: Tensor, sizes: Sizes, *, trains: bool) -> Tensor:
    """The mixture of experts, over which the tokens spread evenly."""
    mlp, d, tokens = block.model.mlp, block.model.d_model, sizes.tokens
    router, taken = block.projection("router"), tokens * mlp.top_k
    probabilities = tape.map(tape.cast(project(tape, x, router), FP32), "output")
    weights = tape.resize(probabilities, taken)
    if mlp.top_k > 1:
        weights = tape.map(weights, "input")
    if not (trains and router.weight.learns):
        del probabilities
    order, inverse = tape.new(taken, _ID), tape.new(taken, _ID)
    runs = _taken(tape, x, taken * d, inverse)
    bounds = [taken * e // mlp.n_experts * d for e in range(mlp.n_experts + 1)]
    loads = [end - begin for begin, end in pairwise(bounds)]
    made = [_swiglu(tape, block, "mlp.experts", e, run) for e, run in enumerate(tape.split(runs, *loads))]
    outputs = tape.cat(made)
    del made, runs
    outputs = _taken(tape, outputs, outputs.size, order)
    mixed = tape.product(tape.cast(weights, outputs.width), outputs, tokens, 1, mlp.top_k, d)
    for e in range(mlp.n_shared):
        mixed = tape.add(mixed, _swiglu(tape, block, "mlp.shared", e, x))
    return mixed


def _taken(tape: Tape, x: Tensor, size: int, order: Tensor) -> Tensor:
    """Rows in another order, each perhaps several times."""
    before, width = x.size, x.width

    def backward(gradients: list[Tensor]) -> Gradients:
        found = tape.new(size, width)
        return [found if size == before else tape.new(before, width)]

    return tape.record(tape.new(size, width), [x], backward, [order.storage])


def _adapted(tape: Tape, adapter: tuple[Projection, ...], x: Tensor) -> Tensor:
    """`stackwise.model.embeddings.Adapter`, if there is one."""
    if not adapter:
        return x
    hidden, output = adapter
    return project(tape, tape.map(project(tape, x, hidden), "input"), output)


def _cross_entropy(tape: Tape, x: Tensor, weight: Weight, rows: int) -> Tensor:
    """`stackwise.objectives.loss.weighted_cross_entropy`, whose gradients are made with the loss."""
    vocab, width, compute = weight.rows, weight.columns, min(tape.compute, x.width)
    wanted = tape.wants(x), tape.wants(weight)
    found = [tape.new(n, FP32) if wants else None for n, wants in zip((x.size, weight.size), wanted, strict=True)]
    operands = [tape.new(size, compute) for size in (weight.size, x.size)] if compute < FP32 else []
    chunk = max(64, _CHUNK_ELEMENTS[tape.device] // vocab)
    logits = slope = None
    for first in range(0, min(rows, 3 * chunk), chunk):  # the third finds what the second found
        own = min(chunk, rows - first)
        logits = _as_fp32(tape, tape.new(own * vocab, compute))
        exponentials = tape.new(own * vocab, FP32)
        del exponentials
        if any(wanted):
            slope = logits if compute == FP32 else tape.new(own * vocab, compute)
        if wanted[0]:
            _as_fp32(tape, tape.new(own * width, compute))
        if wanted[1]:
            product = tape.new(weight.size, compute)
            if tape.device == "cpu":  # brings it to fp32 before it is added
                _as_fp32(tape, product)
            del product
    del logits, slope, operands
    flops = 2 * rows * vocab * width
    tape.flops.to_inputs += flops * wanted[0]
    tape.flops.to_weights += flops * wanted[1]
    made = [None if part is None else (part.size, part.storage) for part in found]
    del found

    def backward(gradients: list[Tensor]) -> Gradients:
        found = [None if part is None else Tensor(part[0], FP32, part[1]) for part in made]
        made.clear()
        return found

    return tape.record(tape.new(1, FP32), [x, weight], backward, flops=flops)


def _as_fp32(tape: Tape, x: Tensor) -> Tensor:
    return x if x.width == FP32 else tape.new(x.size, FP32)
