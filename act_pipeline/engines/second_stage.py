"""The second model of a pair, which runs after the first one in the same runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import Engine
from act_pipeline.engines.machine import Machine
from act_pipeline.engines.registry import find_support
from act_pipeline.families.registry import Decoder, undecoded
from act_pipeline.families.sam import ImageEncoder
from act_pipeline.graph.model_files import inspect_model

_OTHERWISE = ("paddle_onednn", "paddle")


def with_second_stage(
    decoder: Decoder, create: Callable[..., Engine], name: str, device: str, threads: int | None, here: Machine
) -> Decoder:
    """Return a decoder that runs the second model of a pair; the same decoder if its family has none.

    Args:
        decoder: of the first model.
        create: :func:`act_pipeline.engines.create_engine`.
        name, device, threads: of the first model's engine. Where it does not run the second model at its precision
            (``int8_reference`` runs no float model), Paddle does.
        here: this machine.

    Raises:
        UserError: the second model cannot be loaded.
    """
    if not isinstance(decoder.family, ImageEncoder) or decoder.partner is None or decoder.family.stage is not None:
        return decoder
    precision = "int8" if inspect_model(decoder.partner).quantized else "fp32"
    runtimes = [(name, device), *((other, "CPU") for other in _OTHERWISE)]
    able = (runtime for runtime in runtimes if _runs(runtime[0], precision, runtime[1], here))
    name, device = next(able, runtimes[-1])
    engine = create(name, decoder.partner, precision, device, threads, decoder=undecoded(decoder.partner), machine=here)
    return replace(decoder, family=ImageEncoder(_Stage(engine)))


def _runs(name: str, precision: str, device: str, here: Machine) -> bool:
    try:
        return find_support(name, precision, device, here).available
    except UserError:  # the runtime has no such precision
        return False


class _Stage:
    """An engine that several threads may call: clones of the first model's engine share it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Any:
        with self._lock:
            return self._engine.run(inputs)
