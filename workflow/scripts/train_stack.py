"""Stage train_stack: train one stack on top of the frozen ones below it, which cached activations stand for."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.cache.batches import BoundaryBatches
from stackwise.cache.boundary import KIND as BOUNDARY
from stackwise.cache.boundary import Boundaries, Source, check_identity
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.batches import TokenBatches
from stackwise.growth.pretrained import vocabulary_widths
from stackwise.growth.stack_objectives import objective_of_stack, order_of_stack
from stackwise.growth.stacks import KIND, TrainedStack, new_window, save_stack
from stackwise.growth.window import Batch
from stackwise.model.rack import RackShape
from stackwise.objectives.words import Words
from stackwise.precision.trunk import KIND as TRUNK
from stackwise.precision.trunk import TrunkStack
from stackwise.training.device import set_up
from workflow.training import finish, train_window


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--index", type=int, required=True, help="which stack, from 0")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--below", type=Path, help="trained stack index - 1")
    parser.add_argument("--first", type=Path, help="trained stack 0, for its embeddings")
    parser.add_argument("--trunk", type=Path, nargs="+", default=[], help="trunk artifacts 0 ... index - 1")
    parser.add_argument("--activations", type=Path, help="boundary artifact that this stack trains on")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")
    parser.add_argument("--losses", type=Path, required=True, help="JSON file for the loss curve")


def work(run: StageRun) -> None:
    """Train one stack."""
    args, params = run.arguments, run.params
    k, stack_params = args.index, params.stack_params(args.index)
    device = set_up(params.compute, threads=params.compute.threads, seed=params.seed)
    tokens_artifact = run.read("tokens", args.tokens, TOKENS)
    tokens = open_tokens(tokens_artifact, params.seq_len)
    below = TrainedStack(run.read("below", args.below, KIND)) if args.below else None
    first = TrainedStack(run.read("first", args.first, KIND)) if args.first else below
    vocabulary = tokens.vocabulary
    widths = below.shape.widths if below else vocabulary_widths(params.model)
    shape = RackShape.of(params.stack_model(k), [stack_params.blocks], vocabulary.size, **widths)
    window = new_window(
        k,
        shape=shape,
        init=stack_params.init,
        seed=params.seed,
        below=below,
        first=first,
        with_embeddings=params.objective.embedding_weight > 0,
    )
    words, time = Words(tokens.word_starts, vocabulary.eos_id), params.model.time
    objective = objective_of_stack(params, k, time, tokens=tokens.train, mask_id=vocabulary.mask_id, words=words)
    from_tokens = TokenBatches(
        tokens.train,
        order_of_stack(params, k, time, len(tokens.train)),
        objective,
        stack_params.batch_size,
        params.optimizer.accumulate,
        vocabulary.eos_id if params.model.document_mask else None,
    )
    with ExitStack() as stack:
        batches: Callable[[int], Sequence[Batch]] = from_tokens
        if k > 0:
            trunk = [TrunkStack(run.read(f"trunk.{i}", path, TRUNK)) for i, path in enumerate(args.trunk)]
            source = Source(params, tokens_artifact, tokens.train, vocabulary.mask_id, vocabulary.eos_id, trunk, words)
            index = check_identity(run.read("activations", args.activations, BOUNDARY), source)
            reader = stack.enter_context(Boundaries(source, device=device, progress=run.rows_made).open(index))
            batches = BoundaryBatches(from_tokens, reader, objective.variants)
        losses = train_window(
            run,
            window,
            batches,
            causal=objective.causal,
            steps=stack_params.steps,
            batch_size=stack_params.batch_size,
            lr=stack_params.lr,
            device=device,
        )
    with run.publish(args.out, KIND) as draft:
        draft.facts |= save_stack(draft.directory, window.cpu(), index=k, shape=shape)
        draft.facts["steps"] = stack_params.steps
    finish(run, losses)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
