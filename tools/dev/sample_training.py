"""Training the sample's RT-DETR from scratch, with PyTorch and Hugging Face's RT-DETR.

Scenes are drawn afresh for every step, so no image is seen twice. On a CPU, PyTorch trains this model many times as
fast as PaddlePaddle 2.6 does in dygraph mode (on two cores, forward and backward of the backbone alone with 8 images:
0.23 s against 2.1 s), which is why it is used here, and only here; the weights are saved under PaddleDetection's names
(:mod:`act_pipeline.rtdetr.hf_weights`).

The weights in the repository come from 4,800 steps in 57 minutes on two busy cores (torch 2.13.0, transformers 5.23,
seed 0): run with ``--iters 3800``, stopped at step 2,400 and resumed with ``--iters 4800``. mAP, as it printed it on
60 scenes of its own: 0.07 after 600 steps, 0.29 after 1,200, 0.46 after 2,400, 0.54 after 3,600, 0.575 at the end;
0.641 on the 120 validation scenes that ``tools/make_sample.py`` writes. Steps were quicker with the environment
variables ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` at 100000000000, which keep glibc from giving
freed memory back.

Needs ``torch``, ``transformers``, ``pillow``, ``scipy``, and ``numpy<2``, best in an environment of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from torch import nn
from tqdm import tqdm

from act_pipeline.core.errors import UserError
from act_pipeline.data.builtin_sample import CLASS_NAMES, Scene, make_scene
from act_pipeline.rtdetr.hf_weights import convert_state_dict, save_pdparams

_HGNETV2: dict[str, dict[str, Any]] = {
    "S": {
        "stem_channels": [3, 24, 32],
        "embedding_size": 32,
        "stage_in_channels": [32, 64, 256, 512],
        "stage_mid_channels": [32, 48, 96, 192],
        "stage_out_channels": [64, 256, 512, 1024],
        "hidden_sizes": [64, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "depths": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
    },
}
_MONITORED_SEED_OFFSET = 1000
"""Scenes that are looked at during training are not the ones of the released validation set."""


@dataclasses.dataclass
class Settings:
    """How to train.

    Attributes:
        iters: training steps.
        batch_size: scenes a step.
        lr: highest learning rate, reached after ``warmup`` steps, then a cosine down to a hundredth.
        weight_decay: of AdamW, on weights with two dimensions or more.
        clip_norm: the gradient's largest norm.
        dense_share: share of the steps over which :func:`dense_loss` helps, its weight falling from 1 to 0.
        ema_decay: of the average of weights that is evaluated and saved.
        seed: of scenes, initial weights and denoising.
        scene_size: longer side of the scenes in pixels; the reader's resize to ``eval_size`` follows.
        eval_every: steps between looks at mAP, 0 for none; ``eval_scenes``: on how many scenes.
        threads: of PyTorch; 0 leaves it to PyTorch.
    """

    iters: int = 4800
    batch_size: int = 8
    lr: float = 6e-4
    weight_decay: float = 1e-4
    warmup: int = 200
    clip_norm: float = 0.5
    dense_share: float = 0.6
    ema_decay: float = 0.998
    seed: int = 0
    scene_size: int = 256
    eval_every: int = 300
    eval_scenes: int = 60
    threads: int = 0


def build_torch_model(model_yaml: str | os.PathLike[str]) -> tuple[nn.Module, int]:
    """Build, with fresh weights, what a PaddleDetection model YAML describes, and return it with its input size."""
    from transformers import HGNetV2Config, RTDetrConfig, RTDetrForObjectDetection

    spec = yaml.safe_load(Path(model_yaml).read_text(encoding="utf-8"))
    encoder, decoder, arch = spec["HybridEncoder"], spec["RTDETRTransformer"], spec["PPHGNetV2"]["arch"]
    if arch not in _HGNETV2:
        raise UserError(f"{model_yaml}: PPHGNetV2.arch is {arch!r}, expected one of {sorted(_HGNETV2)}")
    hidden, classes, shape = spec["hidden_dim"], spec["num_classes"], _HGNETV2[arch]
    names = {index: CLASS_NAMES[index] if index < len(CLASS_NAMES) else str(index) for index in range(classes)}
    config = RTDetrConfig(
        backbone_config=HGNetV2Config(**shape, out_features=["stage2", "stage3", "stage4"]),
        freeze_backbone_batch_norms=False,
        encoder_hidden_dim=hidden,
        encoder_in_channels=shape["stage_out_channels"][1:],
        encoder_ffn_dim=encoder["encoder_layer"]["dim_feedforward"],
        hidden_expansion=encoder["expansion"],
        d_model=hidden,
        decoder_in_channels=[hidden] * 3,
        decoder_ffn_dim=decoder["dim_feedforward"],
        num_queries=decoder["num_queries"],
        decoder_layers=decoder["num_decoder_layers"],
        num_denoising=decoder["num_denoising"],
        label_noise_ratio=decoder["label_noise_ratio"],
        box_noise_scale=decoder["box_noise_scale"],
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = RTDetrForObjectDetection(config)
    bottlenecks = round(3 * encoder["depth_mult"])
    for block in (*model.model.encoder.fpn_blocks, *model.model.encoder.pan_blocks):
        block.bottlenecks = nn.Sequential(*list(block.bottlenecks)[:bottlenecks])
    _initialize(model)
    height, width = spec["eval_size"]
    if height != width:
        raise UserError(f"{model_yaml}: eval_size is {height} x {width}, expected a square")
    return model, height


def _initialize(model: nn.Module) -> None:
    """Give fresh weights a scale to learn from: transformers' own initial values are meant for fine-tuning."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if "class_embed" in name or "enc_score_head" in name:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.constant_(module.bias, -math.log(99.0))  # a prior probability of 0.01
            elif module.weight.abs().max() > 0:  # zeros are meant: offsets, attention weights, the last box layer
                nn.init.xavier_uniform_(module.weight)


def _pixels(scene: Scene, size: int) -> np.ndarray:
    """Preprocess as the sample's reader does, [3, size, size] float32, RGB, 0 to 1."""
    image = cv2.cvtColor(scene.image, cv2.COLOR_BGR2RGB)
    scale = {"fx": size / image.shape[1], "fy": size / image.shape[0]}
    image = cv2.resize(image, None, interpolation=cv2.INTER_CUBIC, **scale)
    return np.ascontiguousarray((image.astype(np.float32) / 255.0).transpose(2, 0, 1))


class _Scenes(torch.utils.data.IterableDataset):
    """Batches of fresh training scenes without end, starting at step ``first``."""

    def __init__(self, settings: Settings, size: int, first: int) -> None:
        self.settings, self.size, self.first = settings, size, first

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[dict[str, torch.Tensor]]]]:
        cv2.setNumThreads(1)
        step, batch = self.first, self.settings.batch_size
        while True:
            pixels, labels = [], []
            for index in range(step * batch, (step + 1) * batch):
                scene = make_scene("train", self.settings.seed, index, self.settings.scene_size)
                pixels.append(_pixels(scene, self.size))
                height, width = scene.image.shape[:2]
                corners = scene.boxes / np.array([width, height, width, height], np.float32)
                boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
                labels.append({"class_labels": torch.from_numpy(scene.labels), "boxes": torch.from_numpy(boxes)})
            yield torch.from_numpy(np.stack(pixels)), labels
            step += 1


_LEVEL_LIMITS = (0.16, 0.32)
"""A box whose longer side is up to these shares of the image belongs to the first, second or else third level."""


def dense_loss(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    shapes: tuple[tuple[int, int], ...],
) -> torch.Tensor:
    """Score what the encoder proposes at every place, not only at the few that become queries.

    The decoder's losses tell a fresh backbone little, as they reach it through a handful of queries. As in one-stage
    detectors, each place near the centre of a box, on the level that fits its size, is told its class and box.

    Args:
        logits: [N, L, classes], the encoder's class scores; L runs over the places of all levels.
        boxes: [N, L, 4], its boxes, centre and size, before the sigmoid.
        labels: for each image ``class_labels`` [n] and ``boxes`` [n, 4], centre and size in shares of the image.
        shapes: height and width of each level.
    """
    places, levels, steps = [], [], []
    for level, (height, width) in enumerate(shapes):
        rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        places.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        levels.append(torch.full((height * width,), level))
        steps.append(torch.full((height * width,), 1.0 / width))
    place, level, step = torch.cat(places), torch.cat(levels), torch.cat(steps)
    wanted = torch.zeros_like(logits)
    chosen, targets = [], []
    limits = torch.tensor(_LEVEL_LIMITS)
    for number, label in enumerate(labels):
        truth = label["boxes"]
        fits = torch.bucketize(truth[:, 2:].amax(dim=1), limits)[None, :] == level[:, None]
        reach = torch.maximum(truth[None, :, 2:] * 0.2, step[:, None, None] * 0.55)
        near = ((place[:, None] - truth[None, :, :2]).abs() < reach).all(dim=-1) & fits
        area = torch.where(near, truth[:, 2:].prod(dim=1)[None, :], torch.inf)
        smallest, owner = area.min(dim=1)
        positive = torch.isfinite(smallest).nonzero().squeeze(1)
        wanted[number, positive, label["class_labels"][owner[positive]]] = 1.0
        chosen.append(boxes[number, positive].sigmoid())
        targets.append(truth[owner[positive]])
    found, target = torch.cat(chosen), torch.cat(targets)
    count = max(1, len(found))
    scores = logits.sigmoid()
    weight = torch.where(wanted > 0, 0.5 * (1 - scores) ** 2, 0.5 * scores**2).detach()
    class_loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum") / count
    box_loss = (found - target).abs().sum() / count
    low = torch.maximum(found[:, :2] - found[:, 2:] / 2, target[:, :2] - target[:, 2:] / 2)
    high = torch.minimum(found[:, :2] + found[:, 2:] / 2, target[:, :2] + target[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(dim=1)
    union = found[:, 2:].prod(dim=1) + target[:, 2:].prod(dim=1) - shared
    return 2 * class_loss + 5 * box_loss + 2 * (1 - shared / union.clamp(min=1e-6)).sum() / count


@torch.no_grad()
def detect(model: nn.Module, pixels: torch.Tensor, sizes: list[tuple[int, int]], top: int) -> list[np.ndarray]:
    """Return each image's ``top`` detections, [top, 6]: class, score, x1, y1, x2, y2 in pixels of the original."""
    outputs = model(pixel_values=pixels)
    scores = outputs.logits.sigmoid().flatten(1)
    best, index = scores.topk(top, dim=1)
    classes = outputs.logits.shape[-1]
    found = []
    for number, (height, width) in enumerate(sizes):
        centre_x, centre_y, box_width, box_height = outputs.pred_boxes[number, index[number] // classes].unbind(-1)
        corners = torch.stack(
            [
                (centre_x - box_width / 2) * width,
                (centre_y - box_height / 2) * height,
                (centre_x + box_width / 2) * width,
                (centre_y + box_height / 2) * height,
            ],
            dim=1,
        )
        head = torch.stack([(index[number] % classes).float(), best[number]], dim=1)
        found.append(torch.cat([head, corners], dim=1).numpy())
    return found


def evaluate_scenes(model: nn.Module, size: int, scenes: int, seed: int, scene_size: int = 256) -> dict[str, float]:
    """Return ``map`` (0.5:0.95) and ``map50`` on that many scenes of the validation split."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    was_training, top = model.training, model.config.num_queries
    model.eval()
    images, annotations, detections = [], [], []
    for index in range(scenes):
        scene = make_scene("val", seed, index, scene_size)
        height, width = scene.image.shape[:2]
        images.append({"id": index, "height": height, "width": width})
        for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label,
                    "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                }
            )
        pixels = torch.from_numpy(_pixels(scene, size)[None]).contiguous(memory_format=torch.channels_last)
        for label, score, x1, y1, x2, y2 in detect(model, pixels, [(height, width)], top)[0].tolist():
            detections.append(
                {"image_id": index, "category_id": int(label), "score": score, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )
    model.train(was_training)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES)],
        }
        truth.createIndex()
        scores = COCOeval(truth, truth.loadRes(detections), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return {"map": float(scores.stats[0]), "map50": float(scores.stats[1])}


class _Average:
    """An exponential moving average of a model's weights and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = self.decay * (1 - math.exp(-self.steps / 300))
        for name, value in model.state_dict().items():
            kept = self.state[name]
            if kept.dtype.is_floating_point:
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Let the model hold the averaged weights for a while."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)


def _learning_rate(step: int, settings: Settings) -> float:
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.iters - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def train(
    model_yaml: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings,
    resume: bool = False,
) -> dict[str, float]:
    """Train and save the averaged weights with the best mAP as ``.pdparams``.

    Args:
        model_yaml: a model YAML in PaddleDetection's form.
        output: the ``.pdparams`` to write; the state needed to resume is next to it, as ``.state.pt``, until the end.
        settings: how to train.
        resume: go on from that state.

    Returns:
        ``map`` and ``map50`` of the weights saved, on scenes of the validation split that are not in the released
        validation set, and ``seconds``.
    """
    if not str(output).endswith(".pdparams"):
        raise UserError(f"--output is {output}, expected a name that ends in .pdparams")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    model, size = build_torch_model(model_yaml)
    model = model.to(memory_format=torch.channels_last)
    decayed = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
    )
    average = _Average(model, settings.ema_decay)
    best = {"map": -1.0, "map50": -1.0}
    state_file, first = Path(output).with_suffix(".state.pt"), 0
    if resume:
        if not state_file.is_file():
            raise UserError(f"{state_file} is missing, expected the state of an unfinished run: leave out --resume")
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.state, average.steps = state["average"], state["step"]
        first, best = state["step"], state["best"]
    loader = iter(
        torch.utils.data.DataLoader(_Scenes(settings, size, first), batch_size=None, num_workers=1, prefetch_factor=4)
    )
    shapes = tuple((size // stride, size // stride) for stride in (8, 16, 32))
    model.train()
    begun, mean_loss = time.monotonic(), None
    bar = tqdm(
        range(first, settings.iters), initial=first, total=settings.iters, desc="train", unit="step", mininterval=5.0
    )
    for step in bar:
        pixels, labels = next(loader)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        outputs = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last), labels=labels)
        loss, dense_weight = outputs.loss, 1 - step / (settings.dense_share * settings.iters)
        if dense_weight > 0:
            loss = loss + dense_weight * dense_loss(
                outputs.enc_outputs_class, outputs.enc_outputs_coord_logits, labels, shapes
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        average.update(model)
        value = outputs.loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at step {step}: run again with a lower --lr (now {settings.lr})")
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        bar.set_postfix(loss=f"{mean_loss:.2f}", best_mAP=f"{max(best['map'], 0):.3f}", refresh=False)
        done = step + 1
        if done == settings.iters or settings.eval_every and done % settings.eval_every == 0:
            with average.in_place_of(model):
                scores = evaluate_scenes(
                    model, size, settings.eval_scenes, settings.seed + _MONITORED_SEED_OFFSET, settings.scene_size
                )
            tqdm.write(f"step {done}: loss {mean_loss:.3f}, mAP {scores['map']:.4f}, mAP50 {scores['map50']:.4f}")
            if scores["map"] > best["map"]:
                best = scores
                save_pdparams(
                    output, convert_state_dict({name: value.numpy() for name, value in average.state.items()})
                )
            staged = state_file.with_suffix(".partial")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state,
                    "step": done,
                    "best": best,
                },
                staged,
            )
            os.replace(staged, state_file)
    state_file.unlink(missing_ok=True)
    return {**best, "seconds": round(time.monotonic() - begun, 1)}
