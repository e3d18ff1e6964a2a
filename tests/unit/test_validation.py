"""What a window is validated on while it trains: the held-out text of the evaluation, in the same units."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stackwise.config.evaluation import EvaluateParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.data.tokens import TokenDataset, Tokens, Vocabulary
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.growth.validation import Validation, held_out_batches, held_out_objective
from stackwise.growth.window import Window
from stackwise.inference.evaluation import Evaluator
from stackwise.model.context import Context
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.targets import NO_TARGET

CPU = torch.device("cpu")
VOCAB, SEQ, SAMPLES = 17, 12, 11
MODEL = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=24), document_mask=True)


@pytest.fixture
def rack() -> Rack:
    found = Rack(RackShape.of(MODEL, (1, 1), VOCAB))
    for name, part in (("embeddings", found.embeddings), ("stacks", found.stacks), ("head", found.head)):
        initialize(part, name=name, seed=0)
    return found.eval()


def tokens_in(directory: Path, labels: np.ndarray | None = None) -> Tokens:
    text = np.random.default_rng(0).integers(0, VOCAB, SAMPLES * SEQ)
    np.save(directory / "text.npy", text.astype(np.uint16))
    np.save(directory / "labels.npy", np.full(text.shape, NO_TARGET) if labels is None else labels)
    dataset = TokenDataset(directory / "text.npy", SEQ, directory / "labels.npy")
    return Tokens(dataset, dataset, Vocabulary(VOCAB, 0), np.ones(VOCAB, np.int64), 1.0, directory)


def loss_of(window: Window, tokens: Tokens, objective: ObjectiveParams, **options: object) -> float:
    asked = held_out_objective(objective, tokens, seed=3)
    batches = held_out_batches(
        tokens,
        asked,
        **{"samples": 7, "batch_size": 4, "document_mask": True, "device": CPU, **options},  # type: ignore[arg-type]
    )
    return Validation(window.eval(), batches, causal=asked.causal, device=CPU, dtype="fp32").loss()


def test_the_loss_is_the_bound_of_the_evaluation(rack: Rack, tmp_path: Path) -> None:
    tokens = tokens_in(tmp_path)
    evaluator = Evaluator(tokens, EvaluateParams(samples=7, draws=1), seed=3, device=CPU, dtype="fp32")
    expected = evaluator.diffusion(rack)["nelbo"]["nats_per_token"]
    for params in (ObjectiveParams(), ObjectiveParams(type="mlm", random_share=0.5), ObjectiveParams(mask_max=0.2)):
        assert loss_of(Window.of(rack), tokens, params) == pytest.approx(expected, rel=1e-5)
    assert loss_of(Window.of(rack), tokens, ObjectiveParams(), samples=5) != pytest.approx(expected, rel=1e-5)


def test_without_masks_it_is_what_training_asks(rack: Rack, tmp_path: Path) -> None:
    labels = np.where(np.arange(SAMPLES * SEQ) % 3, NO_TARGET, 5)
    tokens = tokens_in(tmp_path, labels)
    evaluator = Evaluator(tokens, EvaluateParams(samples=7), seed=3, device=CPU, dtype="fp32")
    following = evaluator.next_token(rack)["nats_per_token"] * (SEQ - 1) / SEQ  # the last token has no next
    assert loss_of(Window.of(rack), tokens, ObjectiveParams(type="clm")) == pytest.approx(following, rel=1e-5)
    for causal in (False, True):
        labelled = evaluator.labelled(rack, causal=causal)["nats_per_token"] / 3
        params = ObjectiveParams(type="custom", causal=causal)
        assert loss_of(Window.of(rack), tokens, params) == pytest.approx(labelled, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_boundary_that_is_kept_gives_what_tokens_through_the_trunk_give(
    dtype: torch.dtype, rack: Rack, tmp_path: Path
) -> None:
    tokens, calls = tokens_in(tmp_path), []

    @torch.no_grad()
    def trunk(inputs: torch.Tensor, context: Context) -> torch.Tensor:
        calls.append(len(inputs))
        boundary: torch.Tensor = rack.stacks[0](rack.embeddings(inputs), context).to(dtype).float()
        return boundary

    window = Window([rack.stacks[1]], rack.head, trunk=trunk)  # type: ignore[list-item]
    params = ObjectiveParams()
    kept = loss_of(window, tokens, params, trunk=trunk, keep=dtype)
    assert calls == [4, 3]  # once, a batch at a time
    assert kept == loss_of(window, tokens, params)
    assert len(calls) == 4


def test_labels_that_are_not_there_are_told(rack: Rack, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stack\.stop_samples = 7: none of these held-out samples has a label"):
        loss_of(Window.of(rack), tokens_in(tmp_path), ObjectiveParams(type="custom"))


def test_what_training_adds_to_the_loss_does_not_count(tmp_path: Path) -> None:
    tokens, found = tokens_in(tmp_path), []
    for weight in (0.0, 10.0):
        mlp = MLPParams(type="moe", hidden=16, n_experts=2, top_k=1, balance_weight=weight)
        model = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=mlp)
        experts = Rack(RackShape.of(model, [1], VOCAB))
        initialize(experts, name="rack", seed=0)
        found.append(loss_of(Window.of(experts), tokens, ObjectiveParams()))
    assert found[0] == found[1]
