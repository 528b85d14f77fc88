"""The content of ``benchmark.json``: the settings of a benchmark, and one row for each engine and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SpeedRatio:
    """Speed-up over a baseline; 2.0 means half the duration.

    Attributes:
        to: name of the baseline.
        by_round: the median over the rounds of the ratio within a round; temporary slow-downs of the machine affect
            both and cancel out, so this one is printed.
        of_p50: the ratio of the two medians, as computed from two latencies in a table.
    """

    to: str | None
    by_round: float
    of_p50: float | None


@dataclass(frozen=True)
class Memory:
    """Peak memory of an engine's process.

    Attributes:
        bare_bytes: the peak before the engine was loaded: Python, this package and the batches.
        peak_bytes: the peak so far.
        engine_bytes: the difference: the runtime, the model and its buffers.
    """

    bare_bytes: int
    peak_bytes: int
    engine_bytes: int


@dataclass(frozen=True)
class Row:
    """The measurements of one engine and precision; what was not measured is None.

    Attributes:
        label: ``<engine> <precision>``, or the name of another tool's model.
        engine, precision, device: of the engine.
        failure: why it did not run, or None.
        how: how the engine computes.
        threads: CPU threads.
        settings: settings that the engine reports.
        artifact, model_bytes, model_hash: what the engine loaded.
        made_seconds: duration of making the model, for those of another tool.
        latency_ms: ``min``, ``p50``, ``p90``, ``p99``, ``max`` and ``mean`` of a batch.
        device_latency_ms: the same by the device's clock.
        images_per_second: images / the sum of the durations.
        ratio_to_fp32: to the same engine in FP32.
        ratio_to_paddle_fp32: to the faster of Paddle Inference's engines that ran.
        timings_ms: duration of each round.
        unsettled_runs: number of runs after which the engine's threads did not go to sleep.
        map, map50, miou, images: scores (miou: of masks), and the number of evaluated images.
        map_failure: why the scores are missing, or None.
        memory: memory of the process.
        start_seconds, first_start_seconds: duration of loading, and of the first load on this machine.
    """

    label: str
    engine: str
    precision: str
    device: str
    failure: str | None = None
    how: str = ""
    threads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    artifact: str | None = None
    model_bytes: int | None = None
    model_hash: str | None = None
    made_seconds: float | None = None
    latency_ms: Mapping[str, float] | None = None
    device_latency_ms: Mapping[str, float] | None = None
    images_per_second: float | None = None
    ratio_to_fp32: SpeedRatio | None = None
    ratio_to_paddle_fp32: SpeedRatio | None = None
    timings_ms: Sequence[float] = ()
    unsettled_runs: int = 0
    map: float | None = None
    map50: float | None = None
    miou: float | None = None
    images: int | None = None
    map_failure: str | None = None
    memory: Memory | None = None
    start_seconds: float | None = None
    first_start_seconds: float | None = None

    @property
    def p50(self) -> float:
        """The median latency in ms; 0 without a latency."""
        return self.latency_ms["p50"] if self.latency_ms else 0.0

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Row:
        """Read an entry of ``rows``; only its label, engine, precision and device must be there."""
        values = _with_ratios({name: found[name] for name in cls.__dataclass_fields__ if name in found})
        values["memory"] = Memory(**values["memory"]) if values.get("memory") else None
        return cls(**values)


@dataclass(frozen=True)
class LoadRow:
    """The throughput of one engine and precision at one batch size and number of parallel requests.

    Attributes:
        label, engine, precision: as in :class:`Row`.
        batch_size: images per run.
        requests: number of requests in parallel.
        failure: why it did not run, or None.
        settings: settings that the engine reports, such as its number of streams.
        images_per_second: the median over the rounds.
        rates: images per second of each round.
        latency_ms: ``min``, ``p50``, ``p90``, ``p99``, ``max`` and ``mean`` of a run under this load, of all rounds.
        runs: number of timed runs.
        ratio_to_fp32: to the same engine in FP32 under the same load.
        ratio_to_peer: to the other tool's INT8 model under the same load.
    """

    label: str
    engine: str
    precision: str
    batch_size: int
    requests: int
    failure: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    images_per_second: float | None = None
    rates: Sequence[float] = ()
    latency_ms: Mapping[str, float] | None = None
    runs: int = 0
    ratio_to_fp32: SpeedRatio | None = None
    ratio_to_peer: SpeedRatio | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> LoadRow:
        """Read an entry of ``throughput``; its label, engine, precision, batch size and requests must be there."""
        return cls(**_with_ratios({name: found[name] for name in cls.__dataclass_fields__ if name in found}))


def _with_ratios(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row with its ratios read."""
    for name, ratio in values.items():
        if name.startswith("ratio_to_") and ratio:
            values[name] = SpeedRatio(ratio.get("to"), ratio["by_round"], ratio.get("of_p50"))
    return values


@dataclass(frozen=True)
class RunSettings:
    """How the engines were timed.

    Attributes:
        threads: CPU threads.
        batch_size: images per run; with ``--throughput``, the largest.
        warmup, rounds, untimed_runs: runs before the first round, rounds, and untimed runs before each timed one.
        seed: of the order of the engines within the rounds.
        input: the data, or ``random``.
        input_shape: shape of a batch of images, [N, 3, height, width].
        limit: number of evaluated images; None: all.
        peer: the other tool; None: none.
        peer_images, peer_max_drop: its calibration images and allowed mAP drop.
        burst_seconds: with ``--throughput``, how long each engine runs in each round.
    """

    threads: int | None = None
    batch_size: int | None = None
    warmup: int | None = None
    rounds: int | None = None
    untimed_runs: int | None = None
    seed: int | None = None
    input: str | None = None
    input_shape: Sequence[int] = ()
    limit: int | None = None
    peer: str | None = None
    peer_images: int | None = None
    peer_max_drop: float | None = None
    burst_seconds: float | None = None


@dataclass(frozen=True)
class ComparedModel:
    """One of the two compared models: its folder, size and hash."""

    path: str
    bytes: int | None = None
    hash: str | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> ComparedModel | None:
        return cls(found.get("path", ""), found.get("bytes"), found.get("hash")) if found else None


@dataclass(frozen=True)
class BenchmarkRecord:
    """The content of ``benchmark.json``.

    Attributes:
        machine: description of the machine.
        versions: library -> version.
        settings: how the engines were timed.
        fp32, int8: the compared models; None if not given.
        reader, reader_hash: the data, or None.
        notes: notes for the user.
        rows: those that ran, the fastest first, then those that failed.
        throughput: with ``--throughput``, and then there are no ``rows``: one for each engine, precision and load.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: RunSettings
    fp32: ComparedModel | None
    int8: ComparedModel | None
    reader: str | None
    reader_hash: str | None
    notes: Sequence[str]
    rows: Sequence[Row]
    throughput: Sequence[LoadRow] = ()

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> BenchmarkRecord:
        """Read the content of a ``benchmark.json``."""
        models, settings = found.get("models") or {}, found.get("settings") or {}
        return cls(
            found.get("machine") or {},
            found.get("versions") or {},
            RunSettings(**{name: settings[name] for name in RunSettings.__dataclass_fields__ if name in settings}),
            ComparedModel.from_json(models.get("fp32")),
            ComparedModel.from_json(models.get("int8")),
            found.get("reader"),
            found.get("reader_hash"),
            found.get("notes") or (),
            [Row.from_json(row) for row in found.get("rows") or ()],
            [LoadRow.from_json(row) for row in found.get("throughput") or ()],
        )

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``benchmark.json``, in the order of the file."""
        models = {"fp32": self.fp32, "int8": self.int8}
        return {
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "settings": asdict(self.settings),
            "models": {name: asdict(model) for name, model in models.items() if model is not None},
            "reader": self.reader,
            "reader_hash": self.reader_hash,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            **({"throughput": [asdict(row) for row in self.throughput]} if self.throughput else {}),
        }
