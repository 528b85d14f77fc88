"""``placement.json``: the candidates of a placement on a device, and the measurements that were asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

from act_pipeline.benchmark.timing import rounds
from act_pipeline.bundle.measure_script import CANDIDATES, Turns
from act_pipeline.compress.plan.on_device.foresight import Question
from act_pipeline.compress.plan.placement import OpGroup, Variant
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record, write_record
from act_pipeline.engines.tensorrt.targets import Target, Version, find_target

SCHEMA, FILENAME, SCRIPT = "act_pipeline.device_placement/1", "placement.json", "measure.sh"
# The candidates with all ops in INT8 and without any; the latter is also the precision's name.
ALL, FLOAT16 = "int8", "fp16"
# A run of trtexec is the median of hundreds of inferences: fewer rounds do than where a round is one inference.
ROUNDS = 9
_NAME = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Circumstances:
    """What the latencies depend on, besides the GPU and the exact version, which ``measure.sh`` notes.

    Attributes:
        structure: see :func:`act_pipeline.compress.plan.placement_groups.structure_hash`.
        target: name of the device.
        tensorrt: version of TensorRT, such as ``10``.
        batch: number of images that are timed at once.
        export: hash of the code that writes the ONNX files.
        int8_weights: whether ops reverted to float keep INT8 weights.
    """

    structure: str
    target: str
    tensorrt: str
    batch: int
    export: str
    int8_weights: bool


@dataclass(frozen=True)
class Study:
    """A placement on a device, as far as it is written.

    Attributes:
        model: the INT8 model.
        float_model: the float model that it was made from.
        hashes: of the two.
        of: what the latencies depend on.
        profile: input name -> the smallest, the optimal and the largest shape; None: the files fix the batch.
        groups: the ops in INT8 by group.
        candidates: name -> numbers of the groups in float; None: the float model.
        steps: the measurements of each visit to the device, ``{label: name of a candidate}`` each.
    """

    model: InferenceModel
    float_model: InferenceModel
    hashes: tuple[str, str]
    of: Circumstances
    profile: Optional[Mapping[str, list[list[int]]]]
    groups: tuple[OpGroup, ...]
    candidates: Mapping[str, Optional[tuple[int, ...]]]
    steps: tuple[tuple[Mapping[str, str], ...], ...] = ()

    @property
    def target(self) -> Target:
        return find_target(self.of.target)

    @property
    def version(self) -> Version:
        found = self.target.version(self.of.tensorrt)
        assert found is not None, "the target has TensorRT"
        return found

    @property
    def ops(self) -> int:
        """Number of ops in INT8."""
        return sum(len(group.ops) for group in self.groups)

    def variant(self, name: str) -> Variant:
        """Return the ops of a candidate that are in float, or the precision of the float model."""
        numbers = self.candidates[name]
        if numbers is None:
            return FLOAT16
        return frozenset(op for number in numbers for op in self.groups[number].ops)

    def question(self, asked: Mapping[str, str]) -> Question:
        """Return an entry of a step as the planner asks it."""
        return {label: self.variant(name) for label, name in asked.items()}

    def names(self, step: int) -> list[str]:
        """Return the candidates that are timed in a step, which counts from 1."""
        return list(dict.fromkeys(name for asked in self.steps[step - 1] for name in asked.values()))

    def turns(self, step: int) -> Turns:
        """Return the order of the candidates in each round of a step, which counts from 1."""
        return Turns(step, list(rounds(self.names(step), ROUNDS, seed=step)))

    def with_step(self, questions: Sequence[Question]) -> Study:
        """Return the study with one more step, and the candidates that it needs."""
        candidates = dict(self.candidates)
        known = {self.variant(name): name for name in candidates}
        step = []
        for question in questions:
            asked = {}
            for label, variant in question.items():
                if not isinstance(variant, str) and variant not in known:
                    numbers = tuple(n for n, group in enumerate(self.groups) if variant >= set(group.ops))
                    alone = len(numbers) == 1
                    name = f"group{numbers[0] + 1:02d}" if alone else f"mixed{len(candidates) + 1:02d}"
                    candidates[name], known[variant] = numbers, name
                asked[label] = known[variant]
            step.append(asked)
        return replace(self, candidates=candidates, steps=(*self.steps, tuple(step)))

    def save(self, folder: Path) -> None:
        """Write ``placement.json`` into a folder."""
        write_record(folder / FILENAME, SCHEMA, dict(self._record()))

    def _record(self) -> Iterator[tuple[str, Any]]:
        for key, model, digest in zip(("model", "float_model"), (self.model, self.float_model), self.hashes):
            files = (str(model.directory.resolve()), model.model_filename, model.params_filename)
            yield key, dict(zip(("directory", "model_filename", "params_filename"), files), hash=digest)
        yield "of", asdict(self.of)
        yield "profile", self.profile
        yield "groups", [{"name": group.name, "ops": list(group.ops)} for group in self.groups]
        yield "candidates", self.candidates
        yield "steps", self.steps

    @classmethod
    def load(cls, folder: Path) -> Study:
        """Read ``placement.json`` of a folder.

        Raises:
            UserError: it is missing, or was not written by :meth:`save`.
        """
        path = folder / FILENAME
        record = read_record(path, SCHEMA)
        try:
            study = cls._from(record)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}), expected what deploy/placement.py write wrote; "
                "write it again into another folder"
            ) from None
        return study

    @classmethod
    def _from(cls, record: Mapping[str, Any]) -> Study:
        models = [dict(record[key]) for key in ("model", "float_model")]
        hashes = [str(model.pop("hash")) for model in models]
        places = [InferenceModel(Path(str(m["directory"])), m["model_filename"], m["params_filename"]) for m in models]
        study = cls(
            model=places[0],
            float_model=places[1],
            hashes=(hashes[0], hashes[1]),
            of=Circumstances(**record["of"]),
            profile=record["profile"],
            groups=tuple(OpGroup(str(found["name"]), tuple(map(str, found["ops"]))) for found in record["groups"]),
            candidates={
                name: None if numbers is None else tuple(map(int, numbers))
                for name, numbers in record["candidates"].items()
            },
            steps=tuple(tuple(dict(asked) for asked in step) for step in record["steps"]),
        )
        candidates, steps = study.candidates, study.steps
        if not all(_NAME.fullmatch(name) for name in candidates) or {ALL, FLOAT16} - set(candidates) or not steps:
            raise ValueError("candidates or steps are missing")
        for number in range(1, len(steps) + 1):
            for name in study.names(number):
                study.variant(name)
        assert study.version.name == study.of.tensorrt
        return study

    def require_models(self) -> None:
        """Check that the models are those that the candidates were made from.

        Raises:
            UserError: a model is missing, or has changed.
        """
        for model, digest in zip((self.model, self.float_model), self.hashes):
            InferenceModel.load(model.directory, model.model_filename, model.params_filename)
            if model.content_hash() != digest:
                raise UserError(
                    f"{model.directory} has changed since the candidates were written; run deploy/placement.py write "
                    "with the same --output again: what was measured holds if the ops are the same"
                )


def candidate_path(folder: Path, name: str) -> Path:
    """Return the ONNX file of a candidate."""
    return folder / CANDIDATES / f"{name}.onnx"
