"""From a model YAML and weights to an `InferenceModel`, as PaddleDetection's ``tools/export_model.py`` does it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from act_pipeline.core.artifacts import INFER_CFG_FILENAME, InferenceModel
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.downloads import fetch, is_url
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.output_folders import new_artifact, require_replaceable
from act_pipeline.core.package_versions import versions
from act_pipeline.core.records import read_record, write_record
from act_pipeline.core.yaml_files import apply_overrides, describe_search, load_yaml, resolve_path
from act_pipeline.data.annotations import Annotations
from act_pipeline.data.classes import check_count, read_label_list
from act_pipeline.data.infer_cfg import normalization
from act_pipeline.engines.interface import runtime_error_line
from act_pipeline.graph.quick_building import quick_building
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.rtdetr.build import build_model
from act_pipeline.rtdetr.fit import check_config, check_model
from act_pipeline.rtdetr.ppyoloe import drop_training_parts, infer_cfg_keys, input_names, is_ppyoloe

_logger = logging.getLogger(__name__)
EXPORT_SCHEMA = "act_pipeline.export/1"
RECORD_FILENAME = "export.json"
COCO_CLASSES = 80
_IMAGE_SHAPE = "TestReader.inputs_def.image_shape"
# PaddleDetection's TRT_MIN_SUBGRAPH of DETR: what its own deployment reads from infer_cfg.yml.
_MIN_SUBGRAPH_SIZE = 3
_RTDETR_NORMALIZATION = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"}


def export_model(
    config: str | os.PathLike[str],
    output_dir: str | os.PathLike[str] = "output_inference",
    overrides: Sequence[str] = (),
    reuse: bool = False,
    label_list: Sequence[str] | None = None,
) -> InferenceModel:
    """Export a model into ``output_dir/<name of the config>``, with a record of what it was made from, ``export.json``.

    Args:
        config: PaddleDetection's model YAML; ``configs/...`` of this package too.
        output_dir: the folder's parent.
        overrides: ``key=value`` each; ``weights`` is a path or a URL, ``trt=True`` writes activations as TensorRT knows
            them, ``TestReader.fuse_normalize=true`` lets the graph normalize, ``DETRPostProcess.bbox_decode_type=pad``
            takes pictures that were padded.
        reuse: return the model that is there already if its record says that it was made from the same.
        label_list: class names; None takes them from the config's data sets.

    Returns:
        the model. Its inputs are ``image [N, 3, H, W]``, ``im_shape [N, 2]``, ``scale_factor [N, 2]``, its outputs
        ``bbox [K, 6]``, ``bbox_num [N]``; N is open. With ``exclude_post_process: True`` the input is ``image``, the
        outputs are boxes ``[N, Q, 4]`` (cx, cy, w, h in 0..1) and logits ``[N, Q, classes]``. A PP-YOLOE has no input
        ``im_shape``; with ``exclude_nms: True`` its outputs are boxes ``[N, A, 4]`` and scores ``[N, classes, A]``,
        with ``exclude_post_process: True`` one array ``[N, A, 4 + classes]``, see
        :class:`act_pipeline.families.ppyoloe.PPYoloe`.

    Raises:
        UserError: the config, the weights or the input size are not as they must be, or do not fit each other.
    """
    config = find_shipped(config)
    plan = plan_export(str(config), apply_overrides(load_yaml(config), overrides), overrides, label_list)
    weights = plan.content.get("weights")
    if not isinstance(weights, str):
        raise UserError(
            f"{config}: key 'weights' is {weights!r}, expected a .pdparams or its URL; give -o weights=PATH_OR_URL"
        )
    weights = str(fetch(weights) if is_url(weights) else weights)

    from act_pipeline.rtdetr.build import load_weights, weights_path

    directory = Path(output_dir) / Path(config).stem
    record = {
        "config": str(config),
        "overrides": list(overrides),
        "source_hash": hash_files([weights_path(weights)]),
    }
    if reuse and _is_current(directory, plan.complete(record)):
        return InferenceModel.load(directory)
    return plan.export(lambda model: load_weights(model, weights), directory, record, "--output_dir")


@dataclass(frozen=True)
class ExportPlan:
    """What :func:`plan_export` made of a model config.

    Attributes:
        source: the config, for messages.
        content: its content, with the input size.
        size: height and width of the input in pixels.
        infer_cfg: content of ``infer_cfg.yml``.
    """

    source: str
    content: Mapping[str, Any]
    size: tuple[int, int]
    infer_cfg: Mapping[str, Any]

    def complete(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``record`` with what the plan adds to it: the input size, the class names and the versions."""
        label_list = self.infer_cfg["label_list"]
        return {**record, "input_size": list(self.size), "label_list": label_list, "versions": versions()}

    def export(
        self, load: Callable[[Any], None], directory: Path, record: Mapping[str, Any], flag: str
    ) -> InferenceModel:
        """Build the model, fill it with weights, and write its static graph and ``export.json``.

        Args:
            load: sets the weights of the built `paddle.nn.Layer`.
            directory: the folder to write.
            record: content of ``export.json`` besides what :meth:`complete` adds.
            flag: the command's flag that names another folder, for the message.

        Raises:
            UserError: the folder holds something else, or the model cannot be built or traced.
        """
        require_replaceable(directory, RECORD_FILENAME, flag)
        model = build_model(self.content, source=self.source)
        inputs = None
        if is_ppyoloe(self.content):
            inputs = input_names(self.content)
        else:
            check_model(self.source, model, self.size)
        load(model)
        drop_training_parts(model)
        if _fuses_normalization(self.content):
            _normalize_in_graph(model, _steps(self.content))
        return export_layer(model, self.size, self.infer_cfg, directory, self.complete(record), inputs)


def plan_export(
    source: str, content: Mapping[str, Any], overrides: Sequence[str] = (), label_list: Sequence[str] | None = None
) -> ExportPlan:
    """Check a model config and derive from it what an export needs, before anything is built.

    Args:
        source: the config, for messages.
        content: its content.
        overrides: those that ``content`` already has: where two keys contradict each other, the overridden one counts.
        label_list: class names; None takes them from the config's data sets.

    Raises:
        UserError: the config or the input size is not as it must be.
    """
    size = _input_size(source, content, overrides)
    content = {**content, "eval_size": list(size), "exclude_post_process": _without_post_process(source, content)}
    if is_ppyoloe(content):
        export = _checked_section(source, content, "export")
        content["exclude_nms"] = True if export.get("nms") is False else content.get("exclude_nms", False)
    check_config(source, content)
    names = _label_list(source, content) if label_list is None else list(label_list)
    return ExportPlan(source, content, size, _infer_cfg(content, size, names))


def _is_current(directory: Path, record: Mapping[str, Any]) -> bool:
    try:
        found = read_record(directory / RECORD_FILENAME, EXPORT_SCHEMA)
        return all(found.get(key) == value for key, value in record.items()) and (
            found.get("model_hash") == InferenceModel.load(directory).content_hash()
        )
    except UserError:
        return False


def export_layer(
    model: Any,
    size: tuple[int, int],
    infer_cfg: Mapping[str, Any],
    directory: Path,
    record: Mapping[str, Any],
    read: Sequence[str] | None = None,
) -> InferenceModel:
    """Write a built model's static graph, parameters and ``infer_cfg.yml`` into ``directory``, whole or not at all.

    Args:
        model: a `paddle.nn.Layer` with its weights.
        size: height and width of the input in pixels.
        infer_cfg: content of ``infer_cfg.yml``.
        directory: the folder to write.
        record: content of ``export.json`` besides the hash and the size of the model.
        read: names of the inputs that the graph reads; None: those of an RT-DETR.

    Raises:
        UserError: the model cannot be traced.
    """
    import paddle
    from paddle.static import InputSpec

    model.eval()
    for layer in model.sublayers():
        if hasattr(layer, "convert_to_deploy"):
            layer.convert_to_deploy()
    inputs = {
        "image": InputSpec([None, 3, *size], name="image"),
        "im_shape": InputSpec([None, 2], name="im_shape"),
        "scale_factor": InputSpec([None, 2], name="scale_factor"),
    }
    # Paddle refuses to save an input that nothing reads.
    if read is None and getattr(model, "exclude_post_process", False):
        inputs = {"image": inputs["image"]}
    # A PP-YOLOE is traced with all inputs: it takes them from the batch also where it does not compute with them.
    saved = {} if read is None else {"input_spec": [{name: inputs[name] for name in read}]}
    with new_artifact(directory) as staging:
        traced = staging / "traced"
        try:
            static = paddle.jit.to_static(model, input_spec=[inputs], full_graph=True)
            with quick_building():
                paddle.jit.save(static, str(traced / "model"), **saved)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
            raise UserError(
                f"the model cannot be traced at the input size {list(size)}: {runtime_error_line(error)}; check the "
                "model config against the one that was trained"
            ) from error
        with static_mode():
            exported = StaticGraph.load(InferenceModel(traced)).save(staging)
        shutil.rmtree(traced)
        text = yaml.safe_dump(dict(infer_cfg), sort_keys=False, allow_unicode=True)
        (staging / INFER_CFG_FILENAME).write_text(text, encoding="utf-8")
        figures = {"bytes": exported.bytes, "model_hash": exported.content_hash()}
        write_record(staging / RECORD_FILENAME, EXPORT_SCHEMA, {**record, **figures})
    return InferenceModel.load(directory)


def _input_size(config: Any, content: Mapping[str, Any], overrides: Sequence[str]) -> tuple[int, int]:
    """Return height and width: ``TestReader.inputs_def.image_shape`` as PaddleDetection has it, and ``eval_size``.

    Both say the same; where they do not, the one that an override sets counts.
    """
    sizes = {}
    shape = _checked_section(config, _checked_section(config, content, "TestReader"), "inputs_def").get("image_shape")
    if shape is not None:
        if isinstance(shape, list) and len(shape) in (3, 4) and shape[-3] != 3:
            raise UserError(f"{config}: key '{_IMAGE_SHAPE}' is {shape}, expected [3, height, width]")
        sizes[_IMAGE_SHAPE] = shape[-2:] if isinstance(shape, list) else shape
    if shape is None or content.get("eval_size") is not None:
        sizes["eval_size"] = content.get("eval_size")
    for where, size in sizes.items():
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(edge, int) and edge > 0 for edge in size)):
            raise UserError(
                f"{config}: key '{where}' gives the input size {size!r}, expected two positive integers [height, width]"
            )
        if any(edge % 32 for edge in size):
            raise UserError(
                f"{config}: key '{where}' gives the input size {size}, expected multiples of 32, the coarsest stride"
            )
    given = {where: size for where, size in sizes.items() if _is_overridden(where, overrides)} or sizes
    found = {tuple(size) for size in given.values()}
    if len(found) > 1:
        raise UserError(
            f"{config}: key '{_IMAGE_SHAPE}' gives the input size {sizes[_IMAGE_SHAPE]}, 'eval_size' is "
            f"{sizes['eval_size']}, expected the same; set both to the size of the input"
        )
    height, width = found.pop()
    return height, width


def _is_overridden(key: str, overrides: Sequence[str]) -> bool:
    """Say whether an override sets ``key`` or a section around it."""
    return any(f"{key}.".startswith(f"{override.partition('=')[0].strip()}.") for override in overrides)


def _without_post_process(config: Any, content: Mapping[str, Any]) -> bool:
    """Return whether to end at boxes and logits: ``exclude_post_process``, or ``export`` as later configs have it."""
    section = _checked_section(config, content, "export")
    architecture = _checked_section(config, content, str(content.get("architecture")))
    asked = content.get("exclude_post_process", architecture.get("exclude_post_process", False))
    if section.get("post_process") is False or section.get("benchmark") is True:
        return True
    return asked


def _checked_section(config: Any, content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"{config}: key '{name}' is {section!r}, expected 'key: value' lines")
    return section


def _infer_cfg(content: Mapping[str, Any], size: tuple[int, int], label_list: list[str]) -> dict[str, Any]:
    keys = {"arch": "DETR", "min_subgraph_size": _MIN_SUBGRAPH_SIZE}
    keys = infer_cfg_keys(content) if is_ppyoloe(content) else keys
    return {
        "mode": "paddle",
        "draw_threshold": 0.5,
        "metric": content.get("metric", "COCO"),
        "use_dynamic_shape": False,
        **keys,
        "Preprocess": _preprocessing(content, size),
        "label_list": label_list,
    }


def _preprocessing(content: Mapping[str, Any], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return ``infer_cfg.yml``'s steps: what is left to do, after decoding, by whoever feeds the model."""
    described = []
    for name, arguments in _steps(content):
        if name == "Decode" or (name == "NormalizeImage" and _fuses_normalization(content)):
            continue
        if name == "Resize":
            arguments = {**arguments, "target_size": list(size), "interp": arguments.get("interp", 1)}
        described.append({**arguments, "type": name})
    return described


def _steps(content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the TestReader's transforms, name and arguments each; RT-DETR's own where the config has none."""
    reader = _section(content, "TestReader")
    steps = reader.get("sample_transforms") or _section(content, "EvalReader").get("sample_transforms")
    if not steps:
        pads = _section(content, "DETRPostProcess").get("bbox_decode_type") == "pad"
        edge = {"Pad": {"size": list(content["eval_size"]), "fill_value": [0.0, 0.0, 0.0]}}
        steps = [
            {"Decode": {}},
            {"Resize": {"keep_ratio": pads, "interp": 2}},
            *([edge] if pads else []),
            {"NormalizeImage": _RTDETR_NORMALIZATION},
            {"Permute": {}},
        ]
    return [(name, dict(arguments or {})) for step in steps for name, arguments in step.items()]


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}


def _fuses_normalization(content: Mapping[str, Any]) -> bool:
    return bool(_section(content, "TestReader").get("fuse_normalize"))


def _normalize_in_graph(model: Any, steps: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Let a model normalize the pixels 0 to 255 that it is fed, as ppdet's ``fuse_normalize`` does.

    Raises:
        UserError: there is no ``NormalizeImage``.
    """
    found = [arguments for name, arguments in steps if name == "NormalizeImage"]
    if len(found) != 1:
        raise UserError(
            f"TestReader.fuse_normalize is true, but its sample_transforms have NormalizeImage {len(found)} times, "
            "expected once; add it, or set fuse_normalize: false"
        )
    import paddle

    factor, shift = normalization(found[0], "TestReader.sample_transforms")
    model.fuse_norm = True
    model.scale = paddle.to_tensor(factor.astype("float32")).reshape([1, 3, 1, 1])
    model.bias = paddle.to_tensor(shift.astype("float32")).reshape([1, 3, 1, 1])


def _label_list(config: Any, content: Mapping[str, Any]) -> list[str]:
    """Return the class names: of the annotation file or list that is here, COCO's for 80 classes, else numbers."""
    num_classes = content.get("num_classes", COCO_CLASSES)
    instead = "COCO's names" if num_classes == COCO_CLASSES else f"the names class_0 to class_{num_classes - 1}"
    for section in ("TestDataset", "EvalDataset"):
        dataset = content.get(section)
        fields = getattr(dataset, "fields", dataset) or {}
        if not fields.get("anno_path"):
            continue
        where = f"{config}: {section}.anno_path"
        path = resolve_path(str(Path(fields.get("dataset_dir") or "", fields["anno_path"])), config)
        if not path.is_file():
            searched = describe_search(path, config)
            _logger.warning("%s: %s does not exist%s; the classes get %s", where, path, searched, instead)
            continue
        names = _names(path, where, num_classes)
        if len(names) != num_classes:
            raise UserError(f"{where}: {path} names {len(names)} classes, num_classes is {num_classes}; correct one")
        return names
    if num_classes == COCO_CLASSES:
        return coco_class_names()
    return [f"class_{index}" for index in range(num_classes)]


def coco_class_names() -> list[str]:
    """Return COCO's 80 class names in the order of a model's classes."""
    from act_pipeline.core.paddledet import import_ppdet

    return list(import_ppdet("ppdet.data.source.category").get_categories("COCO", None)[1].values())


def _names(path: Path, where: str, num_classes: int) -> list[str]:
    """Return the names of an annotation file's categories, or of a list of names."""
    if path.suffix.lower() == ".json":
        annotations = Annotations.load(path, where)
        check_count(num_classes, f"{where}: num_classes", annotations)
        return annotations.category_names
    if path.suffix.lower() == ".txt":
        return read_label_list(path, where)
    raise UserError(f"{where} is {path}, expected an annotation file (.json) or class names, one a line (.txt)")
