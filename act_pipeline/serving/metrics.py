"""The monitor's figures in Prometheus' text format; dashboards and alert rules use these names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "act_pipeline_"
# Name without the prefix -> type and help.
METRICS = {
    "requests_total": ("counter", "Requests by version."),
    "errors_total": ("counter", "Requests that the version could not answer."),
    "detections_total": ("counter", "Detections with a score above 0.3."),
    "shadowed_total": ("counter", "Requests that ran in the float model too."),
    "shadow_dropped_total": ("counter", "Shadow requests dropped because the queue was full."),
    "shadow_errors_total": ("counter", "Shadow requests that the float model could not answer."),
    "labelled_total": ("counter", "Requests whose labels were posted back."),
    "decisions_total": ("counter", "Alarms and changes of versions by a rule."),
    "share": ("gauge", "Share of the requests by version and role, 0 to 1."),
    "requests_per_second": ("gauge", "Requests a second over the window."),
    "latency_seconds": ("gauge", "Latency over the window by quantile."),
    "error_rate": ("gauge", "Share of the requests in the window that failed."),
    "detections_per_image": ("gauge", "Detections with a score above 0.3 an image, over the window."),
    "detections_change": ("gauge", "Relative change of the detections an image since the calibration; 0: chance."),
    "scores": ("gauge", "Detections in the window by class and score."),
    "psi": ("gauge", "Population stability index of the scores, compared with the calibration images."),
    "psi_class": ("gauge", "The same of one class."),
    "box_share": ("gauge", "Share of small, medium and large boxes (COCO's limits)."),
    "box_side_pixels": ("gauge", "Square root of the boxes' area by quantile."),
    "disagreement": ("gauge", "Change of the detections compared with the float model, 0 to 1."),
    "matched": ("gauge", "Share of the float model's boxes that are matched."),
    "mean_iou": ("gauge", "Mean IoU of the matched boxes."),
    "score_shift": ("gauge", "Mean absolute change of the matched boxes' scores."),
    "beyond_range": ("gauge", "Share of activations beyond their ranges, times that of the calibration images."),
    "beyond_range_share": ("gauge", "Share of activations beyond their calibrated ranges, mean over the tensors."),
    "beyond_range_worst": ("gauge", "The same of the tensor whose share grew most."),
    "map": ("gauge", "mAP at IoU 0.50:0.95 of the labelled requests."),
    "map_drop": ("gauge", "mAP of the evaluation minus that of the labelled requests."),
    "rule_active": ("gauge", "1 while a rule is broken."),
    "temperature_celsius": ("gauge", "Temperature of the device."),
    "shadow_waiting": ("gauge", "Shadow requests in the queue."),
}
# Gauge -> its entry of a version's window.
_OF_WINDOW = {
    "requests_per_second": "fps",
    "error_rate": "error_rate",
    "detections_per_image": "detections",
    "detections_change": "detections_change",
    "psi": "psi",
    "disagreement": "disagreement",
    "matched": "matched",
    "mean_iou": "mean_iou",
    "score_shift": "score_shift",
    "beyond_range": "beyond_range",
    "beyond_range_share": "beyond_range_share",
    "map": "map",
    "map_drop": "map_drop",
}


@dataclass(frozen=True)
class Sample:
    """A value of a metric.

    Attributes:
        name: a key of :data:`METRICS`.
        labels: label -> value.
        value: the value.
    """

    name: str
    labels: Mapping[str, str]
    value: float


def exposition(figures: Mapping[str, Any]) -> str:
    """Return Prometheus' text format, version 0.0.4; a figure that there is none of is left out.

    Args:
        figures: what :meth:`act_pipeline.serving.monitor.Monitor.figures` returns.
    """
    found: dict[str, list[Sample]] = {name: [] for name in METRICS}
    for sample in samples(figures):
        found[sample.name].append(sample)
    lines = []
    for name, (kind, help_text) in METRICS.items():
        if found[name]:
            lines += [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} {kind}"]
            lines += [_line(sample) for sample in found[name]]
    return "\n".join(lines) + "\n"


def samples(figures: Mapping[str, Any]) -> Iterator[Sample]:
    """Yield the values of all metrics; for the argument see :func:`exposition`."""
    for number, version in figures["versions"].items():
        of = {"version": number}
        for name, count in version["counters"].items():
            yield Sample(f"{name}_total", of, count)
        if version["role"] is not None:
            yield Sample("share", {**of, "role": version["role"]}, version["share"])
        for rule in version["rules"]:
            yield Sample("rule_active", {**of, **_labels(rule)}, float(rule["active"]))
        if version["window"] is not None:
            yield from _of_window(of, version["window"])
    for rule in figures["device_rules"]:
        yield Sample("rule_active", {"version": "", **_labels(rule)}, float(rule["active"]))
    temperature = figures["temperature"]
    if temperature["celsius"] is not None:
        yield Sample("temperature_celsius", {"source": temperature["source"]}, temperature["celsius"])
    yield Sample("shadow_waiting", {}, figures["shadow_waiting"])


def _of_window(of: Mapping[str, str], window: Mapping[str, Any]) -> Iterator[Sample]:
    for name, key in _OF_WINDOW.items():
        if window[key] is not None:
            yield Sample(name, of, window[key])
    for quantile, key in (("0.5", "p50_ms"), ("0.99", "p99_ms")):
        if window[key] is not None:
            yield Sample("latency_seconds", {**of, "quantile": quantile}, window[key] / 1000)
    if window["beyond_range_tensor"] is not None:
        worst = {**of, "tensor": window["beyond_range_tensor"]}
        yield Sample("beyond_range_worst", worst, window["beyond_range_tensor_share"])
    for index, bins in window["scores"].items():
        for bin_name, count in bins.items():
            yield Sample("scores", {**of, "class": index, "bin": bin_name}, count)
    for index, value in window["psi_class"].items():
        yield Sample("psi_class", {**of, "class": index}, value)
    for size, share in window["sizes"].items():
        yield Sample("box_share", {**of, "size": size}, share)
    for at, side in window["side_px"].items():
        yield Sample("box_side_pixels", {**of, "quantile": f"0.{at[1:].rstrip('0')}"}, side)


def _line(sample: Sample) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in sample.labels.items())
    labels = "{" + inner + "}" if inner else ""
    return f"{PREFIX}{sample.name}{labels} {float(sample.value)!r}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(rule: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells a rule from the others, of which several may be of one metric."""
    return {name: str(rule[name]) for name in ("metric", "bound", "action")}
