"""The decoder: queries selected from the encoder's output and refined by layers with deformable attention."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdet.modeling.heads.detr_head import MLP
from ppdet.modeling.initializer import bias_init_with_prob, constant_, linear_init_, normal_, xavier_uniform_
from ppdet.modeling.transformers.deformable_transformer import MSDeformableAttention
from ppdet.modeling.transformers.dino_transformer import DINOTransformerDecoderLayer
from ppdet.modeling.transformers.utils import (
    _get_clones,
    get_contrastive_denoising_training_group,
)

from act_pipeline.rtdetr.fit import require_count
from act_pipeline.rtdetr.layers import batch_norm

_INVERSE_SIGMOID_EPS = 1e-5


def inverse_sigmoid(x: paddle.Tensor) -> paddle.Tensor:
    """Return log(x / (1 - x)) of ``x``, any shape, with both clipped to at least 1e-5.

    As PaddleDetection's RT-DETR and ``transformers`` have it. `ppdet` 2.6.0's adds 1e-6 instead, which moves the logits
    of a model with six decoder layers by up to 3e-4.
    """
    x = x.clip(min=0.0, max=1.0)
    return paddle.log(x.clip(min=_INVERSE_SIGMOID_EPS) / (1 - x).clip(min=_INVERSE_SIGMOID_EPS))


class StaticShapeDeformableAttention(MSDeformableAttention):
    """`ppdet`'s multi-scale deformable attention (Zhu et al., 2020) with integer spatial shapes.

    The parameters are those of the parent class. Shapes that are integers when the graph is traced become constants,
    which inference engines need; only the batch size stays dynamic.
    """

    def forward(
        self, query, reference_points, value, value_spatial_shapes, value_level_start_index=None, value_mask=None
    ):
        """Compute the attention.

        Args:
            query: [N, Q, C].
            reference_points: [N, Q, 1, 4], cx, cy, w, h in 0..1.
            value: [N, sum(H_l * W_l), C].
            value_spatial_shapes: (H_l, W_l) of every level.
            value_level_start_index, value_mask: unused.

        Returns:
            [N, Q, C].
        """
        queries = query.shape[1]
        value = self.value_proj(value).reshape([0, 0, self.num_heads, self.head_dim])
        offsets = self.sampling_offsets(query).reshape([0, 0, self.num_heads, self.num_levels, self.num_points, 2])
        weights = F.softmax(
            self.attention_weights(query).reshape([0, 0, self.num_heads, self.num_levels * self.num_points])
        )
        center = reference_points[:, :, None, :, None, :2]
        size = reference_points[:, :, None, :, None, 2:]
        grid = 2 * (center + offsets / self.num_points * size * 0.5) - 1

        sampled = []
        per_level = value.split([height * width for height, width in value_spatial_shapes], axis=1)
        for level, (height, width) in enumerate(value_spatial_shapes):
            feature = per_level[level].transpose([0, 2, 3, 1]).reshape([-1, self.head_dim, height, width])
            points = grid[:, :, :, level].transpose([0, 2, 1, 3, 4]).reshape([-1, queries, self.num_points, 2])
            sampled.append(F.grid_sample(feature, points, mode="bilinear", padding_mode="zeros", align_corners=False))
        weights = weights.transpose([0, 2, 1, 3]).reshape([-1, 1, queries, self.num_levels * self.num_points])
        output = (paddle.concat(sampled, axis=-1) * weights).sum(-1)
        output = output.reshape([-1, self.embed_dim, queries]).transpose([0, 2, 1])
        return self.output_proj(output)


class _DecoderLayer(DINOTransformerDecoderLayer):
    """DINO's decoder layer with :class:`StaticShapeDeformableAttention`."""

    def __init__(self, d_model, n_head, dim_feedforward, dropout, activation, n_levels, n_points):
        super().__init__(d_model, n_head, dim_feedforward, dropout, activation, n_levels, n_points)
        self.cross_attn = StaticShapeDeformableAttention(d_model, n_head, n_levels, n_points, 1.0)


class _Decoder(nn.Layer):
    """A chain of decoder layers; in inference it ends at layer ``eval_idx``."""

    def __init__(self, layer: nn.Layer, num_layers: int, eval_idx: int):
        super().__init__()
        self.layers = _get_clones(layer, num_layers)
        self.eval_idx = eval_idx if eval_idx >= 0 else num_layers + eval_idx

    def forward(self, queries, boxes_unact, memory, shapes, bbox_head, score_head, query_pos_head, attn_mask=None):
        """Refine ``queries`` [N, Q, C] and ``boxes_unact`` [N, Q, 4] (before the sigmoid) with ``memory`` [N, L, C].

        Returns:
            boxes [D, N, Q, 4] (cx, cy, w, h in 0..1) and logits [D, N, Q, classes]: of every layer in training, of the
            last one in inference (D = 1).
        """
        boxes, logits = [], []
        reference = F.sigmoid(boxes_unact)
        previous = None
        for index, layer in enumerate(self.layers):
            queries = layer(
                queries, reference.unsqueeze(2), memory, shapes, None, attn_mask, None, query_pos_head(reference)
            )
            delta = bbox_head[index](queries)
            refined = F.sigmoid(delta + inverse_sigmoid(reference))
            if self.training:
                logits.append(score_head[index](queries))
                # "Look forward twice" (DINO): the gradient also flows through the previous layer's box.
                boxes.append(refined if previous is None else F.sigmoid(delta + inverse_sigmoid(previous)))
            elif index == self.eval_idx:
                return paddle.stack([refined]), paddle.stack([score_head[index](queries)])
            previous = refined
            reference = refined.detach() if self.training else refined
        return paddle.stack(boxes), paddle.stack(logits)


class RTDETRTransformer(nn.Layer):
    """Query selection, denoising queries and the decoder, with the heads of every layer.

    The arguments are PaddleDetection's. ``backbone_feat_channels`` and ``feat_strides`` describe the encoder's levels,
    fine to coarse. ``eval_idx`` is the decoder layer whose output is used in inference (-1: the last). ``eval_size`` is
    ``[height, width]`` of the input in pixels if it is fixed.
    """

    __shared__ = ["num_classes", "hidden_dim", "eval_size"]

    def __init__(
        self,
        num_classes=80,
        hidden_dim=256,
        num_queries=300,
        position_embed_type="sine",
        backbone_feat_channels=[512, 1024, 2048],  # noqa: B006
        feat_strides=[8, 16, 32],  # noqa: B006
        num_levels=3,
        num_decoder_points=4,
        nhead=8,
        num_decoder_layers=6,
        dim_feedforward=1024,
        dropout=0.0,
        activation="relu",
        num_denoising=100,
        label_noise_ratio=0.5,
        box_noise_scale=1.0,
        learnt_init_query=True,
        query_pos_head_inv_sig=False,
        eval_size=None,
        eval_idx=-1,
        eps=1e-2,
    ):
        super().__init__()
        if len(backbone_feat_channels) != num_levels:
            raise ValueError(
                f"RTDETRTransformer.num_levels is {num_levels}, the encoder gives {len(backbone_feat_channels)} levels"
            )
        if position_embed_type not in ("sine", "learned"):
            raise ValueError(f"RTDETRTransformer.position_embed_type is {position_embed_type!r}, expected 'sine'")
        if query_pos_head_inv_sig:
            raise ValueError("RTDETRTransformer.query_pos_head_inv_sig is not part of RT-DETR's official configs")
        self.hidden_dim = hidden_dim
        self.nhead = nhead
        self.feat_strides = list(feat_strides)
        self.num_levels = num_levels
        self.num_classes = num_classes
        self.num_queries = require_count("RTDETRTransformer.num_queries", num_queries)
        self.eps = eps
        self.num_decoder_layers = require_count("RTDETRTransformer.num_decoder_layers", num_decoder_layers)
        if not -num_decoder_layers <= eval_idx < num_decoder_layers:
            raise ValueError(f"RTDETRTransformer.eval_idx is {eval_idx}, there are {num_decoder_layers} decoder layers")
        self.eval_size = eval_size

        self.input_proj = nn.LayerList(
            [
                nn.Sequential(
                    ("conv", nn.Conv2D(channels, hidden_dim, kernel_size=1, bias_attr=False)),
                    ("norm", batch_norm(hidden_dim)),
                )
                for channels in backbone_feat_channels
            ]
        )
        layer = _DecoderLayer(hidden_dim, nhead, dim_feedforward, dropout, activation, num_levels, num_decoder_points)
        self.decoder = _Decoder(layer, num_decoder_layers, eval_idx)

        self.denoising_class_embed = nn.Embedding(
            num_classes, hidden_dim, weight_attr=paddle.ParamAttr(initializer=nn.initializer.Normal())
        )
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale

        self.learnt_init_query = learnt_init_query
        if learnt_init_query:
            self.tgt_embed = nn.Embedding(num_queries, hidden_dim)
        self.query_pos_head = MLP(4, 2 * hidden_dim, hidden_dim, num_layers=2)

        self.enc_output = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim))
        self.enc_score_head = nn.Linear(hidden_dim, num_classes)
        self.enc_bbox_head = MLP(hidden_dim, hidden_dim, 4, num_layers=3)
        self.dec_score_head = nn.LayerList([nn.Linear(hidden_dim, num_classes) for _ in range(num_decoder_layers)])
        self.dec_bbox_head = nn.LayerList(
            [MLP(hidden_dim, hidden_dim, 4, num_layers=3) for _ in range(num_decoder_layers)]
        )
        self._reset_parameters()

        if eval_size:
            anchors, valid = self._anchors(self._eval_shapes())
            # Not persistable, since the official weights do not contain them.
            self.register_buffer("anchors", anchors, persistable=False)
            self.register_buffer("valid_anchors", valid, persistable=False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            "backbone_feat_channels": [shape.channels for shape in input_shape],
            "feat_strides": [shape.stride for shape in input_shape],
        }

    def _reset_parameters(self) -> None:
        class_bias = bias_init_with_prob(0.01)
        linear_init_(self.enc_score_head)
        constant_(self.enc_score_head.bias, class_bias)
        for score_head in self.dec_score_head:
            linear_init_(score_head)
            constant_(score_head.bias, class_bias)
        for bbox_head in [self.enc_bbox_head, *self.dec_bbox_head]:
            constant_(bbox_head.layers[-1].weight)
            constant_(bbox_head.layers[-1].bias)
        linear_init_(self.enc_output[0])
        xavier_uniform_(self.enc_output[0].weight)
        if self.learnt_init_query:
            xavier_uniform_(self.tgt_embed.weight)
        for layer in self.query_pos_head.layers:
            xavier_uniform_(layer.weight)
        for projection in self.input_proj:
            xavier_uniform_(projection[0].weight)
        normal_(self.denoising_class_embed.weight)

    def _eval_shapes(self) -> list[tuple[int, int]]:
        return [(self.eval_size[0] // stride, self.eval_size[1] // stride) for stride in self.feat_strides]

    def _anchors(
        self, shapes: Sequence[tuple[int, int]], grid_size: float = 0.05
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return one anchor per position, before the sigmoid [1, L, 4], and its validity, 1 or 0 [1, L, 1].

        Anchors closer than ``eps`` to an edge are invalid: their values are infinite, and their features are masked.
        """
        anchors = []
        for level, (height, width) in enumerate(shapes):
            y, x = paddle.meshgrid(paddle.arange(height, dtype="float32"), paddle.arange(width, dtype="float32"))
            center = (paddle.stack([x, y], axis=-1) + 0.5) / paddle.to_tensor([width, height], dtype="float32")
            size = paddle.ones_like(center) * grid_size * 2.0**level
            anchors.append(paddle.concat([center, size], axis=-1).reshape([1, height * width, 4]))
        anchors = paddle.concat(anchors, axis=1)
        valid = paddle.logical_and(anchors > self.eps, anchors < 1 - self.eps).all(-1, keepdim=True)
        unact = paddle.log(anchors / (1 - anchors))
        return paddle.where(valid, unact, paddle.full_like(unact, float("inf"))), valid.astype("float32")

    def forward(self, feats: Sequence[paddle.Tensor], pad_mask=None, gt_meta=None):
        """Predict boxes and class logits.

        Args:
            feats: the encoder's levels [N, C, H_l, W_l], fine to coarse.
            pad_mask: unused.
            gt_meta: in training, ``gt_class`` (a list of [n, 1]) and ``gt_bbox`` (a list of [n, 4], cx, cy, w, h in
                0..1), from which denoising queries are made.

        Returns:
            boxes [D, N, Q, 4], logits [D, N, Q, classes], boxes [N, Q, 4] and logits [N, Q, classes] of the selected
            queries, and the metadata of the denoising queries for the loss (None in inference).
        """
        projected = [projection(feat) for projection, feat in zip(self.input_proj, feats)]
        if self.training or not self.eval_size:
            shapes = [tuple(feat.shape[2:]) for feat in projected]
            anchors, valid = self._anchors(shapes)
        else:
            shapes = self._eval_shapes()
            anchors, valid = self.anchors, self.valid_anchors
        memory = paddle.concat([feat.flatten(2).transpose([0, 2, 1]) for feat in projected], axis=1)

        denoising = (None, None, None, None)
        if self.training:
            denoising = get_contrastive_denoising_training_group(
                gt_meta,
                self.num_classes,
                self.num_queries,
                self.denoising_class_embed.weight,
                self.num_denoising,
                self.label_noise_ratio,
                self.box_noise_scale,
            )
        denoising_queries, denoising_boxes_unact, attn_mask, dn_meta = denoising

        queries, boxes_unact, top_boxes, top_logits = self._select_queries(memory, anchors, valid)
        if denoising_queries is not None:
            queries = paddle.concat([denoising_queries, queries], axis=1)
            boxes_unact = paddle.concat([denoising_boxes_unact, boxes_unact], axis=1)
        boxes, logits = self.decoder(
            queries,
            boxes_unact.detach(),
            memory,
            shapes,
            self.dec_bbox_head,
            self.dec_score_head,
            self.query_pos_head,
            attn_mask,
        )
        return boxes, logits, top_boxes, top_logits, dn_meta

    def _select_queries(self, memory, anchors, valid):
        """Select the ``num_queries`` positions with the highest class scores."""
        output_memory = self.enc_output(memory * valid)
        class_logits = self.enc_score_head(output_memory)
        boxes_unact = self.enc_bbox_head(output_memory) + anchors
        _, top = paddle.topk(class_logits.max(-1), self.num_queries, axis=1)
        batch = paddle.arange(paddle.shape(memory)[0], dtype=top.dtype).unsqueeze(-1).tile([1, self.num_queries])
        index = paddle.stack([batch, top], axis=-1)
        top_boxes_unact = paddle.gather_nd(boxes_unact, index)
        top_logits = paddle.gather_nd(class_logits, index)
        if self.learnt_init_query:
            queries = self.tgt_embed.weight.unsqueeze(0).tile([paddle.shape(memory)[0], 1, 1])
        else:
            queries = paddle.gather_nd(output_memory, index)
            queries = queries.detach() if self.training else queries
        return queries, top_boxes_unact, F.sigmoid(top_boxes_unact), top_logits
