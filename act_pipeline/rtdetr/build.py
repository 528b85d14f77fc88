"""Build a model from a PaddleDetection YAML and weights; the only module that modifies `ppdet`'s workspace."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.rtdetr.fit import check_config

_MAX_NAMED_MISMATCHES = 3
# Parameters with one value a class: of RT-DETR and of PP-YOLOE.
_CLASS_BIASES = ("transformer.enc_score_head.bias", "yolo_head.pred_cls.0.bias")
# Errors that ppdet's and Paddle's constructors raise for invalid values.
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)


def register_modules() -> None:
    """Register RT-DETR's modules in `ppdet`'s workspace, unless the installed `ppdet` has RT-DETR itself.

    `ResNet`, `DETR` and `DINOLoss` replace `ppdet`'s own, of which they are supersets.
    """
    from act_pipeline.core.paddledet import import_ppdet

    import_ppdet("ppdet.modeling")  # registers ppdet's own modules
    from ppdet.core.config.schema import extract_schema
    from ppdet.core.workspace import global_config

    if "RTDETRTransformer" in global_config:
        return
    from act_pipeline.rtdetr import architecture, backbone, decoder, encoder, loss

    for module in (
        backbone.PPHGNetV2,
        backbone.ResNet,
        encoder.TransformerLayer,
        encoder.HybridEncoder,
        decoder.RTDETRTransformer,
        loss.DINOLoss,
        architecture.DETR,
        architecture.DETRPostProcess,
    ):
        # `register` rejects existing names, but three of these modules replace ppdet's own.
        global_config[module.__name__] = extract_schema(module)


@contextlib.contextmanager
def workspace(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield `ppdet`'s `create` with ``config`` merged into its global workspace, which is restored afterwards.

    `create` and `merge_config` modify the registered schemas; without the restoration, settings of one model would
    affect the next one.

    Args:
        config: content of a model YAML.
    """
    from ppdet.core.workspace import create, global_config, merge_config

    before = {key: _copy_entry(value) for key, value in global_config.items()}
    try:
        merge_config(copy.deepcopy(dict(config)))
        yield create
    finally:
        global_config.clear()
        global_config.update(before)


def _copy_entry(value: Any) -> Any:
    from ppdet.core.config.schema import SchemaDict

    if not isinstance(value, SchemaDict):
        return copy.deepcopy(value) if isinstance(value, (dict, list)) else value
    duplicate = value.copy()
    for key, item in duplicate.items():
        if type(item) in (dict, list):
            dict.__setitem__(duplicate, key, copy.deepcopy(item))
    return duplicate


def build_model(
    config: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    weights: str | None = None,
    source: str = "the model config",
):
    """Build an RT-DETR, or a PP-YOLOE of `ppdet`, in dygraph mode.

    Args:
        config: a PaddleDetection model YAML, or its content.
        overrides: ``Section.key=value`` each, as in PaddleDetection's ``-o``; applied to a YAML file only.
        weights: a ``.pdparams`` to load.
        source: name for messages, if ``config`` is given as content.

    Returns:
        a `paddle.nn.Layer` in training mode. Its input is a dict of ``image`` [N, 3, H, W], ``im_shape`` [N, 2],
        ``scale_factor`` [N, 2], and in training ``gt_class``, ``gt_bbox``. Its output is ``{"bbox", "bbox_num"}``, in
        training a dict of losses.

    Raises:
        UserError: the YAML has no architecture, a module that does not exist or a key that a module lacks, or the
            weights do not fit.
    """
    if not isinstance(config, Mapping):
        from act_pipeline.core.defaults import find_shipped
        from act_pipeline.core.yaml_files import apply_overrides, load_yaml

        source = str(find_shipped(config))
        config = apply_overrides(load_yaml(source), overrides)
    register_modules()
    check_config(source, config)
    with workspace(config) as create:
        try:
            model = create(config["architecture"])
        except _REFUSALS as error:
            kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
            raise UserError(f"{source}: the model cannot be built{kind}: {error}") from error
    if weights is not None:
        load_weights(model, weights)
    return model


def weights_path(path: str | os.PathLike[str]) -> str:
    """Return the file of ``path``, to which ``.pdparams`` is appended if needed, as in PaddleDetection's configs.

    Raises:
        UserError: there is no such file.
    """
    location = os.fspath(path)
    if not location.endswith(".pdparams") and os.path.exists(location + ".pdparams"):
        location += ".pdparams"
    if not os.path.isfile(location):
        raise UserError(f"weights {location} do not exist; give -o weights=PATH_OR_URL of a .pdparams")
    return location


def load_weights(model, path: str | os.PathLike[str]) -> None:
    """Load a ``.pdparams`` whose keys and shapes are exactly those of the model.

    Values of another dtype, such as float16 or bfloat16 from AMP training, are cast to the parameter's dtype, as in
    PaddleDetection's loader.

    Args:
        model: the model, a `paddle.nn.Layer`.
        path: the file; the extension ``.pdparams`` may be omitted.

    Raises:
        UserError: the file is missing or unreadable, keys or shapes do not fit (the first three are named), or a value
            is not a numeric array.
    """
    import paddle

    location = weights_path(path)
    try:
        state = paddle.load(location)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ImportError) as error:
        raise UserError(
            f"weights {location} cannot be read ({error}); expected a .pdparams; download it again"
        ) from None
    if not isinstance(state, dict):
        raise UserError(
            f"weights {location} hold {type(state).__name__}, expected a state dict: give the .pdparams of the training"
        )
    state.pop("StructuredToParameterName@@", None)
    set_weights(model, state, location)


def set_weights(model, state: Mapping[str, Any], location: str) -> None:
    """Set a model's weights; keys and shapes must be exactly those of the model.

    Args:
        model: the model, a `paddle.nn.Layer`.
        state: PaddleDetection's name -> array or tensor.
        location: the file they are from, for messages.

    Raises:
        UserError: keys or shapes do not fit (the first three are named), or a value is not a numeric array.
    """
    expected = model.state_dict()
    faults = []
    for name, parameter in expected.items():
        if name not in state:
            faults.append(f"{name} is missing")
        elif list(np.shape(state[name])) != list(parameter.shape):
            faults.append(f"{name} is {list(np.shape(state[name]))}, expected {list(parameter.shape)}")
    faults += [f"{name} is not in the model" for name in state if name not in expected]
    if faults:
        _check_classes(location, state, expected)
        named = "; ".join(faults[:_MAX_NAMED_MISMATCHES])
        more = f"; and {len(faults) - _MAX_NAMED_MISMATCHES} more" if len(faults) > _MAX_NAMED_MISMATCHES else ""
        raise UserError(
            f"weights {location} do not fit the model config: {named}{more}; use the config they were trained with"
        )
    model.set_state_dict({name: _cast(name, state[name], expected[name].dtype, location) for name in expected})


def _check_classes(location: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a specific UserError if the weights have another number of classes."""
    name = next((name for name in _CLASS_BIASES if name in state and name in expected), None)
    if name is None:
        return
    found, wanted = (np.shape(values[name]) for values in (state, expected))
    if len(found) == 1 and tuple(found) != tuple(wanted):
        raise UserError(
            f"weights {location} do not fit the model config: they are of {found[0]} classes, num_classes is "
            f"{wanted[0]}; set num_classes={found[0]}, or give the weights of your own training"
        )


def _cast(name: str, value: Any, dtype: Any, location: str) -> Any:
    """Convert ``value``, a tensor or an array, to a tensor of the parameter's dtype."""
    import paddle

    if not isinstance(value, paddle.Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise UserError(f"weights {location}: {name} holds {array.dtype}, expected numbers")
        if array.dtype == np.uint16:  # Paddle's NumPy form of bfloat16: the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        value = paddle.to_tensor(array)
    return value if value.dtype == dtype else value.astype(dtype)
