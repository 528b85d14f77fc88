"""A small synthetic INT8 model folder with all records that a report is made from, and a reader of its data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from act_pipeline.core.records import write_record
from act_pipeline.data.annotations import Annotations
from act_pipeline.evaluation import save_detections

CLASSES = {3: "cat", 7: "dog & <b>", 9: "nothing"}
FP32_HASH, INT8_HASH = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
VERSIONS = {"act_pipeline": "0.1.0", "python": "3.11.7", "paddlepaddle": "2.6.2"}
_SIDES = (160, 120)


class StubReader:
    """A minimal reader for :func:`write_report`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "reader.yml"
        self._folder = folder

    def annotations(self, split: str = "eval") -> Annotations:
        return Annotations.load(self._folder / "annotations.json", "test")

    def image_dir(self, split: str = "eval") -> Path:
        return self._folder / "images"


def make_data(folder: Path, images: int = 5) -> StubReader:
    """Write images with two objects each, none of them of the third class."""
    import cv2

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": number, "name": name} for number, name in CLASSES.items()]
    for image in range(images):
        width, height = _SIDES
        picture = rng.integers(0, 255, (height, width, 3), np.uint8)
        cv2.imwrite(str(folder / "images" / f"{image}.png"), picture)
        content["images"].append({"id": 40 + image, "file_name": f"{image}.png", "width": width, "height": height})
        for place, (category, box) in enumerate(((3, [10, 10, 40, 30]), (7, [60 + 5 * image, 40, 20, 20]))):
            content["annotations"].append(
                {
                    "id": 2 * image + place + 1, "image_id": 40 + image, "category_id": category, "bbox": box,
                    "area": box[2] * box[3], "iscrowd": 0,
                }
            )  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return StubReader(folder)


def detections(reader: StubReader, seed: int, noise: float, seldom: int = 3) -> np.ndarray:
    """Return the objects with slightly shifted boxes, a wrong class, a false box, uncertain and many low-score ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for index, box in enumerate(reader.annotations().boxes or ()):
        x, y, width, height = np.array(box["bbox"]) + rng.normal(0, noise, 4)
        score = 0.35 if index % seldom == 0 else float(rng.uniform(0.6, 0.95))
        rows.append([box["image_id"] - 40, x, y, width, height, score, box["category_id"]])
    rows += [[index % 5, 100 + index, 5, 9, 9, 0.4, 3] for index in range(12)]
    rows.append([0, 60, 40, 20, 20, 0.91, 3])
    rows.append([1, 120, 80, 30, 30, 0.7 + noise / 100, 7])
    rows.append([2, 12, 12, 39, 29, 0.3, 3])
    return np.array(rows, np.float64)


def make_artifact(folder: Path, reader: StubReader, **changes: Any) -> Path:
    """Write ``act.json``, ``detections.npz`` and ``analysis.json``; ``changes`` override keys of ``act.json``."""
    folder.mkdir(parents=True)
    before, after = detections(reader, 1, 0.5), detections(reader, 2, 1.5, 4)
    ids = list(range(40, 45))
    evaluations = {
        name: SimpleNamespace(detections=rows, image_ids=ids, masks=None)
        for name, rows in (("fp32", before), ("int8", after))
    }
    save_detections(folder / "detections.npz", evaluations, {number: f"{number - 40}.png" for number in ids})
    from act_pipeline.report.curves import score

    scores = {name: score(reader.annotations(), rows, ids) for name, rows in (("fp32", before), ("int8", after))}
    record = act_record({name: found.stats for name, found in scores.items()})
    record.update(changes)
    write_record(folder / "act.json", "act_pipeline.act/1", record)
    write_record(folder / "analysis.json", "act_pipeline.analysis/1", analysis_record())
    return folder


def act_record(stats: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    def figures(name: str, size: int, p50: float) -> dict[str, Any]:
        return {
            "map": stats[name]["ap"], "map50": stats[name]["ap50"], "bytes": size, "latency_ms": latency(p50),
            "stats": {key: -1.0 if value is None else value for key, value in stats[name].items()},
            "per_class": {"cat": 0.61 - (name == "int8") * 0.012, "dog & <b>": 0.5234, "nothing": None},
        }  # fmt: skip

    fp32, int8 = figures("fp32", 15612189, 34.5), figures("int8", 4424947, 137.25)
    drop = fp32["map"] - int8["map"]
    step = {"settings": {"algo": "mse"}, "map": int8["map"], "map50": int8["map50"], "stats": int8["stats"],
            "bytes": 4400000, "latency_ms": latency(131.5), "quantized": 114, "kept": 2}  # fmt: skip
    return {
        "strategy": "auto",
        "fp32": fp32,
        "int8": int8,
        "map_drop": drop,
        "max_drop": 0.75,
        "bytes_ratio": 4424947 / 15612189,
        "seconds": {"prepare": 1.13, "evaluate_fp32": 5.36, "calibrate": 12.5, "mystery": 3.25},
        "quantized_ops": {"conv2d": 68, "matmul_v2": 47},
        "quantizable_ops": 118,
        "kept_ops": [
            {"type": "conv2d", "output": "conv2d_61.tmp_0", "module": "backbone.x", "group": "backbone", "reason": "asked"}
        ],
        "weight_only_ops": [{"type": "matmul_v2", "output": "matmul_3.tmp_0", "module": "head.y", "group": "head"}],
        "given_back": [{"output": "conv2d_61.tmp_0", "module": "backbone.x", "sensitivity": 0.0123, "map_after": 0.4321}],
        "steps": [
            {**step, "name": "ptq:mse", "strategy": "ptq", "map_drop": drop + 0.1, "seconds": 61.5,
             "meets_max_drop": False, "chosen": False},
            {**step, "name": "mixed", "strategy": "mixed", "map_drop": drop, "seconds": 33.75,
             "meets_max_drop": True, "chosen": True},
        ],
        "training": {"loss": [3.9, 3.7, 3.8], "evaluations": [{"iteration": 3, "agreement": 0.4}]},
        "evaluation": {"engine": "openvino", "fp32_engine": "openvino", "device": "CPU", "threads": 2, "images": 5},
        # The ratio is the median over the rounds, not the ratio of the two medians.
        "latency": {"rounds": 10, "fp32": {"p50_ms": 33.25, "p90_ms": 35.5}, "int8": {"p50_ms": 12.5, "p90_ms": 13.5},
                    "ratio": 2.75},
        "overrides": ["QuantPost.calib_images=200"],
        "model_hash": INT8_HASH,
        "source_hash": FP32_HASH,
        "data_hash": {"train": "sha256:" + "01" * 32, "eval": "sha256:" + "23" * 32},
        "config": {"path": "configs/a.yml", "Global": {"model_dir": "output/float"}, "QuantPost": {"images": 200}},
        "versions": VERSIONS,
    }  # fmt: skip


def latency(p50: float) -> dict[str, float]:
    return {"min": p50 - 1, "p50": p50, "p90": p50 + 1, "p99": p50 + 2, "max": p50 + 3}


def analysis_record(ops: int = 30) -> dict[str, Any]:
    edges = [0.25 * place for place in range(17)]
    return {
        "ops": [
            {
                "name": f"conv2d_{place}.tmp_0", "type": "conv2d", "module": f"backbone.block{place}",
                "group": "backbone" if place < 20 else "decoder", "sqnr_db": 30.0 - place / 4,
                "detection_change": 0.001 * place,
                "activations": [
                    {"tensor": f"relu_{place}", "min": -1.0, "max": 4.0, "p999": 1.0 + place / 8, "p9999": 3.9,
                     "threshold": 3.5, "histogram": {"edges": edges, "counts": [1000 >> place for place in range(16)]}}
                ],
            }
            for place in range(ops)
        ],
        "groups": [],
        "attentions": [{"name": "transformer.decoder.layers.0.cross_attn", "ops": 4, "share": 0.123}],
        "sensitivity": {"images": 8},
    }  # fmt: skip


def search_record(**changes: Any) -> dict[str, Any]:
    """Return a ``search.json``: of three variants one is dropped early, one is beyond max_drop and one is chosen."""

    def row(
        layers: int, queries: int, precision: str, ms: float, ratio: float, drop: float | None, **more: Any
    ) -> dict:
        known = drop is not None
        return {
            "name": f"layers{layers}_queries{queries}_640x480", "words": "", "layers": layers, "queries": queries,
            "size": [640, 480], "precision": precision, "folder": "s/m", "bytes": 4000000, "map": 0.5366 - (drop or 0.0),
            "images": 72, "map_drop": drop, "low": drop - 0.006 if known else None,
            "high": drop + 0.0055 if known else None, "probability": 0.75 if known else None, "latency_ms": ms,
            "ratio": ratio, "dropped": None, "on_front": False, **more,
        }  # fmt: skip

    return {
        "model": "output/float", "model_hash": FP32_HASH, "engine": "openvino on CPU", "max_drop": 0.01, "confidence": 0.5,
        "chosen": {"name": "layers2_queries100_640x480", "precision": "int8"}, "calibration_images": 64,
        "full_int8": "output/m", "seconds": {"time": 3.5},
        "rows": [
            row(1, 200, "int8", 88.5, 1.41, 0.0321, on_front=True),
            row(2, 100, "int8", 105.25, 1.19, 0.0082, on_front=True),
            row(2, 100, "int8", 104.75, 1.2, 0.0112, name="layers2_queries100_640x480_bf16", bf16=True),
            row(3, 300, "int8", 125.5, 1.0, 0.0035, on_front=True),
            row(1, 200, "fp32", 301.5, 1.31, 0.0309),
            row(2, 100, "fp32", 355.25, 1.11, 0.0019),
            row(1, 100, "fp32", 299.5, 1.33, 0.0812, images=18, dropped="others are faster or better on 18 images"),
            row(3, 300, "fp32", 394.5, 1.0, None, on_front=True),
        ],
        **changes,
    }  # fmt: skip


def write_eval(path: Path, engine: str, precision: str, p50: float, **changes: Any) -> Path:
    """Write an ``eval.json`` of one of the two models."""
    int8 = precision == "int8"
    record = {
        "engine": engine, "precision": precision, "device": "CPU", "threads": 2, "images": 5, "batch_size": 1,
        "map": 0.4567, "map50": 0.6543, "latency_ms": latency(p50), "model_bytes": 4093146 if int8 else 15318959,
        "model_hash": INT8_HASH if int8 else FP32_HASH, "model": "output/m", "artifact": "output/m",
        "stats": {"ap_small": 0.31, "ap_medium": 0.52, "ap_large": -1.0}, **changes,
    }  # fmt: skip
    write_record(path, "act_pipeline.eval/1", record)
    return path
