"""ONNX Runtime: the CPU provider, and on a GPU the CUDA and TensorRT providers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import Artifact, OnnxModel, location
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.package_versions import versions as package_versions
from act_pipeline.engines.arrays import InputCheck
from act_pipeline.engines.interface import AUTO_REQUESTS, refusals
from act_pipeline.engines.onnx_runtimes.onnx_files import (
    OnnxSummary,
    decoder_of_file,
    onnx_artifact,
    require_qdq_format,
)
from act_pipeline.families.registry import Decoder

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_PACKAGE = 'pip install "act_pipeline[onnxruntime]", or -r requirements/onnxruntime.txt'
_ERRORS_ONLY = 3
# In 1.31 it rounds float biases and requantizes their sums: scores change by up to 0.2 instead of 0.05.
INEXACT_OPTIMIZERS = ["WeightBiasQuantization"]


class OnnxRuntimeEngine:
    """A session of ONNX Runtime as an :class:`act_pipeline.engines.interface.Engine`.

    One session runs every batch size. For several requests at a time on the CPU, the threads are divided: two requests
    on four threads are two sessions of two threads. A session without threads of its own computes in the thread that
    calls ``run``, so as many requests as threads, or more, share one session and its weights; as many of them compute
    at a time as there are threads.

    Attributes:
        provider: ``cpu``, ``cuda`` or ``tensorrt``.
        requests: from how many threads ``run`` may be called at the same time.
        sessions: number of sessions, each with its own copy of the weights.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: Artifact,
        precision: str = "fp32",
        device: str = "CPU",
        threads: int | None = None,
        *,
        batch_size: int = 1,
        requests: int = 1,
        provider: str | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Export the model to ONNX if it is a folder, and load it.

        Args:
            model: float for ``fp32`` and ``fp16``, with Q/DQ for ``int8``; a folder, or an ONNX file.
            precision: ``fp32`` or ``int8``; on a GPU also ``fp16``.
            device: ``CPU`` or ``GPU``.
            threads: number of CPU threads; None: all CPUs that this process may use.
            batch_size: the largest batch.
            requests: from how many threads ``run`` may be called at the same time; 0 (``AUTO_REQUESTS``): on the CPU
                as many as threads, on a GPU 2.
            provider: ``cpu``; on a GPU ``cuda`` or ``tensorrt``. None: ``cpu`` on the CPU; on a GPU ``tensorrt`` for
                ``int8`` (the CUDA provider has no INT8 kernels), otherwise ``cuda``.
            decoder: turns the outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: the package or the provider is missing, the file is damaged or in the Q/DQ format of another
                runtime, or ONNX Runtime cannot load it.
        """
        self.precision, self.device = precision, device
        self.threads = threads or available_cpus()
        self.provider = provider or {"CPU": "cpu"}.get(device, "tensorrt" if precision == "int8" else "cuda")
        self._runtime = import_onnxruntime()
        _require_provider(self._runtime, self.provider, device)
        target = {"tensorrt": "tensorrt", "cpu": "onnxruntime"}.get(self.provider, "cpu")
        self.artifact, summary = onnx_artifact(model, target if precision != "fp32" else "cpu", precision == "fp16")
        if self.provider == "tensorrt":
            require_qdq_format(self.artifact, summary, "tensorrt", "which TensorRT refuses")
        self._where = location(model)
        self._check = InputCheck(self._where, summary.inputs, batch_size, summary.input_dtypes)
        self._decode = decoder_of_file(model, summary, decoder)
        self._outputs = list(summary.outputs)
        if requests == AUTO_REQUESTS:
            requests = self.threads if device == "CPU" else 2
        self.requests = requests
        parallel = min(requests, self.threads) if device == "CPU" else 1
        # The first ones take what division leaves over.
        shares = [self.threads // parallel + (place < self.threads % parallel) for place in range(parallel)]
        if max(shares) == 1:
            shares = [1]
        sessions = [self._load(summary, batch_size, share) for share in shares]
        self.sessions = len(sessions)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for place in range(parallel if device == "CPU" else requests):
            self._free.put(sessions[place % len(sessions)])
        used = sessions[0].get_providers()
        if PROVIDERS[self.provider] not in used:  # ONNX Runtime falls back to another provider without an error
            self.close()
            raise UserError(
                f"ONNX Runtime cannot use its {self.provider} provider here, only {', '.join(used)}; check that CUDA "
                "and cuDNN (and TensorRT) are on LD_LIBRARY_PATH, or run with --device=CPU"
            )

    @property
    def settings(self) -> dict[str, str]:
        """Settings other than precision and device that affect results, for the records."""
        settings = {"provider": self.provider}
        if self.requests != 1:
            settings.update(requests=str(self.requests), sessions=str(self.sessions))
        return settings

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        checked = self._check(inputs)
        session = self._free.get()
        try:
            with refusals(f"ONNX Runtime cannot run {self._where}", also=_errors(self._runtime)):
                arrays = session.run(self._outputs, checked)
        finally:
            self._free.put(session)
        return self._decode(dict(zip(self._outputs, arrays)), inputs)

    def close(self) -> None:
        """Free the sessions."""
        self._free = SimpleQueue()

    def versions(self) -> dict[str, str]:
        """Return the versions of ONNX Runtime and of the packages that exported the model, by name."""
        return {**package_versions(), "onnxruntime": self._runtime.__version__}

    def _load(self, summary: OnnxSummary, batch_size: int, threads: int) -> Any:
        """Return a session with this number of threads, that of the caller of ``run`` included."""
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        with refusals(f"ONNX Runtime cannot load {self._where}", also=_errors(self._runtime)):
            return self._runtime.InferenceSession(
                str(self.artifact.path),
                options,
                providers=self._providers(summary, batch_size),
                disabled_optimizers=INEXACT_OPTIMIZERS,
            )

    def _providers(self, summary: OnnxSummary, batch_size: int) -> list[Any]:
        """Return the providers in order of priority; the CPU comes last for ops that no other supports."""
        if self.provider == "cpu":
            return [PROVIDERS["cpu"]]
        if self.provider == "cuda":
            return [PROVIDERS["cuda"], PROVIDERS["cpu"]]
        return [
            (PROVIDERS["tensorrt"], _tensorrt_options(self.artifact, summary, self.precision, batch_size)),
            PROVIDERS["cuda"],
            PROVIDERS["cpu"],
        ]


def _tensorrt_options(model: OnnxModel, summary: OnnxSummary, precision: str, batch_size: int) -> dict[str, str]:
    """Return the TensorRT provider's settings: batches of 1 to ``batch_size``, the engine cached next to the model."""

    def shapes(batch: int) -> str:
        return ",".join(
            f"{name}:{'x'.join(str(batch if size == -1 else size) for size in shape)}"
            for name, shape in summary.inputs.items()
        )

    cache = model.directory / "ort_trt_cache"
    options = {
        "trt_fp16_enable": str(precision != "fp32"),
        "trt_int8_enable": str(precision == "int8"),
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": shapes(batch_size),
        "trt_profile_max_shapes": shapes(batch_size),
    }
    if os.access(model.directory, os.W_OK):
        cache.mkdir(exist_ok=True)
        options.update(trt_engine_cache_enable="True", trt_engine_cache_path=str(cache))
    return options


def import_onnxruntime() -> Any:
    """Return the module ``onnxruntime``; importing :mod:`act_pipeline` has switched off its telemetry.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"onnxruntime cannot be imported ({error}); install it: {_PACKAGE}") from None
    return onnxruntime


def _errors(runtime: Any) -> tuple[type[BaseException], ...]:
    """Return the exception types of ONNX Runtime, which derive from ``Exception`` alone."""
    state = runtime.capi.onnxruntime_pybind11_state
    return tuple(found for found in vars(state).values() if isinstance(found, type) and issubclass(found, Exception))


def _require_provider(runtime: Any, provider: str, device: str) -> None:
    fitting = ("cpu",) if device == "CPU" else ("cuda", "tensorrt")
    if provider not in fitting:
        raise UserError(f"provider is {provider!r}, expected {' or '.join(fitting)} on the {device}")
    available = runtime.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise UserError(
            f"this ONNX Runtime has no {PROVIDERS[provider]}, only {', '.join(available)}; pip install onnxruntime-gpu "
            "instead of onnxruntime, or run with --device=CPU"
        )
