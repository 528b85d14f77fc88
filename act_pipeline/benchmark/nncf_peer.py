"""What else one could have used: NNCF's INT8 of the same FP32 model, in OpenVINO, without and with accuracy control.

NNCF 3.4 quantizes the float model as lowered to ONNX and read by OpenVINO, with ``model_type=TRANSFORMER`` (its default
costs 0.03 mAP on RT-DETR), calibrated on images of the train split, and keeps the result as OpenVINO's own IR. With
accuracy control it gives ops back to float until the mAP on the eval split is within ``max_drop``, as
``Strategy.max_drop`` does here.
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
from typing import Any

import numpy as np

from act_pipeline.benchmark.plan import Candidate
from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import hash_files
from act_pipeline.engines.onnx_runtimes.onnx_files import OnnxSummary

LABELS = {"nncf": "nncf int8 in openvino", "nncf_accuracy_control": "nncf int8, accuracy control, in openvino"}
_IR_NAME = "nncf_int8.xml"
_PACKAGE = 'pip install "act_pipeline[nncf]", or -r requirements/nncf.txt'


@dataclass(frozen=True)
class OpenVINOModel(OnnxModel):
    """A model in OpenVINO's IR: ``<name>.xml`` and ``<name>.bin`` beside it, where an ONNX file has one.

    Attributes:
        inputs: name -> shape, -1 where any size goes.
    """

    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weights_path(self) -> Path:
        return self.path.with_suffix(".bin")

    @property
    def bytes(self) -> int:
        """Size of both files together, in bytes."""
        return self.path.stat().st_size + self.weights_path.stat().st_size

    def content_hash(self) -> str:
        """Return a hash of both files, ``sha256:<hex>``."""
        return hash_files([self.path, self.weights_path])

    def record(self) -> dict[str, Any]:
        """Return nothing: it was not lowered by this package."""
        return {}


def require_nncf() -> None:
    """Raise a UserError unless NNCF and OpenVINO are installed; imports neither."""
    missing = [name for name in ("nncf", "openvino", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(f"--peer=nncf: {' and '.join(missing)} {are} not installed; {_PACKAGE}, or leave --peer out")


def nncf_candidate(
    model: InferenceModel,
    reader: Any,
    images: int,
    threads: int,
    batch_size: int,
    folder: Path,
    say: Callable[[str], None],
    max_drop: float | None = None,
) -> Candidate:
    """Make the peer and return its row to be; if NNCF fails, a row with the reason.

    Args:
        model: the FP32 model.
        reader: gives the images for the calibration, from its train split.
        images: how many.
        threads, batch_size: as the other rows have them.
        folder: where the IR is kept.
        say: takes a line about what happens next.
        max_drop: with accuracy control, to this drop of mAP; None: without.
    """
    label = LABELS["nncf" if max_drop is None else "nncf_accuracy_control"]
    say(f"{label}: calibrating on {images} images")
    how = f"NNCF post-training, {images} images of the train split"
    how += "" if max_drop is None else f", max_drop {max_drop} on the eval split"
    made = functools.partial(Candidate, label, "openvino", "int8", "CPU", how=how)
    try:
        start = time.perf_counter()
        peer = quantize(model, reader, images, folder / _IR_NAME, max_drop)
        seconds = time.perf_counter() - start
    except UserError as error:
        return made(model, refusal=str(error))
    except Exception as error:  # the peer's fault is not to end the others
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
    max_drop: float | None = None,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]] | None = None,
    stage: Callable[[str], AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
) -> OpenVINOModel:
    """Write the IR of NNCF's post-training INT8 of a float model.

    Args:
        model: the float model.
        reader: a reader with a ``train`` split.
        images: how many of its images calibrate.
        path: the ``.xml``.
        max_drop: with accuracy control on the eval split; None: without.
        batches: gives these images, one a batch, the same at every call; None: in an order drawn with seed 0.
        stage: what to hold while ``prepare`` (lowering, reading), ``quantize`` or ``save`` lasts.

    Raises:
        UserError: the train split cannot be read, or the model cannot be lowered.
    """
    from act_pipeline.engines.onnx_runtimes.openvino import set_batch
    from act_pipeline.onnx_export import lowered_onnx

    nncf, openvino = import_nncf()
    with stage("prepare"):
        onnx_model = lowered_onnx(model, "cpu")
        network = openvino.Core().read_model(str(onnx_model.path))
        set_batch(network, 1)  # one image at a time, as it is calibrated; any batch again below
    inputs = {
        parameter.output(0).get_any_name(): (-1, *parameter.get_partial_shape().to_shape()[1:])
        for parameter in network.get_parameters()
    }
    if batches is None:
        batches = functools.partial(reader.loader, "train", batch_size=1, shuffle=True, drop_last=False)
    calibration = nncf.Dataset(_Calibration(batches, images), lambda batch: {name: batch[name] for name in inputs})
    # Its progress bars are no part of the table.
    with stage("quantize"), contextlib.redirect_stdout(sys.stderr):
        settings = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": images}
        if max_drop is None:
            quantized = nncf.quantize(network, calibration, **settings)
        else:
            score, eval_batches = _scoring(reader)
            quantized = nncf.quantize_with_accuracy_control(
                network,
                calibration,
                nncf.Dataset(eval_batches),
                score,
                max_drop=max_drop,
                drop_type=nncf.DropType.ABSOLUTE,
                **settings,
            )
    set_batch(quantized, -1)
    with stage("save"):
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(quantized, str(path), compress_to_fp16=False)
    return OpenVINOModel(path, inputs)


def _scoring(reader: Any) -> tuple[Callable[[Any, Any], tuple[float, None]], list[Mapping[str, np.ndarray]]]:
    """Return NNCF's validation function, which gives the mAP on the batches it is handed, and those of the eval
    split.
    """
    from types import SimpleNamespace

    from act_pipeline.evaluation import evaluate

    def score(network: Any, batches: Any) -> tuple[float, None]:
        names = [port.get_any_name() for port in network.inputs]

        def run(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = network({name: batch[name] for name in names})
            return {"bbox": found["bbox"], "bbox_num": found["bbox_num"]}

        engine = SimpleNamespace(device="CPU", threads=1, run=run)
        handed = SimpleNamespace(
            annotation_file=reader.annotation_file, loader=lambda *args, **options: list(batches),
            class_ids=reader.class_ids,
        )  # fmt: skip
        return evaluate(engine, handed, progress=False, warmup=0).map, None

    return score, list(reader.loader("eval", batch_size=1, shuffle=False))


def load_peer(model: OpenVINOModel, threads: int, batch_size: int) -> Any:
    """Return the peer in the same engine, and with the same settings, as our own INT8."""
    from act_pipeline.engines.onnx_runtimes.openvino import OpenVINOEngine

    summary = OnnxSummary(model.inputs, ("bbox", "bbox_num"), {"FakeQuantize": 1})
    return OpenVINOEngine(model, "int8", "CPU", threads, batch_size=batch_size, summary=summary)


class _Calibration:
    """The first images, one a batch; NNCF goes over them more than once."""

    def __init__(self, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]], images: int) -> None:
        self._batches, self._images = batches, images

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        for _, batch in zip(range(self._images), self._batches()):
            yield batch

    def __len__(self) -> int:
        return self._images


def import_nncf() -> tuple[Any, Any]:
    """Return ``nncf`` and ``openvino``, imported without the telemetry that both would start unasked."""
    from act_pipeline.engines.onnx_runtimes.openvino import import_openvino

    openvino = import_openvino()
    os.environ.setdefault("NNCF_CI", "1")  # NNCF 3.4 then sends nothing
    hidden = "nncf" not in sys.modules and "openvino_telemetry" not in sys.modules
    if hidden:  # it does without the package where it is missing, and would write into the home folder at its import
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # typeshed: modules only
    try:
        import nncf
    except ImportError as error:
        raise UserError(f"nncf cannot be imported ({error}); {_PACKAGE}, or leave --peer out") from None
    finally:
        if hidden:
            sys.modules.pop("openvino_telemetry", None)
    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf, openvino
