"""DETR with a neck, and the post-processing that outputs boxes in pixels of the original image."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from ppdet.core.workspace import create
from ppdet.modeling.architectures.meta_arch import BaseArch
from ppdet.modeling.transformers import bbox_cxcywh_to_xyxy

from act_pipeline.rtdetr.fit import require_count

BBOX_DECODE_TYPES = ("origin", "pad")


class DETR(BaseArch):
    """Backbone, optional neck, transformer, head and post-processing (PaddleDetection's `DETR`)."""

    __category__ = "architecture"
    __inject__ = ["post_process"]
    __shared__ = ["exclude_post_process"]

    def __init__(
        self,
        backbone,
        transformer="DETRTransformer",
        detr_head="DETRHead",
        neck=None,
        post_process="DETRPostProcess",
        exclude_post_process=False,
    ):
        super().__init__()
        self.backbone = backbone
        self.transformer = transformer
        self.detr_head = detr_head
        self.neck = neck
        self.post_process = post_process
        self.exclude_post_process = exclude_post_process

    @classmethod
    def from_config(cls, cfg, *args, **kwargs):
        backbone = create(cfg["backbone"])
        shape = backbone.out_shape
        neck = create(cfg["neck"], input_shape=shape) if cfg["neck"] else None
        if neck is not None:
            shape = neck.out_shape
        transformer = create(cfg["transformer"], input_shape=shape)
        head = create(cfg["detr_head"], hidden_dim=transformer.hidden_dim, nhead=transformer.nhead, input_shape=shape)
        return {"backbone": backbone, "neck": neck, "transformer": transformer, "detr_head": head}

    def _forward(self):
        feats = self.backbone(self.inputs)
        if self.neck is not None:
            feats = self.neck(feats)
        pad_mask = self.inputs.get("pad_mask") if self.training else None
        decoded = self.transformer(feats, pad_mask, self.inputs)
        if self.training:
            return self.detr_head(decoded, feats, self.inputs)
        predictions = self.detr_head(decoded, feats)
        if self.exclude_post_process:
            boxes, logits, _ = predictions
            return boxes, logits
        padded_shape = [int(side) for side in self.inputs["image"].shape[2:]]
        return self.post_process(predictions, self.inputs["im_shape"], self.inputs["scale_factor"], padded_shape)

    def get_loss(self):
        losses = self._forward()
        losses["loss"] = paddle.add_n([value for name, value in losses.items() if "log" not in name])
        return losses

    def get_pred(self):
        bbox, bbox_num = self._forward()
        return {"bbox": bbox, "bbox_num": bbox_num}


class DETRPostProcess:
    """Selection of the ``num_top_queries`` best (query, class) pairs of every image; no NMS is needed."""

    __shared__ = ["num_classes", "use_focal_loss", "with_mask"]

    def __init__(
        self,
        num_classes=80,
        num_top_queries=100,
        dual_queries=False,
        dual_groups=0,
        use_focal_loss=False,
        with_mask=False,
        mask_threshold=0.5,
        use_avg_mask_score=False,
        bbox_decode_type="origin",
    ):
        """Take PaddleDetection's arguments.

        Args:
            num_classes: number of classes of the logits.
            num_top_queries: boxes per image.
            dual_queries: whether the queries consist of ``dual_groups`` + 1 groups, of which only the first detects.
            dual_groups: number of additional groups.
            use_focal_loss: must be True, as RT-DETR is trained.
            with_mask: must be False; ``mask_threshold`` and ``use_avg_mask_score`` are therefore unused.
            bbox_decode_type: ``origin``: boxes are relative to the image; ``pad``: relative to the canvas, to which the
                image was padded at the right and the bottom.

        Raises:
            ValueError: an argument is invalid.
        """
        if not use_focal_loss:
            raise ValueError("DETRPostProcess.use_focal_loss is False, expected True, as RT-DETR is trained")
        if with_mask:
            raise ValueError("DETRPostProcess.with_mask is True: masks are not supported, only boxes; set it to False")
        if bbox_decode_type not in BBOX_DECODE_TYPES:
            raise ValueError(
                f"DETRPostProcess.bbox_decode_type is {bbox_decode_type!r}, expected {' or '.join(BBOX_DECODE_TYPES)}"
            )
        self.bbox_decode_type = bbox_decode_type
        self.num_classes = num_classes
        self.num_top_queries = require_count("DETRPostProcess.num_top_queries", num_top_queries)
        self.dual_queries = dual_queries
        self.dual_groups = require_count("DETRPostProcess.dual_groups", dual_groups, least=0)

    def __call__(self, predictions, im_shape, scale_factor, padded_shape):
        """Decode the predictions.

        Args:
            predictions: boxes [N, Q, 4] (cx, cy, w, h in 0..1), logits [N, Q, classes], and an unused third element.
            im_shape: [N, 2], height and width of the resized image in pixels, without padding.
            scale_factor: [N, 2], resized size / original size, y then x.
            padded_shape: height and width of the network's input in pixels.

        Returns:
            ``bbox`` [N * num_top_queries, 6]: class, score, x1, y1, x2, y2 in pixels of the original image, and
            ``bbox_num`` int32 [N].
        """
        boxes, logits, _ = predictions
        if self.dual_queries:
            queries = logits.shape[1] // (self.dual_groups + 1)
            boxes, logits = boxes[:, :queries], logits[:, :queries]
        scores, flat = paddle.topk(F.sigmoid(logits).flatten(1), self.num_top_queries, axis=-1)
        labels = flat % self.num_classes
        query = flat // self.num_classes
        batch_size = paddle.shape(boxes)[0]
        batch = paddle.arange(batch_size, dtype=query.dtype).unsqueeze(-1).tile([1, self.num_top_queries])
        boxes = paddle.gather_nd(bbox_cxcywh_to_xyxy(boxes), paddle.stack([batch, query], axis=-1))

        shape = paddle.floor(im_shape / scale_factor + 0.5)
        if self.bbox_decode_type == "pad":
            shape = paddle.to_tensor(padded_shape, dtype="float32") / im_shape * shape
        height, width = paddle.split(shape, 2, axis=-1)
        boxes = boxes * paddle.concat([width, height, width, height], axis=-1).unsqueeze(1)
        bbox = paddle.concat([labels.unsqueeze(-1).astype("float32"), scores.unsqueeze(-1), boxes], axis=-1)
        bbox_num = paddle.full([1], self.num_top_queries, dtype="int32").tile([batch_size])
        return bbox.reshape([-1, 6]), bbox_num
