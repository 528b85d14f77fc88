"""NNCF's INT8 model of the same FP32 model in OpenVINO, with or without accuracy control, for comparison.

NNCF 3.4 quantizes the float model exported to ONNX and read by OpenVINO, with ``model_type=TRANSFORMER`` (its default
costs 0.03 mAP on RT-DETR). It is calibrated on images of the train split, and the result is saved as OpenVINO IR. With
accuracy control NNCF reverts ops to float until the mAP drop on the eval split is within ``max_drop``, like
``Strategy.max_drop`` here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.benchmark.plan import Candidate
from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.openvino_telemetry import without_openvino_telemetry
from act_pipeline.engines import create_engine, machine
from act_pipeline.engines.onnx_runtimes.onnx_files import OnnxSummary, decoder_of_file, inspect_onnx
from act_pipeline.engines.second_stage import with_second_stage
from act_pipeline.families.registry import Decoder

LABELS = {"nncf": "nncf int8 in openvino", "nncf_accuracy_control": "nncf int8, accuracy control, in openvino"}
_IR_NAME = "nncf_int8.xml"
_PACKAGE = 'pip install "act_pipeline[nncf]", or -r requirements/nncf.txt'


@dataclass(frozen=True)
class OpenVINOModel(OnnxModel):
    """A model in OpenVINO IR: ``<name>.xml`` and ``<name>.bin`` in the same folder.

    Attributes:
        inputs: name -> shape, -1 for dynamic dimensions.
        outputs: names in the order of the graph.
        input_dtypes: input name -> dtype.
        decoder: turns the outputs into detections, as for the float model.
    """

    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    decoder: Optional[Decoder] = None
    input_dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights_path(self) -> Path:
        return self.path.with_suffix(".bin")

    @property
    def bytes(self) -> int:
        """The total size of both files in bytes."""
        return self.path.stat().st_size + self.weights_path.stat().st_size

    def content_hash(self) -> str:
        """Return a hash of both files, ``sha256:<hex>``."""
        return hash_files([self.path, self.weights_path])

    def record(self) -> dict[str, Any]:
        """Return an empty record, since the model was not exported by this package."""
        return {}


def require_nncf() -> None:
    """Check that NNCF, OpenVINO and ONNX are installed, without importing them.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in ("nncf", "openvino", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(f"--peer=nncf: {' and '.join(missing)} {are} not installed; {_PACKAGE}, or leave --peer out")


def nncf_candidate(
    model: InferenceModel,
    reader: Any,
    images: int,
    *,
    threads: int,
    batch_size: int,
    folder: Path,
    say: Callable[[str], None],
    max_drop: float | None = None,
) -> Candidate:
    """Quantize the model with NNCF and return its benchmark candidate; if NNCF fails, a candidate with the reason.

    Args:
        model: the FP32 model.
        reader: provides the calibration images from its train split.
        images: number of calibration images.
        threads, batch_size: the same as for the other candidates.
        folder: where the IR is saved.
        say: is called with one line per step.
        max_drop: allowed mAP drop for accuracy control; None for no accuracy control.
    """
    label = LABELS["nncf" if max_drop is None else "nncf_accuracy_control"]
    say(f"{label}: calibrating on {images} images")
    how = f"NNCF post-training, {images} images of the train split"
    how += "" if max_drop is None else f", max_drop {max_drop} on the eval split"
    made = functools.partial(Candidate, label, "openvino", "int8", "CPU", how=how)
    try:
        start = time.perf_counter()
        peer = quantize(model, reader, images, folder / _IR_NAME, max_drop=max_drop)
        seconds = time.perf_counter() - start
    except UserError as error:
        return made(model, refusal=str(error))
    except Exception as error:  # a failure of NNCF must not end the benchmark of the other engines
        return made(model, refusal=" ".join(f"NNCF cannot quantize it: {type(error).__name__}: {error}".split()))
    return made(
        peer,
        create=functools.partial(load_peer, peer, threads=threads, batch_size=batch_size),
        made_seconds=round(seconds, 2),
    )


def quantize(
    model: InferenceModel,
    reader: Any,
    images: int,
    path: Path,
    *,
    max_drop: float | None = None,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None = None,
    stage: Callable[[str], AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
) -> OpenVINOModel:
    """Quantize a float model by NNCF's post-training quantization and write the IR.

    Args:
        model: the float model.
        reader: a reader with a ``train`` split, and an ``eval`` split for accuracy control.
        images: number of calibration images.
        path: the ``.xml`` file to write.
        max_drop: allowed mAP drop on the eval split for accuracy control; None for no accuracy control.
        batches: returns the calibration images in batches of one, the same at every call; None for the train split,
            shuffled with seed 0.
        stage: returns a context manager that is held during ``prepare`` (export and reading), ``quantize`` or ``save``.

    Raises:
        UserError: a split cannot be read, or the model cannot be exported to ONNX.
    """
    from act_pipeline.engines.onnx_runtimes.openvino import set_batch
    from act_pipeline.onnx_export import lowered_onnx

    nncf, openvino = import_nncf()
    with stage("prepare"):
        onnx_model = lowered_onnx(model, "cpu")
        summary = inspect_onnx(onnx_model)
        decoder = decoder_of_file(model, summary)
        network = openvino.Core().read_model(str(onnx_model.path))
        opened = [name for name, shape in summary.inputs.items() if shape[:1] == (-1,)]
        set_batch(network, 1, opened)  # calibration uses batches of one; the batch is made dynamic again below
    inputs = {}
    for parameter in network.get_parameters():
        name, shape = parameter.output(0).get_any_name(), parameter.get_partial_shape().to_shape()
        inputs[name] = (-1, *shape[1:]) if name in opened else tuple(shape)
    if batches is None:
        batches = functools.partial(reader.loader, "train", batch_size=1, shuffle=True, drop_last=False)
    calibration = nncf.Dataset(_Calibration(batches, images), lambda batch: {name: batch[name] for name in inputs})
    # stdout is reserved for the table; NNCF's progress bars go to stderr.
    with stage("quantize"), contextlib.redirect_stdout(sys.stderr):
        settings = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": images}
        if max_drop is None:
            quantized = nncf.quantize(network, calibration, **settings)
        else:
            score, eval_batches = _scoring(reader, _staged(decoder, None))
            quantized = nncf.quantize_with_accuracy_control(
                network,
                calibration,
                nncf.Dataset(eval_batches),
                score,
                max_drop=max_drop,
                drop_type=nncf.DropType.ABSOLUTE,
                **settings,
            )
    set_batch(quantized, -1, opened)
    with stage("save"):
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(quantized, str(path), compress_to_fp16=False)
    return OpenVINOModel(path, inputs, summary.outputs, decoder, summary.input_dtypes)


def _scoring(
    reader: Any, decoder: Decoder
) -> tuple[Callable[[Any, Any], tuple[float, None]], list[Mapping[str, np.ndarray]]]:
    """Return NNCF's validation function, which computes the mAP on given batches, and the eval split's batches."""
    from types import SimpleNamespace

    from act_pipeline.evaluation import evaluate

    def score(network: Any, batches: Any) -> tuple[float, None]:
        names = [port.get_any_name() for port in network.inputs]

        def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = network({name: batch[name] for name in names})
            return decoder({port.get_any_name(): found[port] for port in network.outputs}, batch)

        engine = SimpleNamespace(device="CPU", threads=1, run=run)
        handed = SimpleNamespace(
            annotation_file=reader.annotation_file, loader=lambda *args, **options: list(batches),
            class_ids=reader.class_ids,
        )  # fmt: skip
        return evaluate(engine, handed, progress=False, warmup=0).map, None

    return score, list(reader.loader("eval", batch_size=1, shuffle=False))


def load_peer(model: OpenVINOModel, threads: int, batch_size: int, requests: int = 1) -> Any:
    """Load NNCF's model in the same engine and with the same settings as the INT8 model of this package.

    Args:
        model: the IR.
        threads: number of CPU threads.
        batch_size: images per run.
        requests: number of parallel requests.
    """
    from act_pipeline.engines.onnx_runtimes.openvino import OpenVINOEngine

    decoder = None if model.decoder is None else _staged(model.decoder, threads)
    summary = OnnxSummary(model.inputs, model.outputs, {"FakeQuantize": 1}, input_dtypes=model.input_dtypes)
    return OpenVINOEngine(
        model, "int8", "CPU", threads, batch_size=batch_size, requests=requests, summary=summary, decoder=decoder
    )


def _staged(decoder: Decoder, threads: int | None) -> Decoder:
    """Return a decoder that runs the second model of a pair, as for the models of this package."""
    return with_second_stage(decoder, create_engine, "openvino", "CPU", threads, machine())


class _Calibration:
    """The first images in batches of one; NNCF iterates over them more than once."""

    def __init__(self, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]], images: int) -> None:
        self._batches, self._images = batches, images

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        for _, batch in zip(range(self._images), self._batches()):
            yield batch

    def __len__(self) -> int:
        return self._images


def import_nncf() -> tuple[Any, Any]:
    """Return the modules ``nncf`` and ``openvino``, imported with their telemetry disabled.

    Raises:
        UserError: one cannot be imported.
    """
    from act_pipeline.engines.onnx_runtimes.openvino import import_openvino

    openvino = import_openvino()
    os.environ.setdefault("NNCF_CI", "1")  # disables the telemetry of NNCF 3.4
    try:
        with without_openvino_telemetry():
            import nncf
    except ImportError as error:
        raise UserError(f"nncf cannot be imported ({error}); {_PACKAGE}, or leave --peer out") from None
    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf, openvino
