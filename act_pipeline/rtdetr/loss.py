"""DINO's loss with the varifocal classification loss that RT-DETR is trained with."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from ppdet.modeling.bbox_utils import bbox_iou
from ppdet.modeling.losses import detr_loss
from ppdet.modeling.transformers import bbox_cxcywh_to_xyxy


def varifocal_loss(logits, iou_target, label, normalizer, alpha: float = 0.75, gamma: float = 2.0):
    """Compute the varifocal loss (Zhang et al., "VarifocalNet", 2021).

    Args:
        logits: [N, Q, classes].
        iou_target: [N, Q, classes], the IoU of a matched box at its class, otherwise 0.
        label: [N, Q, classes], 1 at the class of a matched box, otherwise 0.
        normalizer: the sum of the loss is divided by ``normalizer * Q``.
        alpha: weight of the negative classes.
        gamma: exponent of the predicted score in the weight of the negative classes.

    Returns:
        a scalar.
    """
    negative_weight = alpha * F.sigmoid(logits).detach().pow(gamma) * (1 - label)
    loss = F.binary_cross_entropy_with_logits(logits, iou_target, negative_weight + iou_target, reduction="none")
    return loss.mean(1).sum() / normalizer


class DINOLoss(detr_loss.DETRLoss):
    """Hungarian matching, then class, box and GIoU losses for each decoder layer and for the denoising queries."""

    __shared__ = ["num_classes", "use_focal_loss"]
    __inject__ = ["matcher"]

    def __init__(
        self,
        num_classes=80,
        matcher="HungarianMatcher",
        loss_coeff={"class": 1, "bbox": 5, "giou": 2},  # noqa: B006
        aux_loss=True,
        use_focal_loss=False,
        use_vfl=False,
    ):
        super().__init__(num_classes, matcher, loss_coeff, aux_loss, use_focal_loss)
        self.use_vfl = use_vfl

    def forward(
        self,
        boxes,
        logits,
        gt_bbox,
        gt_class,
        masks=None,
        gt_mask=None,
        postfix="",
        dn_out_bboxes=None,
        dn_out_logits=None,
        dn_meta=None,
        **kwargs,
    ):
        """Return a dict of losses, each a scalar.

        Args:
            boxes: [D, N, Q, 4], cx, cy, w, h in 0..1.
            logits: [D, N, Q, classes].
            gt_bbox, gt_class: lists of [n, 4] and [n, 1], one entry per image.
            masks, gt_mask, postfix, kwargs: unused.
            dn_out_bboxes, dn_out_logits: boxes and logits of the denoising queries; None without any.
            dn_meta: metadata of the denoising queries; None without any.
        """
        num_gts = paddle.clip(paddle.to_tensor([float(sum(len(one) for one in gt_bbox))]), min=1.0)
        if paddle.distributed.get_world_size() > 1:
            paddle.distributed.all_reduce(num_gts)
            num_gts = num_gts / paddle.distributed.get_world_size()
        losses = self._layer_losses(boxes, logits, gt_bbox, gt_class, num_gts, None, "")
        if dn_meta is not None:
            matches = _denoising_matches(gt_class, dn_meta)
            dn_num_gts = num_gts * dn_meta["dn_num_group"]
            losses.update(
                self._layer_losses(dn_out_bboxes, dn_out_logits, gt_bbox, gt_class, dn_num_gts, matches, "_dn")
            )
        return losses

    def _layer_losses(self, boxes, logits, gt_bbox, gt_class, num_gts, matches, postfix):
        last = len(boxes) - 1
        losses: dict[str, paddle.Tensor] = {}
        for layer in range(len(boxes)):
            if layer != last and not self.aux_loss:
                continue
            name = postfix if layer == last else f"_aux{postfix}"
            matched = matches or self.matcher(boxes[layer].detach(), logits[layer].detach(), gt_bbox, gt_class)
            parts = self._get_loss_bbox(boxes[layer], gt_bbox, matched, num_gts)
            parts["loss_class"] = self._class_loss(boxes[layer], logits[layer], gt_bbox, gt_class, matched, num_gts)
            for part, value in parts.items():
                key = part + name
                losses[key] = losses[key] + value if key in losses else value
        return losses

    def _class_loss(self, boxes, logits, gt_bbox, gt_class, matches, num_gts):
        if not self.use_vfl:
            return self._get_loss_class(logits, gt_class, matches, self.num_classes, num_gts)["loss_class"]
        count, queries = logits.shape[:2]
        label = paddle.full([count * queries], self.num_classes, dtype="int64")
        iou = paddle.zeros([count * queries])
        if sum(len(one) for one in gt_class) > 0:
            index, classes = self._get_index_updates(queries, gt_class, matches)
            predicted, target = self._get_src_target_assign(boxes.detach(), gt_bbox, matches)
            overlap = bbox_iou(bbox_cxcywh_to_xyxy(predicted).split(4, -1), bbox_cxcywh_to_xyxy(target).split(4, -1))
            label = paddle.scatter(label, index, classes.flatten().astype("int64"))
            iou = paddle.scatter(iou, index, overlap.flatten())
        one_hot = F.one_hot(label.reshape([count, queries]), self.num_classes + 1)[..., :-1]
        target_score = iou.reshape([count, queries, 1]) * one_hot
        return self.loss_coeff["class"] * varifocal_loss(logits, target_score, one_hot, num_gts / queries)


def _denoising_matches(gt_class, dn_meta):
    """Return, for each image, the matches of the positive denoising queries with the boxes they were made from."""
    matches = []
    for classes, positive in zip(gt_class, dn_meta["dn_positive_idx"]):
        source = paddle.arange(len(classes), dtype="int64").tile([dn_meta["dn_num_group"]])
        matches.append((positive, source) if len(classes) else (paddle.zeros([0], "int64"),) * 2)
    return matches
