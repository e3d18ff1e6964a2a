"""Every value of every parameter of architecture and objective goes through the pipeline and changes what it should."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import COVERED
from tests.pipeline.inprocess import SHOWING, Changes, Pipeline, downstream, project


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    root = tmp_path_factory.mktemp("parameters")
    with project(root) as found:
        pretrained(root)
        own_targets(root)
        questions(root)
        yield found


def pretrained(root: Path) -> None:
    """Two models with a tokenizer, one as wide as ours, one not, and their heads apart from their embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz .,", "<unk>", "<eos>"]
    for width in (16, 24):
        torch.manual_seed(width)
        backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer: Any = PreTrainedTokenizerFast
        tokenizer(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(
            root / f"model-{width}"
        )
        config = LlamaConfig(
            vocab_size=len(letters), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(root / f"model-{width}")


def own_targets(root: Path) -> None:
    """Documents with labels of their own: the successor of each id, and none at every third."""
    generator = torch.Generator().manual_seed(0)
    with (root / "labelled.jsonl").open("w") as file:
        for _ in range(24):
            ids = torch.randint(0, 200, (40,), generator=generator).tolist()
            labels = [-100 if i % 3 == 0 else (x + 1) % 200 for i, x in enumerate(ids)]
            file.write(json.dumps({"ids": ids, "labels": labels}) + "\n")


def questions(root: Path) -> None:
    """Questions with choices that have more masks than are drawn."""
    row = {"prompt": "a", "choices": [" long one", " other"], "answer": 0}
    (root / "quiz.jsonl").write_text((json.dumps(row) + "\n") * 3)


# --- the cases


@dataclass(frozen=True)
class Case:
    """A change of one parameter, and what it must change."""

    name: str
    change: Changes
    first: str
    """The stage whose result it changes first; all that use it, directly or not, must change too, and nothing else."""
    base: Changes = field(default_factory=dict)
    """What else is set, before and after."""
    spared: tuple[str, ...] = ()
    """Stages that come after the first and are the same in spite of it."""


def cases() -> Iterator[Case]:
    """All of them."""
    stack_0, stack_1 = "train_stack_0", "train_stack_1"
    a, m, t, o = "model.attention", "model.mlp", "model.time", "objective"
    mla: Changes = {f"{a}.type": "mla", f"{a}.mla_rkv": 8}
    kernel: Changes = {f"{a}.type": "kernel"}
    mlgka: Changes = {f"{a}.type": "mlgka", f"{a}.mla_rkv": 8, f"{a}.n_kv_heads": 1}

    def of(key: str, value: object, first: str = stack_0, *, base: Changes | None = None, spared: str = "") -> Case:
        return Case(f"{key}={value}", {key: value}, first, base or {}, tuple(spared.split()))

    # attention
    yield Case("standard->gqa", {f"{a}.type": "gqa", f"{a}.n_kv_heads": 1}, stack_0)
    yield Case("standard->mla", mla, stack_0)
    yield Case("standard->kernel", kernel, stack_0)
    yield Case("standard->mlgka", mlgka, stack_0)
    yield of(f"{a}.n_heads", 4)
    yield of(f"{a}.head_dim", 4)
    yield of(f"{a}.qk_norm", True)
    yield of(f"{a}.dropout", 0.5)
    yield of(f"{a}.rope_theta", 100.0)
    for scaling in ("linear", "yarn", "llama3"):
        more = {} if scaling == "linear" else {f"{a}.rope_original_len": 8}
        yield Case(f"rope_scaling={scaling}", {f"{a}.rope_scaling": scaling, f"{a}.rope_factor": 4.0, **more}, stack_0)
    scaled = {f"{a}.rope_scaling": "yarn", f"{a}.rope_factor": 4.0, f"{a}.rope_original_len": 8}
    yield of(f"{a}.rope_factor", 8.0, base=scaled)
    yield of(f"{a}.rope_original_len", 64, base=scaled)
    yield of(f"{a}.mla_rq", 6, base=mla)
    yield of(f"{a}.mla_rkv", 6, base=mla)
    yield of(f"{a}.mla_rope_dim", 2, base=mla)
    yield of(f"{a}.mla_nope_dim", 6, base=mla)
    yield of(f"{a}.mla_v_dim", 6, base=mla)
    for family in ("gaussian", "laplacian", "linear", "uniform"):
        yield of(f"{a}.kernel", family, base=kernel)
    yield of(f"{a}.features", 8, base=kernel)
    yield of(f"{a}.bandwidth", 2.0, base={**kernel, f"{a}.kernel": "gaussian"})
    yield of(f"{a}.redraw", 2, base=kernel)
    yield of(f"{a}.n_kv_heads", 1, base=kernel)
    yield of(f"{a}.mla_rq", 6, base=mlgka)
    yield of(f"{a}.kernel", "gaussian", base=mlgka)
    # single stacks
    yield of("stacks.1.attention", {"type": "kernel"}, stack_1)
    yield of("stacks.1.attention", {"n_heads": 1}, stack_1)
    yield of("stacks.1.mlp", {"hidden": 16}, stack_1)
    yield of("stacks.1.mlp", {"type": "moe"}, stack_1)
    # feed-forward
    yield of(f"{m}.frozen_up", True)
    moe: Changes = {f"{m}.type": "moe"}
    yield of(f"{m}.type", "moe")
    yield of(f"{m}.n_experts", 3, base=moe)
    yield of(f"{m}.top_k", 1, base=moe)
    yield of(f"{m}.n_shared", 1, base=moe)
    yield of(f"{m}.balance_weight", 0.5, base=moe)
    yield of(f"{m}.frozen_up", True, base=moe)
    # embeddings
    own: Changes = {"tokenizer": {"type": "pretrained", "vocab_size": None, "name": "model-16"}}
    yield of("model.tie_embeddings", True)
    yield of("model.embeddings.source", "model-16", base=own)
    yield of("model.embeddings.tensor", "lm_head", base={**own, "model.embeddings.source": "model-16"})
    yield of("model.embeddings.train", False, base={**own, "model.embeddings.source": "model-16"})
    yield of("model.head.source", "model-16", base=own)
    yield of("model.head.tensor", "lm_head", base={**own, "model.head.source": "model-16"})
    yield of("model.head.train", False, base={**own, "model.head.source": "model-16"})
    wide = {"tokenizer": {"type": "pretrained", "vocab_size": None}}
    for place in ("embeddings", "head"):
        adapted = {**wide, f"model.{place}.source": "model-24", f"model.{place}.adapter_hidden": 8}
        yield of(f"model.{place}.adapter_hidden", 12, base=adapted)
    # time
    timed: Changes = {f"{t}.mode": "input"}
    yield of(f"{t}.mode", "input")
    yield of(f"{t}.embedding", "learned", base={**timed, f"{t}.bins": 4})
    yield of(f"{t}.bins", 4, base=timed)
    yield of(f"{t}.width", 8, base=timed)
    yield of(f"{t}.sampling", "batch")
    yield of(f"{t}.mode", "depth")
    yield of(f"{t}.mapping", "exponential", "cache_activations_1", base={f"{t}.mode": "depth", "n_stacks": 3})
    custom = {f"{t}.mapping": "custom", f"{t}.time_per_stack": [0.9, 0.4]}
    yield Case("time_per_stack", custom, "cache_activations_1", base={f"{t}.mode": "depth"})
    # masks
    yield of(f"{o}.mask_min", 0.5)
    yield of(f"{o}.mask_max", 0.5)
    yield of(f"{o}.distribution", "cosine")
    yield of(f"{o}.count", "exact")
    yield of(f"{o}.weighting", "nelbo")
    yield of(f"{o}.variants", 1)
    for schedule in ("constant", "linear", "exponential", "cosine"):
        for over in ("depth", "training"):
            yield Case(f"{schedule} over {over}", {f"{o}.schedule": schedule, f"{o}.schedule_over": over}, stack_0)
    over_depth = {f"{o}.schedule": "linear", f"{o}.schedule_over": "depth"}
    yield of(f"{o}.schedule_stacks", 3, "cache_activations_1", base=over_depth)
    yield of(f"{o}.num_time_steps", 4)
    yield of(f"{o}.time_step_fractions", [0.2, 0.4, 0.6, 0.8], base={f"{o}.num_time_steps": 4})
    yield of(f"{o}.time_step_fractions", {"0": 0.2, "3": 0.5}, base={f"{o}.num_time_steps": 4})
    # of a few samples, which training sees more often than there are variants
    few = {"seq_len": 128, f"{o}.variants": 1, "stack.steps": 16, "stack.batch_size": 16}
    yield of(f"{o}.masks", "fixed", base=few)
    yield Case(f"{o}.masks=pool", {f"{o}.masks": "pool", f"{o}.pool_size": 3}, stack_0)
    yield of(f"{o}.pool_size", 3, base={f"{o}.masks": "pool", f"{o}.pool_size": 2})
    yield of(f"{o}.unit", "word")
    yield of(f"{o}.unit", "word", base={f"{o}.count": "exact"})
    # growth
    g: Changes = {"n_stacks": 3}
    prepend: Changes = {"growth.building_mode": "prepend"}
    qlora: Changes = {"growth.window": 1, "growth.trunk_strategy": "qlora", "adapters.trunk": {"rank": 2}}
    lora: Changes = {"adapters.stack": {"rank": 2}}
    yield of("growth.masks", "redraw")
    yield of("growth.window", 1, stack_1, base=g)
    yield of("growth.window", None, "train_stack_2", base={**g, "growth.window": 1})
    yield of("growth.stride", 2, stack_1, base=g)
    yield of("growth.unfreeze", 0.5, stack_1, base={"growth.window": 1})
    yield of("growth.building_mode", "prepend", stack_1, base=g)
    yield of("growth.building_mode", "insert", stack_1, base=g)
    yield of("growth.trunk_strategy", "frozen", stack_1, base={"growth.building_mode": "insert"})
    yield of("growth.consistency", 0.5, stack_1, base=prepend)
    yield of("growth.sweeps", 1, "train_stack_0_sweep_1")
    yield of("growth.sweeps", 2, "train_stack_0_sweep_2", base={"growth.sweeps": 1})
    yield of("stack.steps_factor", 2.0, stack_1)
    yield of("stack.lr_factor", 0.5, stack_1)
    # formats and adapters
    for precision in ("full", "half", "int8", "fp8", "fp4", "nf4", "nvfp4"):
        yield of("trunk.precision", precision, "quantize_trunk_0")
    yield of("trunk.precision", "nf4", "quantize_trunk_0", base=prepend)
    yield of("trunk.precisions", [None, "nf4"], "quantize_trunk_1", base=g)
    yield of("trunk.activations", "fp32", "cache_activations_1")
    yield of("trunk.activations", "int8", "cache_activations_1")
    yield of("trunk.activations", "fp8", "cache_activations_1")
    yield of("trunk.compute", "bf16", "cache_activations_1")
    yield of("trunk.compute", "bf16", stack_1, base=prepend)
    yield of("adapters.stack", {"rank": 2}, stack_1)
    yield of("adapters.stack.rank", 3, stack_1, base=lora)
    yield of("adapters.stack.alpha", 3.0, stack_1, base=lora)
    yield of("adapters.stack.dropout", 0.5, stack_1, base=lora)
    yield of("adapters.stack.lr", 1.0e-3, stack_1, base=lora)
    yield of("adapters.stack.target_modules", ["q_proj", "down_proj"], stack_1, base=lora)
    yield of("adapters.trunk.rank", 3, stack_1, base=qlora)
    yield of("adapters.trunk.lr", 1.0e-3, stack_1, base=qlora)
    yield of("trunk.precision", "nf4", "quantize_trunk_0", base=qlora)
    # of single stacks: those below keep what they have
    each: dict[str, Any] = {"strategy": "variable", "ranks": [2, 2, 2]}
    loras: Changes = {**g, "adapters.stack": {**each, "alphas": [4.0, 4.0, 4.0]}}
    yield of("adapters.stack.ranks.1", 3, stack_1, base=loras)
    yield of("adapters.stack.ranks.2", 3, "train_stack_2", base=loras)
    yield of("adapters.stack.alphas.2", 8.0, "train_stack_2", base=loras)
    yield of("adapters.trunk.ranks.0", 3, stack_1, base={**g, **qlora, "adapters.trunk": each})
    yield of("adapters.trunk.ranks.1", 3, "train_stack_2", base={**g, **qlora, "adapters.trunk": each})
    # whoever loads adapters merges them: what is made of the rack is the same
    unmerged = "evaluate_fused fine_tune_clm fine_tune_mlm evaluate_clm evaluate_mlm"
    yield of("adapters.merge", False, "fuse", base=lora, spared=unmerged)
    # objectives
    yield of(o, {"type": "clm"})
    yield of(f"{o}.type", "mlm", base={f"{o}.mask_max": 0.5})
    yield of(f"{o}.random_share", 0.1, base={f"{o}.type": "mlm"})
    yield of(f"{o}.keep_share", 0.1, base={f"{o}.type": "mlm"})
    yield of(f"{o}.embedding_weight", 0.5)
    labelled: Changes = {
        "data": {"source": "files", "files": ["labelled.jsonl"], "ids_column": "ids", "labels_column": "labels"},
        o: {"type": "custom"},
        "fine_tune": {},
    }
    yield Case("custom", labelled, "corpus")
    yield of(f"{o}.causal", True, base=labelled)
    yield of("fine_tune.mlm.mask_rate", 0.5, "fine_tune_mlm")
    yield of("fine_tune.mlm.random_share", 0.5, "fine_tune_mlm")
    yield of("fine_tune.mlm.keep_share", 0.5, "fine_tune_mlm")
    yield of("model.document_mask", True, base={"seq_len": 256})
    # from and to other models
    like_theirs: Changes = {**own, "model.mlp.hidden": 8}
    started: Changes = {"growth.start": "model-16", "growth.start_stacks": 1}
    yield Case("growth.start", started, "import", like_theirs)
    for models in (["fused"], ["clm"]):
        to_others: Changes = {"export.models": models}
        yield of("export.dtype", "bf16", f"export_{models[0]}", base=to_others)
    yield of("export.models", ["clm", "fused"], "export_fused", base={"export.models": ["clm"]})
    # evaluation and analysis
    quiz: Changes = {"evaluate.choices": [{"file": "quiz.jsonl", "draws": 2}]}
    yield of("evaluate.choices", quiz["evaluate.choices"], "answer_choices_fused")
    # a causal model reads a choice as it is
    only_causal = {"clm": {"objective": "clm", "steps": 2, "batch_size": 4}}
    yield of("evaluate.choices.0.draws", 5, "answer_choices_fused", base={**quiz, "fine_tune": only_causal})
    # early stopping
    steep: Changes = {"stack.steps": 12, "stack.lr": 0.3, "optimizer.schedule": "constant"}
    yield of("stack.stop_every", 2, base=steep)
    stopping = {**steep, "stack.stop_every": 1, "stack.patience": 4}
    yield of("stack.patience", 1, base=stopping)
    yield of("stack.stop_samples", 2, base=stopping)


UNTRACKED: dict[str, Changes] = {
    "store_all_time_steps": {"activations.store_all_time_steps": False},
    "time_step_cache_size": {"activations.store_all_time_steps": False, "activations.time_step_cache_size": 2},
    "shard_mb": {"activations.shard_mb": 2},
    "prefetch": {"activations.prefetch": 1},
    "trunk": {"activations.trunk": "resident", "growth.cache_activations": False},
    "every": {"checkpoint.every": 20},
}
"""Of the cache and the checkpoints."""


def test_what_is_said_to_change_no_result_changes_none(
    pipeline: Pipeline, record_property: Callable[[str, object], None]
) -> None:
    """The pipeline runs again for it, from nothing. A shard holds a third of a time step, and all are taken twice."""
    data: Changes = {"seq_len": 128, "data.dummy_documents": 40, "model.d_model": 64, "trunk.activations": "fp32"}
    base = {**data, "fine_tune": {}, "objective.variants": 3, "stack.steps": 60, "stack.batch_size": 8}
    leave_out, stores = (*SHOWING, "evaluate"), Path(".stackwise/activations")
    before, lines = pipeline.run(base, leave_out=leave_out), []
    for name, change in UNTRACKED.items():
        pipeline.forget()
        shutil.rmtree(stores, ignore_errors=True)
        after = pipeline.run({**base, **change}, leave_out=leave_out)
        assert after == {stage: files for stage, files in before.items() if stage in after}
        on_disk = len([path for path in stores.rglob("c/*/0/0") if path.is_file()])
        lines.append(f"{name:<60}  0 of {len(after)} stages; {on_disk} shards on disk")
    record_property(COVERED, "\n".join(lines))


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_parameter(case: Case, pipeline: Pipeline, record_property: Callable[[str, object], None]) -> None:
    before = pipeline.run(case.base)
    after = pipeline.run({**case.base, **case.change})
    different = {name for name in after if after[name] != before.get(name)}
    added = after.keys() - before.keys()  # stages that there were not before
    expected = downstream(case.first) - set(case.spared) | added
    assert different == expected
    record_property(COVERED, f"{case.name:<60} {len(different):>2} of {len(after)} stages, from {case.first}")


# --- analysis and samples


@pytest.mark.parametrize(("key", "value"), [("samples", 3), ("mask_rates", [0.25]), ("tokens", 6), ("heads", 2)])
def test_analysis(key: str, value: object, pipeline: Pipeline) -> None:
    shown = tuple(name for name in SHOWING if name != "analyse")
    before = pipeline.run({}, leave_out=shown)
    after = pipeline.run({f"analyse.{key}": value}, leave_out=shown)
    assert {name for name in after if after[name] != before[name]} == {"analyse"}


CLM, UNMASKING = {"sample_clm"}, {"sample_fused", "sample_mlm"}
SAMPLES: list[tuple[str, object, set[str], Changes]] = [
    ("prompts", ["", "A"], CLM | UNMASKING, {}),
    ("prompts", ["A", "B[MASK:2]"], UNMASKING, {"samples.prompts": ["A"]}),  # nothing for models that cannot fill in
    ("number", 2, CLM | UNMASKING, {}),
    ("new_tokens", 5, CLM | UNMASKING, {}),
    ("temperature", 0.2, CLM | UNMASKING, {}),
    ("top_k", 2, CLM | UNMASKING, {}),
    ("top_p", 0.2, CLM | UNMASKING, {}),
    ("stop", [*"abcdefghijklmnopqrstuvwxyz .,"], CLM | UNMASKING, {"samples.number": 30}),
    ("ends", True, CLM | UNMASKING, {"samples.temperature": 5.0, "samples.number": 30}),
    ("repetition_penalty", 5.0, CLM, {}),
    ("sampler", "confidence", UNMASKING, {}),
    ("steps", 16, UNMASKING, {}),
    ("block", 4, UNMASKING, {}),
]


@pytest.mark.parametrize(("key", "value", "expected", "base"), SAMPLES, ids=lambda value: str(value)[:20])
def test_samples(
    key: str,
    value: object,
    expected: set[str],
    base: Changes,
    pipeline: Pipeline,
    record_property: Callable[[str, object], None],
) -> None:
    before = pipeline.run(base, leave_out=())
    after = pipeline.run({**base, f"samples.{key}": value}, leave_out=())
    assert {name for name in after if after[name] != before[name]} == expected | {"report", "score_samples"}
    record_property(COVERED, f"{f'samples.{key}={value}'[:60]:<60} {len(expected):>2} of {len(after)} stages")


def test_samples_of_what_need_not_be_text_are_not_made(pipeline: Pipeline) -> None:
    (case,) = (case for case in cases() if case.name == "custom")
    made = pipeline.run(case.change, leave_out=())
    assert "report" in made
    assert not any(name.startswith("sample_") for name in made)
