"""A rack that grows in a directory, phase by phase, without an engine."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stackwise.artifacts.code import digest_code
from stackwise.artifacts.manifest import Artifact, digest_json, publish, read
from stackwise.cache.boundary import KIND as BOUNDARY
from stackwise.cache.boundary import Boundaries, Link
from stackwise.config.params import UNTRACKED, Params
from stackwise.data.corpus import KIND as CORPUS
from stackwise.data.corpus import write_corpus, write_labelled_corpus
from stackwise.data.encoding import write_labelled_dataset, write_token_dataset
from stackwise.data.sources import documents, labelled_documents
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import TOKENIZER, open_tokens
from stackwise.errors import UserError
from stackwise.growth.depth import fraction_of_stack
from stackwise.growth.fusing import fuse
from stackwise.growth.needs import made_from, needs_of
from stackwise.growth.phases import Phase, Version, phases
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import facts_of, save_rack
from stackwise.growth.stacks import KIND, Training
from stackwise.growth.training import PhaseInputs, boundary_source, train_phase
from stackwise.growth.trunk import AdaptedStack, adapted_stacks, trunk_of
from stackwise.growth.tuning import loss_curve
from stackwise.huggingface.importing import import_stacks
from stackwise.model.rack import Rack
from stackwise.precision.trunk import KIND as TRUNK
from stackwise.precision.trunk import TrunkStack, quantize_stack
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Watcher


class GrowthRun:
    """All that the regime of some parameters makes, in a directory.

    Artifacts lie where the pipeline puts them and hold the same files; their manifests name all parameters, not those
    of one stage. What is there already, whole and made from the same inputs, is taken as it is: so a run that was
    interrupted goes on.
    """

    def __init__(self, params: Params, directory: Path, *, device: torch.device, tokens: Path | None = None) -> None:
        """
        Args:
            params: of the run; a directory belongs to one set of parameters.
            directory: where it lies.
            device: computes.
            tokens: a tokens artifact that is there already; None: corpus and tokens are made, in the directory.
        """
        self.params, self.directory, self.device = params, directory, device
        self.phases = phases(params.growth, params.n_stacks, lora=params.adapters.stack is not None)
        self._tokens = tokens
        self._verified: dict[str, Artifact] = {}

    def tokens(self) -> Artifact:
        """The token files.

        Raises:
            UserError: the source of the text or the tokenizer cannot be used.
        """
        if self._tokens is not None:
            return read(self._tokens, TOKENS)
        params, data = self.params, self.params.data

        def corpus_into(directory: Path) -> dict[str, Any]:
            if data.ids_column is None:
                return write_corpus(documents(data, params.seed), directory, params=data, seed=params.seed)
            return write_labelled_corpus(labelled_documents(data), directory, params=data, seed=params.seed)

        corpus = self.made("artifacts/corpus", CORPUS, {}, corpus_into)
        tokenizer = params.tokenizer
        if tokenizer.takes_along:
            source = params.growth.start or params.model.embeddings.source or params.model.head.source
            tokenizer = tokenizer.model_copy(update={"name": source})
        write = write_labelled_dataset if corpus.facts.get("labelled") else write_token_dataset
        return self.made(
            "artifacts/tokens", TOKENS, {"corpus": corpus}, lambda directory: write(corpus.path, directory, tokenizer)
        )

    def training(self, number: int) -> Training:
        """A phase that has been trained.

        Raises:
            UserError: it has not, or its artifact is damaged.
        """
        return Training(self._read(self.phases[number].path, KIND))

    def inputs(self, phase: Phase) -> PhaseInputs:
        """What a phase is given; quantized stacks and its boundary are made if they are not there.

        Raises:
            UserError: an earlier phase has not been trained.
        """
        params, needs = self.params, needs_of(self.params, self.phases, phase)
        adapted = [self.training(number) for number in needs.adapted]
        given = PhaseInputs(
            params=params,
            stack=phase.stack,
            sweep=phase.sweep,
            members=phase.window,
            embeddings_learn=phase.embeddings_learn,
            fresh=phase.fresh,
            tokens=self.tokens(),
            trainings=[self.training(number) for number in needs.trainings],
            copies=needs.copies,
            quantized=trunk_of(self.trunk(version).artifact for version in phase.quantized),
            below=trunk_of((self.trunk(version).artifact for version in phase.below), adapted),
            chain=[Link(len(p.below), p.stack, p.sweep) for p in needs.links],
            known=needs.known,
        )
        return replace(given, boundary=self._boundary(phase, given)) if phase.cached else given

    def train(self, phase: Phase, watcher: Watcher) -> Training:
        """Train a phase, unless that has been done.

        Raises:
            UserError: an earlier one has not been trained; or see `train_phase`.
        """
        if phase.imported:
            return self._imported(phase)
        given = self.inputs(phase)
        roles = _roles(given)
        checkpoints = self.checkpoints(phase.name, roles)

        def train_into(directory: Path) -> dict[str, Any]:
            trained = train_phase(given, device=self.device, checkpoints=checkpoints, watcher=watcher)
            self.write_losses(phase.name, trained.losses)
            return trained.save(directory)

        training = Training(self.made(phase.path, KIND, roles, train_into))
        checkpoints.discard()
        return training

    def _imported(self, phase: Phase) -> Training:
        """The stacks of the model that growth starts with."""
        tokens = self.tokens()
        vocab_size = int(tokens.facts["vocab_size"])
        write = partial(import_stacks, self.params, vocab_size=vocab_size)
        return Training(self.made(phase.path, KIND, {"tokens": tokens}, write))

    def checkpoints(self, name: str, inputs: Mapping[str, Artifact]) -> Checkpoints:
        """Those of a training, which goes on from them if it has the same parameters, inputs and code."""
        key = {
            "params": self._resolved(),
            "inputs": {role: artifact.digest for role, artifact in inputs.items()},
            "code": digest_code(("stackwise",)),
        }
        return Checkpoints(self.directory / "checkpoints" / f"{name}-{digest_json(key)[:32]}.safetensors")

    def write_losses(self, name: str, losses: Sequence[float]) -> None:
        """Write the loss curve of a training."""
        curve = self.directory / "metrics/loss" / f"{name}.json"
        curve.parent.mkdir(parents=True, exist_ok=True)
        curve.write_text(json.dumps(loss_curve(losses), indent=1) + "\n")

    def trunk(self, version: Version) -> TrunkStack:
        """A stack as frozen ground for others."""
        phase = self.phases[version.weights]
        path = f"artifacts/trunk/{version.stack}" + f"_sweep_{phase.sweep}" * bool(phase.sweep)
        training, precision = self.training(version.weights), self.params.trunk.precision_of(version.stack)
        return TrunkStack(
            self.made(
                path,
                TRUNK,
                {"training": training.artifact},
                lambda directory: quantize_stack(training.stack(version.stack), directory, precision),
            )
        )

    def parts(self) -> tuple[list[Training], list[TrunkStack], tuple[int, ...]]:
        """What the finished rack is made from: trainings, quantized stacks that have adapters, and the order of the
        stacks, bottom to top.

        Raises:
            UserError: something of it is missing or damaged.
        """
        last = self.phases[-1]
        numbers, adapted = made_from(last)
        return [self.training(n) for n in numbers], [self.trunk(v) for v in adapted], last.order

    def fused(self) -> Artifact:
        """The finished rack, in full precision.

        Raises:
            UserError: a phase has not been trained.
        """
        trainings, trunk, order = self.parts()
        tokens, learned = self.tokens(), self.params.objective

        def fuse_into(directory: Path) -> dict[str, Any]:
            rack = rack_of(self.params, trainings, trunk, order, merged=self.params.adapters.merge)
            save_rack(directory, rack, tokens.path / TOKENIZER)
            return {
                **facts_of(rack, objective=learned.type, causal=learned.looks_back, seq_len=self.params.seq_len),
                "parameters": sum(p.numel() for p in rack.parameters()),
                "steps": trainings[-1].artifact.facts["steps_in_all"],
            }

        inputs = {**_numbered("training", (t.artifact for t in trainings)), "tokens": tokens}
        return self.made("artifacts/fused", RACK, inputs | _numbered("trunk", (s.artifact for s in trunk)), fuse_into)

    def _boundary(self, phase: Phase, given: PhaseInputs) -> Artifact:
        """The identity of the boundary that a phase reads; its activations are there then."""
        boundaries = Boundaries(
            boundary_source(given, open_tokens(given.tokens, self.params.seq_len)), device=self.device
        )

        def identify(_: Path) -> dict[str, Any]:
            with boundaries.open():
                return boundaries.facts()

        roles = {role: a for role, a in _roles(given).items() if role.split(".")[0] in ("tokens", "adapted", "trunk")}
        return self.made(phase.boundary, BOUNDARY, roles, identify)

    def made(
        self, path: str, kind: str, inputs: Mapping[str, Artifact], write: Callable[[Path], dict[str, Any]]
    ) -> Artifact:
        """An artifact of this directory.

        Args:
            path: where it lies in the directory.
            kind: of it.
            inputs: what it is made from, by role.
            write: makes it in a directory that is there, and returns its facts; not called if the artifact is there
                already, whole and from the same inputs.
        """
        try:
            found = self._read(path, kind)
            if found.inputs == {role: artifact.digest for role, artifact in inputs.items()}:
                return found
        except UserError:  # missing or damaged: it is made
            pass
        self._verified.pop(path, None)
        with publish(self.directory / path, kind=kind, params=self._resolved(), inputs=inputs) as draft:
            draft.facts |= write(draft.directory)
        return self._read(path, kind)

    def _read(self, path: str, kind: str) -> Artifact:
        """An artifact of this directory; what has been verified once is not read again."""
        if path not in self._verified:
            self._verified[path] = read(self.directory / path, kind)
        return self._verified[path]

    def _resolved(self) -> dict[str, Any]:
        return self.params.model_dump(exclude=set(UNTRACKED))


def rack_of(
    params: Params, trainings: list[Training], trunk: list[TrunkStack], order: Iterable[int], *, merged: bool = True
) -> Rack:
    """The rack of some trainings, in full precision, as the pipeline fuses it.

    Args:
        params: with model.time and growth, objective where depth is time.
        trainings: in the order in which they took place.
        trunk: the quantized stacks that have adapters.
        order: the stacks, bottom to top.
        merged: whether adapters are merged into the weights.

    Raises:
        UserError: they do not belong together.
    """
    order = tuple(order)
    unrolls = params.model.time.mode == "depth" and params.growth.building_mode == "prepend"
    times = (fraction_of_stack(params, k, params.model.time) for k in order) if unrolls else ()
    quantized = adapted_stacks((stack.artifact for stack in trunk), trainings)
    return fuse(trainings, order, quantized, merged=merged, entries=[t for t in times if t is not None])


def _roles(given: PhaseInputs) -> dict[str, Artifact]:
    """The artifacts that a training reads, by role."""
    trainings = [training.artifact for training in given.trainings]
    found = {"tokens": given.tokens, **_numbered("training", trainings[:-1])}
    found |= {"head": trainings[-1]} if trainings else {}
    found |= _numbered("quantized", (stack.artifact for stack in given.quantized))
    found |= _numbered("trunk", (stack.artifact for stack in given.below))
    adapted = {s.training.artifact.digest: s.training.artifact for s in given.below if isinstance(s, AdaptedStack)}
    found |= _numbered("adapted", adapted.values())
    return found | ({} if given.boundary is None else {"activations": given.boundary})


def _numbered(role: str, artifacts: Iterable[Artifact]) -> dict[str, Artifact]:
    return {f"{role}.{i}": artifact for i, artifact in enumerate(artifacts)}
