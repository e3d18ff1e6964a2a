"""Params files that must be refused, and what the refusal must say. For tests and for benchmarks/bad_params.py."""

from dataclasses import dataclass
from typing import Any

import yaml

GOOD = """\
seed: 0
seq_len: 16
data: {source: dummy, dummy_documents: 40}
tokenizer: {type: byte, vocab_size: null}
model:
  d_model: 16
  attention: {type: standard, n_heads: 2}
  mlp: {hidden: 32}
objective: {mask_min: 0.15, mask_max: 0.9}
n_stacks: 2
stack: {blocks: 1, steps: 20, batch_size: 4, lr: 3.0e-3, init: copy}
stacks: [{}, {}]
growth: {}
adapters: {}
optimizer: {schedule: wsd, warmup: 0.05, decay: 0.3}
compute: {dtype: bf16, threads: 1}
trunk: {}
joint: {batch_size: 4}
fine_tune:
  clm: {objective: clm, steps: 8, batch_size: 4, lr: 1.0e-3}
evaluate: {samples: 8}
analyse: {}
samples: {}
export: {}
activations: {}
checkpoint: {}
tracking: {enabled: false}
"""
GONE = object()
_AFTER = GOOD.count("\n") + 1
"""The line after the last one."""


@dataclass(frozen=True)
class Case:
    """A file that is wrong."""

    name: str
    content: bytes | None
    """None: there is no file."""
    says: tuple[str, ...]
    """Parts of the message, after the name of the file."""
    problems: int = 1


def _edited(changes: dict[str, Any]) -> bytes:
    """The good file with other values at some dotted paths."""
    tree = yaml.safe_load(GOOD)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if value is GONE:
            del node[last]
        else:
            node[int(last) if isinstance(node, list) else last] = value
    return yaml.safe_dump(tree, sort_keys=False).encode()


def _wrong(name: str, changes: dict[str, Any], *says: str, problems: int = 1) -> Case:
    return Case(name, _edited(changes), says, problems)


def _raw(name: str, old: str, new: str, *says: str) -> Case:
    assert old in GOOD
    return Case(name, GOOD.replace(old, new, 1).encode(), says)


CASES = [
    # --- names
    _wrong("unknown section", {"optimiser": {}}, "optimiser = {}: no such parameter", "did you mean optimizer?"),
    _wrong("unknown key", {"stack.learning": 1}, "stack.learning = 1: no such", "the keys here are blocks, steps"),
    _wrong("misspelt key", {"stack.stesp": 10}, "stack.stesp = 10: no such parameter", "did you mean stack.steps?"),
    _wrong(
        "misspelt nested key",
        {"model.attention.n_head": 2},
        "model.attention.n_head = 2: no such parameter; did you mean model.attention.n_heads?",
    ),
    _wrong(
        "misspelt key of an override", {"stacks.1.ini": "zero"}, "stacks.1.ini = zero", "did you mean stacks.1.init?"
    ),
    _wrong(
        "misspelt key of a branch",
        {"fine_tune.clm.step": 3},
        "fine_tune.clm.step = 3: no such parameter; did you mean fine_tune.clm.steps?",
    ),
    _wrong("branch without an objective", {"fine_tune.mml": {}}, "fine_tune.mml.objective: missing; expected clm, mlm"),
    _wrong("branch that is null", {"fine_tune.clm": None}, "fine_tune.clm = null: expected a mapping of keys"),
    _wrong(
        "branches as a list",
        {"fine_tune": [{"objective": "clm"}]},
        "fine_tune = [{objective: clm}]: expected a mapping; each value: a mapping of keys to values",
    ),
    _wrong(
        "name of a branch that names no file",
        {"fine_tune.My Chat": {"objective": "clm", "batch_size": 4}},
        "fine_tune.My Chat = {batch_size: 4, objective: clm}: expected as a name small letters, digits, `_` and `-`",
    ),
    *(
        _wrong(
            f"branch called {name}",
            {f"fine_tune.{name}": {"objective": "clm"}},
            f"fine_tune.{name} = {{objective: clm}}: expected another name",
        )
        for name in ("fused", "depth", "stack_0", "joint")
    ),
    _wrong("key of another section", {"lr": 0.1}, "lr = 0.1: no such parameter; did you mean stack.lr?"),
    _wrong("key that is a number", {"3": 1}, "3 = 1: no such parameter; the keys here are seed, seq_len"),
    # --- what must be there
    _wrong(
        "missing section", {"objective": GONE}, "objective: missing; expected a mapping", "`{}` takes every default"
    ),
    _wrong("missing value", {"seed": GONE}, "seed: missing; expected an integer from 0 to 4294967295"),
    _wrong("missing list", {"stacks": GONE}, "stacks: missing; expected a list", "`[]` is an empty one"),
    _raw("section without content", "trunk: {}", "trunk:", "trunk = null: expected a mapping of keys to values"),
    _raw("value without content", "seed: 0", "seed:", "seed = null: expected an integer from 0 to 4294967295"),
    # --- types
    _wrong("text for an integer", {"seq_len": "long"}, "seq_len = long: expected an integer of at least 2"),
    _wrong("quoted integer", {"seq_len": "16"}, "seq_len = '16': expected an integer", "write 16"),
    _wrong("fraction for an integer", {"stack.steps": 2.5}, "stack.steps = 2.5: expected an integer of at least 1"),
    _wrong("float for an integer", {"stack.steps": 20.0}, "stack.steps = 20.0: expected an integer", "write 20"),
    _raw(
        "exponent without a point",
        "3.0e-3",
        "1e-4",
        "stack.lr = 1e-4: expected a number above 0; this is text in YAML, not a number; write 0.0001",
    ),
    _wrong(
        "truth value for an integer", {"fine_tune.clm.steps": True}, "fine_tune.clm.steps = true: expected an integer"
    ),
    _wrong("number for a truth value", {"tracking.enabled": 1}, "tracking.enabled = 1: expected true or false"),
    _wrong("number for a text", {"tracking.experiment": 7}, "tracking.experiment = 7: expected a text"),
    _wrong("mapping for a list", {"stacks": {"1": {"lr": 0.1}}}, "stacks = {'1': {lr: 0.1}}: expected a list"),
    _wrong("list for a mapping", {"stack": [1, 2]}, "stack = [1, 2]: expected a mapping of keys to values"),
    _wrong("number for a mapping", {"joint": 3}, "joint = 3: expected a mapping of keys to values"),
    _wrong("text for a list", {"evaluate.mask_rates": "0.5"}, "evaluate.mask_rates = '0.5': expected a list"),
    _wrong("text for a file of questions", {"evaluate.choices": ["a.jsonl"]}, "evaluate.choices.0 = a.jsonl: expected"),
    _wrong("questions without a file", {"evaluate.choices": [{"draws": 3}]}, "evaluate.choices.0.file: missing"),
    _wrong(
        "two files of questions of one name",
        {"evaluate.choices": [{"file": "a/quiz.jsonl"}, {"file": "b/quiz.jsonl"}]},
        "evaluate.choices.1.file = b/quiz.jsonl: metrics know files by their names: expected one 'quiz'",
    ),
    _wrong(
        "scorer that is not causal",
        {"evaluate.scorer": "fused"},
        "evaluate.scorer = fused: expected null or clm: the causal models of this pipeline",
    ),
    _wrong("rates of the analysis", {"analyse.mask_rates": [0.5, 0.2]}, "analyse.mask_rates = [0.5, 0.2]: expected"),
    _raw("not a number", "3.0e-3", ".nan", "stack.lr = .nan: expected a number above 0"),
    _raw("infinite", "3.0e-3", ".inf", "stack.lr = .inf: expected a number above 0"),
    # --- ranges and choices
    _wrong(
        "wrong choice",
        {"compute.dtype": "bf61"},
        "compute.dtype = bf61: expected fp32, bf16 or fp16; did you mean bf16?",
    ),
    _wrong("choice of none", {"data.source": 7}, "data.source = 7: expected python-docs, files, hub or dummy"),
    _wrong(
        "wrong initialization",
        {"stacks.1.init": "ones"},
        "stacks.1.init = ones: expected copy, zero or random, or null",
    ),
    _wrong("negative learning rate", {"stack.lr": -0.1}, "stack.lr = -0.1: expected a number above 0"),
    _wrong("negative seed", {"seed": -1}, "seed = -1: expected an integer from 0 to 4294967295"),
    _wrong("no stacks", {"n_stacks": 0, "stacks": []}, "n_stacks = 0: expected an integer of at least 1"),
    _wrong("mask range from zero", {"objective.mask_min": 0}, "objective.mask_min = 0: expected a number in (0, 1]"),
    _wrong(
        "mask range above one", {"objective.mask_max": 1.1}, "objective.mask_max = 1.1: expected a number in (0, 1]"
    ),
    _wrong("mask rate out of range", {"evaluate.mask_rates": [0.5, 2.0]}, "evaluate.mask_rates.1 = 2.0", "(0, 1]"),
    _wrong("empty validation", {"data.validation_fraction": 0}, "data.validation_fraction = 0", "a number in (0, 1)"),
    # --- combinations
    _wrong(
        "mask range upside down",
        {"objective.mask_min": 0.95},
        "objective.mask_min = 0.95: expected at most objective.mask_max (0.9)",
    ),
    _wrong(
        "mask rates that fall", {"evaluate.mask_rates": [0.5, 0.3]}, "evaluate.mask_rates = [0.5, 0.3]", "greater than"
    ),
    _wrong(
        "heads that do not divide the width",
        {"model.attention.n_heads": 3},
        "model.attention.n_heads = 3: expected a divisor of model.d_model (16)",
    ),
    _wrong("heads of odd width", {"model.attention.n_heads": 16}, "model.attention.n_heads = 16", "an even width"),
    _wrong(
        "key-value heads that do not divide the heads",
        {"model.attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 3}},
        "model.attention.n_kv_heads = 3: expected a divisor of n_heads (4)",
    ),
    _wrong(
        "gqa without key-value heads", {"model.attention.type": "gqa"}, "model.attention.n_kv_heads = null: expected"
    ),
    _wrong(
        "key-value heads without gqa",
        {"model.attention.n_kv_heads": 1},
        "model.attention.n_kv_heads = 1: has no effect",
    ),
    _wrong(
        "overrides of a stack that does not exist",
        {"stacks": [{}, {}, {"lr": 0.1}]},
        "stacks.2 = {lr: 0.1}: overrides a stack that does not exist: n_stacks is 2, the last stack is 1",
    ),
    _wrong("first stack as a copy", {"stacks.0.init": "copy"}, "stacks.0.init = copy", "expected random or zero"),
    _wrong(
        "batches that micro-batches do not divide",
        {"optimizer.accumulate": 3, "joint.batch_size": 3, "fine_tune": {}},
        "stack.batch_size = 4: expected a multiple of optimizer.accumulate (3)",
    ),
    _wrong("phases longer than training", {"optimizer.warmup": 0.8}, "optimizer.decay = 0.3: expected at most 0.2"),
    _wrong("files without a source", {"data.files": ["*.txt"]}, "data.files = ['*.txt']: has no effect with", "dummy"),
    _wrong("source without files", {"data": {"source": "files"}}, "data.files = []: expected at least one glob"),
    _wrong("source without a data set", {"data": {"source": "hub"}}, "data.dataset = null: expected the name"),
    _wrong(
        "vocabulary too small", {"tokenizer": {"vocab_size": 100}}, "tokenizer.vocab_size = 100: expected at least 258"
    ),
    _wrong("vocabulary of bytes", {"tokenizer.vocab_size": 300}, "tokenizer.vocab_size = 300: has no effect", "byte"),
    _wrong("tokenizer without a name", {"tokenizer.type": "pretrained"}, "tokenizer.name = null: expected a directory"),
    _wrong("name without a tokenizer", {"tokenizer.name": "gpt2"}, "tokenizer.name = gpt2: has no effect", "byte"),
    # --- architectures
    _wrong(
        "latent rank larger than the width",
        {"model.attention": {"type": "mla", "n_heads": 2, "mla_rkv": 32, "mla_rq": 8}},
        "model.attention.mla_rkv = 32: expected at most model.d_model (16)",
    ),
    _wrong(
        "latents without a rank", {"model.attention.type": "mla"}, "model.attention.mla_rkv = null: expected a number"
    ),
    _wrong(
        "rank without latents",
        {"model.attention.mla_rkv": 8},
        "model.attention.mla_rkv = 8: has no effect with attention type standard (it has with mla, mlgka)",
    ),
    _wrong(
        "rotary part as wide as the head",
        {"model.attention": {"type": "mla", "n_heads": 2, "mla_rkv": 8, "mla_rope_dim": 8}},
        "model.attention.mla_rope_dim = 8: expected less than the head width (8), or mla_nope_dim",
    ),
    _wrong(
        "dropout of a kernel",
        {"model.attention": {"type": "kernel", "n_heads": 2, "dropout": 0.1}},
        "model.attention.dropout = 0.1: has no effect with attention type kernel",
    ),
    _wrong(
        "random features of a kernel that has none",
        {"model.attention": {"type": "kernel", "n_heads": 2, "kernel": "linear", "features": 8}},
        "model.attention.features = 8: has no effect with kernel linear",
    ),
    _wrong(
        "bandwidth of a kernel that has none",
        {"model.attention": {"type": "kernel", "n_heads": 2, "bandwidth": 2.0}},
        "model.attention.bandwidth = 2.0: has no effect with kernel softmax",
    ),
    _wrong(
        "odd number of features",
        {"model.attention": {"type": "kernel", "n_heads": 2, "features": 7}},
        "model.attention.features = 7: expected an even number",
    ),
    _wrong(
        "longer context without a factor", {"model.attention.rope_scaling": "linear"}, "rope_factor = null: expected"
    ),
    _wrong("factor without a longer context", {"model.attention.rope_factor": 2.0}, "rope_factor = 2.0: has no effect"),
    _wrong(
        "more experts than there are",
        {"model.mlp": {"type": "moe", "top_k": 9}},
        "model.mlp.top_k = 9: expected at most",
    ),
    _wrong("experts without a mixture", {"model.mlp.n_experts": 8}, "model.mlp.n_experts = 8: has no effect", "swiglu"),
    _wrong(
        "copy of another architecture",
        {"stacks.1": {"attention": {"type": "kernel"}, "init": "copy"}},
        "stacks.1.init = copy: stack 1 has other weights than stack 0, which it cannot copy: expected random or zero",
    ),
    _wrong(
        "override that does not fit",
        {"stacks.1": {"attention": {"n_heads": 3}, "init": "random"}},
        "stacks.1.attention.n_heads = 3: expected a divisor of model.d_model (16)",
    ),
    _wrong(
        "override without what its type needs",
        {"stacks.1": {"attention": {"type": "mla"}, "init": "random"}},
        "stacks.1.attention.mla_rkv = null: expected a number",
    ),
    # --- vocabularies of other models
    _wrong(
        "pretrained embeddings with another tokenizer",
        {"model.embeddings": {"source": "some/model"}},
        "tokenizer.type = byte: expected pretrained, with tokenizer.name null",
    ),
    _wrong("adapter of nothing", {"model.head.adapter_hidden": 8}, "model.head.adapter_hidden = 8: has no effect"),
    _wrong(
        "tied head from elsewhere",
        {
            "model.tie_embeddings": True,
            "model.head": {"source": "some/model"},
            "tokenizer": {"type": "pretrained", "vocab_size": None},
        },
        "model.head.source = some/model: has no effect with model.tie_embeddings true",
    ),
    # --- time
    _wrong("bins without time", {"model.time.bins": 4}, "model.time.bins = 4: has no effect with model.time.mode none"),
    _wrong(
        "learned time without bins",
        {"model.time": {"mode": "input", "embedding": "learned"}},
        "model.time.bins = null: expected a number",
    ),
    _wrong("custom times that are not there", {"model.time": {"mode": "depth", "mapping": "custom"}}, "time_per_stack"),
    # --- growth
    _wrong(
        "cache of stacks that learn",
        {"growth": {"window": None, "cache_activations": True}},
        "growth.cache_activations = true: expected false or null: with window null every stack still learns",
    ),
    _wrong(
        "cache of a fused trunk",
        {"growth": {"mode": "fused", "cache_activations": True}},
        "growth.cache_activations = true: expected false or null: with mode fused",
    ),
    _wrong(
        "cache below what is prepended",
        {"growth": {"building_mode": "prepend", "cache_activations": True}},
        "growth.cache_activations = true: expected false or null: below a stack that is prepended is nothing",
    ),
    _wrong(
        "window of what is frozen",
        {"growth": {"window": 1, "trunk_strategy": "frozen"}},
        "growth.window = 1: expected 0, because trunk_strategy is frozen",
    ),
    _wrong(
        "trunk that learns outside the window",
        {"growth.trunk_strategy": "trainable"},
        "growth.window = 0: expected a number of stacks, or null for all, because trunk_strategy is trainable",
    ),
    _wrong(
        "fusion mode and trunk strategy",
        {"growth": {"mode": "fused", "fusion_mode": "trainable", "trunk_strategy": "frozen"}},
        "growth.trunk_strategy = frozen: expected trainable or null, because fusion_mode is trainable",
    ),
    _wrong(
        "prepending below what learns",
        {"growth": {"building_mode": "prepend", "trunk_strategy": "trainable"}},
        "growth.trunk_strategy = trainable: expected frozen or qlora with building_mode prepend",
    ),
    _wrong(
        "end to end with a window",
        {"growth": {"strategy": "end_to_end", "window": 1}, "stack.init": "random"},
        "growth.window = 1: has no effect with strategy: end_to_end",
    ),
    _wrong(
        "stacks in turn without a sweep",
        {"growth": {"strategy": "end_to_end", "end_to_end_scope": "stackwise"}, "stack.init": "random"},
        "growth.sweeps = 0: expected at least 1",
    ),
    _wrong(
        "layer-wise with two blocks",
        {"growth.mode": "layerwise", "stack.blocks": 2},
        "stack.blocks = 2: expected 1, because growth.mode is layerwise",
    ),
    _wrong("consistency of nothing", {"growth.consistency": 0.5}, "growth.consistency = 0.5: has no effect"),
    _wrong("unfreezing of nothing", {"growth.unfreeze": 0.5}, "growth.unfreeze = 0.5: has no effect"),
    _wrong(
        "masks redrawn where there are none",
        {"growth.masks": "redraw", "objective": {"type": "clm"}},
        "growth.masks = redraw: has no effect with objective.type clm",
    ),
    _wrong("negative window", {"growth.window": -1}, "growth.window = -1: expected an integer of at least 0, or null"),
    # --- early stopping
    _wrong(
        "patience without validations", {"stack.patience": 5}, "stack.patience = 5: has no effect without stop_every"
    ),
    _wrong(
        "samples of no validation",
        {"stack.stop_samples": 8},
        "stack.stop_samples = 8: has no effect without stop_every: give the steps between two validations",
    ),
    _wrong("no steps between validations", {"stack.stop_every": 0}, "stack.stop_every = 0: expected an integer of at"),
    # --- adapters and formats
    _wrong(
        "adapted trunk without adapters",
        {"growth": {"trunk_strategy": "qlora", "window": 1}},
        "adapters.trunk = null: expected a mapping (`{}` takes every default)",
    ),
    _wrong("adapters of a frozen trunk", {"adapters.trunk": {}}, "adapters.trunk = {}: expected null", "is not qlora"),
    _wrong(
        "LoRA stacks in a window that learns",
        {"growth.window": 1, "adapters.stack": {}},
        "adapters.stack = {}: expected null: with this regime of growth older stacks learn with all their weights",
    ),
    _wrong(
        "pattern of a constant rank",
        {"adapters.stack": {"rank_pattern": "linear"}},
        "adapters.stack.rank_pattern = linear: has no effect with strategy simplified",
    ),
    _wrong(
        "too few ranks",
        {"adapters.stack": {"strategy": "variable", "ranks": [4]}},
        "adapters.stack.ranks = [4]: expected a value for each of the n_stacks (2) stacks",
    ),
    _wrong("unmerged nothing", {"adapters.merge": False}, "adapters.merge = false: has no effect without adapters"),
    _wrong("unknown format", {"trunk.precision": "int4"}, "trunk.precision = int4: expected full, half, bfloat16"),
    _wrong(
        "more formats than stacks",
        {"trunk.precisions": [None, "nf4", "nf4"]},
        "trunk.precisions = [null, nf4, nf4]: expected at most 2 formats",
    ),
    _wrong(
        "size of a cache that holds everything",
        {"activations.time_step_cache_size": 2},
        "activations.time_step_cache_size = 2: has no effect with store_all_time_steps: true",
    ),
    _wrong(
        "as many time steps at once as there are",
        {"activations": {"store_all_time_steps": False, "time_step_cache_size": 4}},
        "activations.time_step_cache_size = 4: expected less than objective.variants (4)",
    ),
    _wrong(
        "few of one time step",
        {"activations": {"store_all_time_steps": False}, "objective.variants": 1},
        "activations.store_all_time_steps = false: expected true: with objective.variants 1",
    ),
    _wrong(
        "time steps without masks",
        {"activations": {"store_all_time_steps": False}, "objective": {"type": "clm"}},
        "activations.store_all_time_steps = false: expected true: with objective.type clm a sample has one time step",
    ),
    _wrong(
        "clipping while updating",
        {"optimizer.in_backward": True},
        "optimizer.grad_clip = 1.0: expected null with in_backward",
    ),
    # --- several at once: a bad value hides no problem elsewhere
    _wrong(
        "everything at once",
        {
            "sed": 1,
            "seed": "x",
            "stack.lr": "fast",
            "model.attention.n_heads": 3,
            "stacks": [{"init": "copy"}, {}, {"steps": 3}],
            "evaluate.mask_rates": [2.0],
            "optimizer.warmup": 0.8,
            "trunk": None,
        },
        "9 problems\n",
        "sed = 1: no such parameter; did you mean seed?",
        "seed = x: expected an integer",
        "stack.lr = fast: expected a number above 0",
        "model.attention.n_heads = 3: expected a divisor",
        "stacks.0.init = copy",
        "stacks.2 = {steps: 3}",
        "evaluate.mask_rates.0 = 2.0",
        "optimizer.decay = 0.3",
        "trunk = null",
        problems=9,
    ),
    # --- branches of fine-tuning
    _wrong(
        "adapters without a method that has them",
        {"fine_tune.clm.lora": {"rank": 4}, "fine_tune.clm.merge": False},
        "fine_tune.clm.lora = {rank: 4}: has no effect with method full, which has no adapters: leave it out",
        "fine_tune.clm.merge = false: has no effect with method full",
        problems=2,
    ),
    _wrong(
        "format of a base that is not quantized",
        {"fine_tune.clm.method": "lora", "fine_tune.clm.precision": "int8"},
        "fine_tune.clm.precision = int8: has no effect with method lora, which quantizes nothing: leave it out",
    ),
    _wrong(
        "ranks of too few stacks",
        {"fine_tune.clm.method": "lora", "fine_tune.clm.lora": {"strategy": "variable", "ranks": [4]}},
        "fine_tune.clm.lora.ranks = [4]: expected a value for each of the n_stacks (2) stacks",
    ),
    _wrong(
        "key of adapters misspelt",
        {"fine_tune.clm.method": "lora", "fine_tune.clm.lora": {"rnk": 4}},
        "fine_tune.clm.lora.rnk = 4: no such parameter; did you mean fine_tune.clm.lora.rank?",
    ),
    _wrong(
        "masks of a branch that masks nothing",
        {"fine_tune.clm.mask_rate": 0.3},
        "fine_tune.clm.mask_rate = 0.3: has no effect with objective clm (it has with mlm): leave it out",
    ),
    _wrong(
        "patience without validations of a branch",
        {"fine_tune.clm.patience": 5},
        "fine_tune.clm.patience = 5: has no effect without stop_every",
    ),
    _wrong(
        "classification with a causal objective",
        {"fine_tune.clm.data": {"format": "sequence_labels", "files": ["x.jsonl"]}},
        "fine_tune.clm.objective = clm: expected classification, which reads in both directions, because data.format",
    ),
    _wrong(
        "classification without labels",
        {"fine_tune.clm.objective": "classification"},
        "fine_tune.clm.data = null: expected data with format token_labels or sequence_labels",
    ),
    _wrong(
        "two sources of own data",
        {"fine_tune.clm.data": {"files": ["x.jsonl"], "dataset": "some/set"}},
        "fine_tune.clm.data.files = [x.jsonl]: expected either files or a dataset: give one of them",
    ),
    _wrong(
        "column of another format",
        {"fine_tune.clm.data": {"format": "completion", "files": ["x.jsonl"], "label_column": "y"}},
        "fine_tune.clm.data.label_column = y: has no effect with format completion (it has with sequence_labels)",
    ),
    _wrong(
        "held-out rows twice",
        {"fine_tune.clm.data": {"files": ["x.jsonl"], "validation_files": ["y.jsonl"], "validation_fraction": 0.2}},
        "fine_tune.clm.data.validation_fraction = 0.2: has no effect where the held-out rows are given: leave it out",
    ),
    _wrong(
        "one label",
        {
            "fine_tune.a": {
                "objective": "classification",
                "batch_size": 4,
                "data": {"format": "token_labels", "files": ["x.csv"], "labels": ["A"]},
            }
        },
        "fine_tune.a.data.labels = [A]: expected at least two labels, each once",
    ),
    # --- not YAML, or not a mapping
    _raw("bad indentation", "  mlp:", "   mlp:", ", line 8, column 4: not valid YAML"),
    _raw("tab", "  d_model: 16", "\td_model: 16", ", line 6, column 1: not valid YAML: found character '\\t'"),
    _raw("open bracket", "stacks: [{}, {}]", "stacks: [{}, {}", "not valid YAML: expected ',' or ']'", "in line 12"),
    _raw(
        "open quote",
        "{source: dummy,",
        '{source: "dummy,',
        "not valid YAML: ",
        "while scanning a quoted scalar that begins in line 3",
    ),
    _raw("no space after a colon", "seed: 0\nseq_len: 16", "seed:0\nseq_len: 16", "not valid YAML"),
    _raw("double key", "n_stacks: 2", "seed: 1\nn_stacks: 2", "not valid YAML: the key seed stands here twice"),
    _raw("double nested key", "  d_model: 16", "  d_model: 16\n  d_model: 32", "the key d_model stands here twice"),
    _raw("key that is a list", "seed: 0", "seed: 0\n? [1, 2]\n: 3", "not valid YAML: a key must be a name"),
    _raw("unknown alias", "trunk: {}", "trunk: *joint", "not valid YAML: found undefined alias 'joint'"),
    _raw("foreign tag", "seed: 0", "seed: !!python/object:os.system 0", "not valid YAML", "python/object"),
    Case("two documents", f"{GOOD}---\n{GOOD}".encode(), ("not valid YAML",)),
    Case("empty", b"", ("is empty; expected a mapping of sections",)),
    Case("comments only", b"# seed: 0\n", ("is empty; expected a mapping of sections",)),
    Case("a list", b"- seed\n- data\n", ("holds [seed, data]; expected a mapping of sections",)),
    Case("a word", b"seed\n", ("holds seed; expected a mapping of sections",)),
    Case("Latin-1", GOOD.encode() + "# fünf\n".encode("latin-1"), (f", line {_AFTER}: not UTF-8 text",)),
    Case("UTF-16", GOOD.encode("utf-16"), (", line 1: not UTF-8 text; save it as UTF-8",)),
    Case("control character", GOOD.encode() + b"\x00", ("not valid YAML",)),
    Case("no file", None, ("no such file",)),
]
