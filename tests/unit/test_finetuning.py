"""Fine-tuning: where the loss is, what learns, what is held in memory, what is saved."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.meter import Meter
from stackwise.config.evaluation import EvaluateParams
from stackwise.config.growth import LoRAParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.tuning import FineTuneParams
from stackwise.data.tokens import TokenDataset, Tokens, Vocabulary
from stackwise.errors import UserError
from stackwise.finetuning.adapters import finish, load_adapted
from stackwise.finetuning.classifier import Classes, Classifier, load_classifier, mean_of_segments, save_classifier
from stackwise.growth.batches import TokenBatches
from stackwise.growth.init import initialize
from stackwise.growth.pretraining import build_objective, visiting_order
from stackwise.growth.racks import load_rack, save_rack
from stackwise.growth.window import Batch, Window
from stackwise.inference.classification import classification_metrics
from stackwise.inference.completions import completion_metrics
from stackwise.inference.evaluation import Evaluator
from stackwise.model.rack import Rack, RackShape
from stackwise.model.stack import Stack
from stackwise.objectives.held_out import CompletionBoundObjective
from stackwise.objectives.targets import ClassesObjective, CompletionObjective
from stackwise.precision.stored import StoredLinear

CPU = torch.device("cpu")
SEQ, VOCAB, EOS = 16, 20, 19
MODEL = ModelParams(d_model=32, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=48))


def rack_of(model: ModelParams = MODEL) -> Rack:
    rack = Rack(RackShape.of(model, [1, 2], VOCAB))
    initialize(rack, name="rack", seed=0)
    with torch.no_grad():  # so that tokens differ much
        rack.embeddings.table.mul_(200)
        rack.embeddings.mask.mul_(200)
    return rack


def dataset(directory: Path, rows: list[tuple[list[int], list[int]]], *, split: str = "train") -> TokenDataset:
    """Rows of ids and labels, two to a sample."""
    samples = math.ceil(len(rows) / 2)
    ids, labels = np.full((samples, SEQ), EOS), np.full((samples, SEQ), -100)
    segments = np.full((samples, SEQ), 2)
    for number, (own, its) in enumerate(rows):
        start = 0 if number % 2 == 0 else len(rows[number - 1][0])
        place = number // 2, slice(start, start + len(own))
        ids[place], labels[place], segments[place] = own, its, number % 2
    for name, values in (("", ids), ("_labels", labels), ("_segments", segments)):
        np.save(directory / f"{split}{name}.npy", values.reshape(-1))
    files = [directory / f"{split}{name}.npy" for name in ("", "_labels", "_segments")]
    return TokenDataset(files[0], SEQ, *files[1:])


def completions(n: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """A prompt of 3 ids, a completion of 2 to 4, the end."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt, answer = (draw.integers(VOCAB - 1, size=size).tolist() for size in (3, draw.integers(2, 5)))
        rows.append(([*prompt, *answer, EOS], [-100] * 3 + [*answer, EOS]))
    return rows


def batch_of(data: TokenDataset, params: ObjectiveParams) -> Batch:
    order = visiting_order(len(data), seed=0, stream="x", time=MODEL.time, batch_size=len(data))
    objective = build_objective(
        params, MODEL.time, seed=0, tokens=data, mask_id=VOCAB, words=None, order=order, batch_size=len(data), steps=1
    )
    everything = np.arange(len(data))
    return TokenBatches(data, order, objective, len(data), 1).batch(everything, np.zeros_like(everything))


def gradients(rack: Rack, batch: Batch, *, causal: bool) -> tuple[Tensor, dict[str, Tensor]]:
    rack.zero_grad()
    loss = Window.of(rack).loss(batch, device=CPU, causal=causal)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in rack.named_parameters() if p.grad is not None}


# --- where the loss is


def test_the_loss_of_completions_is_the_mean_over_their_tokens_each_row_by_itself(tmp_path: Path) -> None:
    rack, rows = rack_of(), completions(7)
    loss, found = gradients(rack, batch_of(dataset(tmp_path, rows), ObjectiveParams(type="clm")), causal=True)
    rack.zero_grad()
    own: list[Tensor] = []
    for ids, labels in rows:  # alone, by torch's own cross-entropy
        logits = rack.logits(torch.tensor([ids]), causal=True)[0]
        own.append(F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum"))
    expected = torch.stack(own).sum() / sum(label != -100 for _, labels in rows for label in labels)
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    for name, parameter in rack.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, atol=1e-5), name


def test_what_fills_a_sample_up_and_what_a_prompt_would_ask_for_change_no_bit(tmp_path: Path) -> None:
    rack, rows = rack_of(), completions(6)
    batch = batch_of(dataset(tmp_path, rows), ObjectiveParams(type="clm"))
    loss, found = gradients(rack, batch, causal=True)
    assert batch.segments is not None
    batch.inputs[batch.segments == 2] = 0
    again, others = gradients(rack, batch, causal=True)
    assert torch.equal(loss, again)
    # ids that fill up are looked up, but no gradient comes to them
    assert all(torch.equal(found[name], others[name]) for name in found)
    assert not found["embeddings.table"][EOS].any() or (batch.inputs == EOS).any()
    # the second id of a prompt is never asked for: of the first position nothing is
    rows_asked = set(batch.targets.rows.tolist())
    for i, (ids, _) in enumerate(rows):
        start = i // 2 * SEQ + (len(rows[i - 1][0]) if i % 2 else 0)
        assert rows_asked & set(range(start, start + len(ids))) == set(range(start + 2, start + len(ids) - 1))


@pytest.mark.parametrize(
    "params",
    [
        ObjectiveParams(),
        ObjectiveParams(weighting="nelbo", count="exact"),
        ObjectiveParams(type="mlm", mask_min=0.5, mask_max=0.5, random_share=0.3, keep_share=0.2),
        ObjectiveParams(masks="pool", pool_size=3, variants=2),
    ],
    ids=str,
)
def test_a_prompt_is_never_masked_and_only_completions_are_asked_for(params: ObjectiveParams, tmp_path: Path) -> None:
    data = dataset(tmp_path, completions(40))
    everything = np.arange(len(data))
    tokens, labels = data.samples(everything), data.labels(everything)
    batch = batch_of(data, params)
    inputs, asked = batch.inputs.numpy(), batch.targets.rows.numpy()
    assert (inputs == tokens)[labels == -100].all()
    assert (labels.reshape(-1)[asked] == batch.targets.tokens.numpy()).all()
    hidden = np.flatnonzero(inputs != tokens)
    assert set(hidden) <= set(asked)
    share = len(asked) / (labels != -100).sum()
    assert 0.3 < share < 0.8
    if params.type == "mlm":
        assert batch.targets.weights.sum() == pytest.approx(tokens.size, rel=1e-5)  # the mean over the masked
    else:
        per_token = batch.targets.weights.sum().item() / tokens.size
        assert per_token == pytest.approx(share if params.weighting == "plain" else 1.0, rel=0.25)


def test_the_bound_of_completions_is_unbiased_and_hides_no_prompt(tmp_path: Path) -> None:
    """Over all draws each labelled token counts alike: the mean weight is 1 for each of them."""
    data = dataset(tmp_path, completions(2))
    tokens, labels = data.samples(np.array([0])), data.labels(np.array([0]))
    objective, n = CompletionBoundObjective(data, 0, VOCAB), 4000
    weights: NDArray[np.float64] = np.zeros(SEQ)
    for draw in range(n):
        task = objective(tokens, np.array([0]), np.array([draw]))
        assert (task.inputs == tokens)[labels == -100].all()
        weights[task.targets.rows.numpy()] += task.targets.weights.numpy() / n
    wanted = labels[0] != -100
    assert not weights[~wanted].any()
    assert np.allclose(weights[wanted] * wanted.sum() / SEQ, 1.0, atol=0.15)


# --- adapters


def branch(method: str = "lora", **others: Any) -> FineTuneParams:
    return FineTuneParams(objective="clm", method=method, **others)  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "base").mkdir()
    save_rack(tmp_path / "base", rack_of(), tmp_path / "tokenizer")
    return tmp_path / "base"


def learn_a_little(rack: Rack | Classifier) -> None:
    with torch.no_grad():
        for name, parameter in rack.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_only_adapters_learn_and_the_base_stays_as_it_was(method: str, saved: Path, tmp_path: Path) -> None:
    settings = branch(method, lora=LoRAParams(rank=3), merge=False)
    rack = load_adapted(saved, settings, key="fine_tune.x", seed=0, device=CPU)
    assert {".lora_" in name for name, p in rack.named_parameters() if p.requires_grad} == {True}
    quantized = sum(isinstance(part, StoredLinear) for part in rack.modules())
    assert (quantized > 0) == (method == "qlora")
    tokens = torch.arange(SEQ)[None]
    learn_a_little(rack)
    outputs = rack.logits(tokens)
    finish(rack, merge=False)
    (tmp_path / "tuned").mkdir()
    save_rack(tmp_path / "tuned", rack, tmp_path / "tokenizer")
    before, after = (load_file(directory / "model.safetensors") for directory in (saved, tmp_path / "tuned"))
    if method == "lora":
        assert before.keys() == after.keys()
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())
        assert (saved / "model.safetensors").read_bytes() == (tmp_path / "tuned/model.safetensors").read_bytes()
    assert torch.allclose(load_rack(tmp_path / "tuned").logits(tokens), outputs, atol=1e-4)
    if method == "lora":  # PEFT reads them onto the base
        base = load_rack(saved)
        for place, stack in enumerate(base.stacks):
            adapted: Any = PeftModel.from_pretrained(stack, str(tmp_path / f"tuned/adapters/{place}/task"))
            base.stacks[place] = adapted.merge_and_unload()
        assert torch.allclose(base.logits(tokens), outputs, atol=1e-4)


def test_merged_adapters_are_in_the_weights(saved: Path, tmp_path: Path) -> None:
    rack = load_adapted(saved, branch(lora=LoRAParams(rank=2)), key="x", seed=0, device=CPU)
    learn_a_little(rack)
    outputs = rack.logits(torch.arange(SEQ)[None])
    finish(rack, merge=True)
    (tmp_path / "tuned").mkdir()
    save_rack(tmp_path / "tuned", rack, tmp_path / "tokenizer")
    assert not (tmp_path / "tuned/adapters").exists()
    assert torch.allclose(load_rack(tmp_path / "tuned").logits(torch.arange(SEQ)[None]), outputs, atol=1e-4)


def test_target_modules_that_are_not_there_are_said(saved: Path) -> None:
    with pytest.raises(UserError, match=r"x.lora.target_modules = \['query'\]: stack 0 has no projection query"):
        load_adapted(saved, branch(lora=LoRAParams(target_modules=["query"])), key="fine_tune.x", seed=0, device=CPU)


def test_a_quantized_base_takes_its_share_of_the_memory_of_a_step(tmp_path: Path) -> None:
    """In nf4 the matrices of the stacks take an eighth and their scales; one or two are decoded at a time."""
    model = ModelParams(d_model=128, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=512))
    rack = Rack(RackShape.of(model, [2, 2], VOCAB))
    initialize(rack, name="rack", seed=0)
    for name in ("tokenizer", "base"):
        (tmp_path / name).mkdir()
    save_rack(tmp_path / "base", rack, tmp_path / "tokenizer")
    matrices = 4 * sum(p.numel() for p in rack.stacks.parameters() if p.ndim == 2)
    batch = batch_of(dataset(tmp_path, completions(2)), ObjectiveParams(type="clm"))
    peaks = {}
    for method in ("lora", "qlora"):
        adapted = load_adapted(tmp_path / "base", branch(method), key="x", seed=0, device=CPU)
        with Meter() as meter:
            Window.of(adapted).loss(batch, device=CPU, causal=True).backward()
        peaks[method] = meter.peak
    assert 0.70 * matrices < peaks["lora"] - peaks["qlora"] < 0.875 * matrices


# --- classifiers

YES_NO = Classes(("no", "yes"), pooled=True)


def test_the_mean_of_a_text_is_that_of_its_own_positions() -> None:
    x = torch.randn(2, 5, 3)
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    found = mean_of_segments(x, segments)
    for b in range(2):
        for number in segments[b].unique():
            own = segments[b] == number
            assert torch.allclose(found[b][own], x[b][own].mean(dim=0).expand(int(own.sum()), -1), atol=1e-6)
    assert torch.allclose(mean_of_segments(x, None), x.mean(dim=1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_row_is_classified_alike_alone_and_packed(pooled: bool, tmp_path: Path) -> None:
    model = Classifier.of(rack_of(), Classes(("a", "b", "c"), pooled))
    torch.nn.init.normal_(model.head.projection.weight, generator=torch.Generator().manual_seed(0))
    rows = [(ids, [-100] * (len(ids) - 1) + [i % 3]) for i, (ids, _) in enumerate(completions(5))]
    data = dataset(tmp_path, rows)
    everything = np.arange(len(data))
    packed = model(*(torch.from_numpy(part(everything)) for part in (data.samples, data.segments)))
    task = ClassesObjective(data)(data.samples(everything), everything, everything)
    together = packed.reshape(-1, 3)[task.targets.rows]
    alone = torch.stack([model(torch.tensor([ids]))[0, -1] for ids, _ in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    batch = Batch(torch.from_numpy(task.inputs), task.targets, None, torch.from_numpy(data.segments(everything)))
    loss = model.window().loss(batch, device=CPU, causal=False)
    labels = torch.tensor([labels[-1] for _, labels in rows])
    assert torch.allclose(loss, F.cross_entropy(alone, labels), atol=1e-5)


def test_a_classifier_that_was_saved_is_the_same(tmp_path: Path) -> None:
    model = Classifier.of(rack_of(), YES_NO)
    torch.nn.init.normal_(model.head.projection.weight)
    for name in ("tokenizer", "a"):
        (tmp_path / name).mkdir()
    save_classifier(tmp_path / "a", model, tmp_path / "tokenizer")
    again = load_classifier(tmp_path / "a")
    assert again.classes == YES_NO
    tokens = torch.arange(SEQ)[None]
    assert torch.equal(model(tokens), again(tokens))


class _Saying(Classifier):
    """Says what it is told to."""

    answers: Tensor

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.answers


def test_accuracy_and_f1_are_those_of_the_definitions(tmp_path: Path) -> None:
    truth, said = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    rows = [([1, 2, EOS], [-100, -100, label]) for label in truth]
    data = dataset(tmp_path, rows, split="validation")
    model = _Saying(RackShape.of(MODEL, [1], VOCAB), Classes(("a", "b", "c", "never"), pooled=True))
    model.answers = torch.zeros(3, SEQ, 4)
    for i, answer in enumerate(said):
        model.answers[i // 2, 2 + 3 * (i % 2), answer] = 1
    tokens = Tokens(data, data, Vocabulary(VOCAB, EOS), np.array([3, 2, 1, 0]), 1.0, tmp_path)
    found = classification_metrics(model, tokens, EvaluateParams(), seed=0, device=CPU, dtype="fp32")
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx({"a": 0.8, "b": 0.5, "c": 2 / 3})
    assert found["f1_macro"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert found["majority"] == pytest.approx({"accuracy": 0.5, "f1_macro": 2 / 3 / 3})
    assert found["f1_macro_low"] < found["f1_macro"] < found["f1_macro_high"]
    assert (found["rows"], found["labels"]) == (6, 6)
    assert found == classification_metrics(model, tokens, EvaluateParams(), seed=0, device=CPU, dtype="fp32")


@pytest.mark.parametrize("causal", [True, False])
def test_the_likelihood_of_completions_is_theirs_alone(causal: bool, tmp_path: Path) -> None:
    rack, rows = rack_of().eval(), completions(7)
    data = dataset(tmp_path, rows)
    counts = np.bincount([t for _, labels in rows for t in labels if t >= 0], minlength=VOCAB)
    tokens = Tokens(data, data, Vocabulary(VOCAB, EOS), counts, 1.0, tmp_path)
    params = EvaluateParams(draws=300 if not causal else 1, batch_size=64)
    found = completion_metrics(rack, Evaluator(tokens, params, 0, CPU, "fp32"), causal=causal)
    labelled = sum(label != -100 for _, labels in rows for label in labels)
    smoothed = (counts + 1.0) / (counts + 1.0).sum()
    unigram = -sum(math.log(smoothed[t]) for _, labels in rows for t in labels if t >= 0) / labelled
    assert found["unigram"]["nats_per_token"] == pytest.approx(unigram)
    if causal:
        everything = np.arange(len(data))
        task = CompletionObjective(data)(data.samples(everything), everything, everything)
        segments = torch.from_numpy(data.segments(everything))
        batch = Batch(torch.from_numpy(task.inputs), task.targets, None, segments)
        loss = Window.of(rack).loss(batch, device=CPU, causal=True)
        assert found["nats_per_token"] == pytest.approx(loss.item(), rel=1e-5)
        assert 0 <= found["accuracy"] <= 1
    else:  # of the last completions alone, every order of unmasking counts: the bound is finite and stable
        again = completion_metrics(rack, Evaluator(tokens, params, 1, CPU, "fp32"), causal=False)
        assert again["nats_per_token"] == pytest.approx(found["nats_per_token"], rel=0.05)
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] / math.log(2))
    assert found["bits_per_byte_low"] < found["bits_per_byte"] < found["bits_per_byte_high"]


def test_every_stack_has_its_own_rank(saved: Path) -> None:
    settings = branch(lora=LoRAParams(strategy="variable", ranks=[2, 5], target_modules=["v_proj"]))
    rack = load_adapted(saved, settings, key="x", seed=0, device=CPU)
    ranks = [{p.shape[0] for n, p in stack.named_parameters() if ".lora_A." in n} for stack in rack.stacks]
    assert ranks == [{2}, {5}]
    assert all(isinstance(stack, Stack) for stack in rack.stacks)
