"""The efficient hybrid encoder: attention within the coarsest level, convolutions across the levels."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdet.modeling.backbones.csp_darknet import BaseConv
from ppdet.modeling.backbones.cspresnet import RepVggBlock
from ppdet.modeling.ops import get_act_fn
from ppdet.modeling.shape_spec import ShapeSpec
from ppdet.modeling.transformers import detr_transformer

from act_pipeline.rtdetr.layers import batch_norm

_POSITION_TEMPERATURE = 10000.0


class TransformerLayer(detr_transformer.TransformerEncoderLayer):
    """`ppdet`'s DETR encoder layer under the name used in RT-DETR's configs."""

    def __init__(
        self,
        d_model,
        nhead,
        dim_feedforward=1024,
        dropout=0.1,
        activation="relu",
        attn_dropout=None,
        act_dropout=None,
        normalize_before=False,
    ):
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, attn_dropout, act_dropout, normalize_before
        )


class _CSPRepLayer(nn.Layer):
    """A cross-stage-partial layer of RepVGG blocks: ``[N, in, H, W] -> [N, out, H, W]``."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, expansion: float, act):
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1 = BaseConv(in_channels, hidden, ksize=1, stride=1)
        self.conv2 = BaseConv(in_channels, hidden, ksize=1, stride=1)
        self.bottlenecks = nn.Sequential(*[RepVggBlock(hidden, hidden, act=act) for _ in range(blocks)])
        self.conv3 = BaseConv(hidden, out_channels, ksize=1, stride=1) if hidden != out_channels else nn.Identity()

    def forward(self, x):
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


def sine_position_embedding(width: int, height: int, channels: int) -> paddle.Tensor:
    """Return sine and cosine of x, then of y, over ``channels / 4`` frequencies, [1, width * height, channels].

    Token ``t`` has the position ``(x, y) = (t // height, t % height)``. The features are flattened by rows, so x and y
    are swapped for them. The official weights were trained this way.

    Args:
        width, height: size of the feature map.
        channels: a multiple of 4.
    """
    quarter = channels // 4
    frequencies = 1.0 / _POSITION_TEMPERATURE ** (paddle.arange(quarter, dtype="float32") / quarter)
    x, y = paddle.meshgrid(paddle.arange(width, dtype="float32"), paddle.arange(height, dtype="float32"))
    angle_x = x.flatten().unsqueeze(1) * frequencies
    angle_y = y.flatten().unsqueeze(1) * frequencies
    return paddle.concat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], axis=1).unsqueeze(0)


class HybridEncoder(nn.Layer):
    """Attention on the levels in ``use_encoder_idx``, then a top-down (FPN) and a bottom-up (PAN) path.

    Args:
        in_channels: channels of the backbone's levels, fine to coarse.
        feat_strides: their strides in pixels.
        hidden_dim: channels of every output level.
        use_encoder_idx: indices of the levels with attention.
        num_encoder_layers: attention layers per level.
        encoder_layer: the attention layer, a `TransformerLayer`.
        pe_temperature: must be 10000.
        expansion: width of the CSP layers relative to ``hidden_dim``.
        depth_mult: number of RepVGG blocks of a CSP layer relative to three.
        act: activation of the RepVGG blocks.
        trt: express the activation in ops that TensorRT supports.
        eval_size: ``[height, width]`` of the input in pixels if it is fixed; the position embedding is then a constant
            of the graph.
    """

    __shared__ = ["depth_mult", "act", "trt", "eval_size"]
    __inject__ = ["encoder_layer"]

    def __init__(
        self,
        in_channels=[512, 1024, 2048],  # noqa: B006
        feat_strides=[8, 16, 32],  # noqa: B006
        hidden_dim=256,
        use_encoder_idx=[2],  # noqa: B006
        num_encoder_layers=1,
        encoder_layer="TransformerLayer",
        pe_temperature=10000,
        expansion=1.0,
        depth_mult=1.0,
        act="silu",
        trt=False,
        eval_size=None,
    ):
        super().__init__()
        if pe_temperature != _POSITION_TEMPERATURE:
            raise ValueError(f"HybridEncoder.pe_temperature is {pe_temperature}, expected {_POSITION_TEMPERATURE:.0f}")
        self.in_channels = in_channels
        self.feat_strides = feat_strides
        self.hidden_dim = hidden_dim
        self.use_encoder_idx = use_encoder_idx
        self.num_encoder_layers = num_encoder_layers
        self.eval_size = eval_size

        self.input_proj = nn.LayerList(
            [
                nn.Sequential(
                    nn.Conv2D(channels, hidden_dim, kernel_size=1, bias_attr=False),
                    batch_norm(hidden_dim),
                )
                for channels in in_channels
            ]
        )
        self.encoder = nn.LayerList(
            [detr_transformer.TransformerEncoder(encoder_layer, num_encoder_layers) for _ in use_encoder_idx]
        )
        act_fn = get_act_fn(act, trt=trt)
        blocks = round(3 * depth_mult)
        steps = len(in_channels) - 1
        self.lateral_convs = nn.LayerList([BaseConv(hidden_dim, hidden_dim, 1, 1) for _ in range(steps)])
        self.fpn_blocks = nn.LayerList(
            [_CSPRepLayer(hidden_dim * 2, hidden_dim, blocks, expansion, act_fn) for _ in range(steps)]
        )
        self.downsample_convs = nn.LayerList([BaseConv(hidden_dim, hidden_dim, 3, 2) for _ in range(steps)])
        self.pan_blocks = nn.LayerList(
            [_CSPRepLayer(hidden_dim * 2, hidden_dim, blocks, expansion, act_fn) for _ in range(steps)]
        )
        if eval_size:
            for level in use_encoder_idx:
                height, width = (size // feat_strides[level] for size in eval_size)
                position = sine_position_embedding(width, height, hidden_dim)
                # Not persistable, since the official weights do not contain it.
                self.register_buffer(f"position_{level}", position, persistable=False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            "in_channels": [shape.channels for shape in input_shape],
            "feat_strides": [shape.stride for shape in input_shape],
        }

    @property
    def out_shape(self) -> list[ShapeSpec]:
        return [ShapeSpec(channels=self.hidden_dim, stride=stride) for stride in self.feat_strides]

    def forward(self, feats: Sequence[paddle.Tensor], for_mot: bool = False, is_teacher: bool = False):
        """Fuse the levels of the backbone.

        Args:
            feats: a list of [N, C_l, H / stride_l, W / stride_l], fine to coarse.
            for_mot, is_teacher: unused.

        Returns:
            a list of [N, hidden_dim, H / stride_l, W / stride_l], fine to coarse.
        """
        levels = [projection(feat) for projection, feat in zip(self.input_proj, feats)]
        for encoder, level in zip(self.encoder, self.use_encoder_idx):
            levels[level] = self._attend(encoder, level, levels[level])

        top_down = [levels[-1]]
        for step, low in enumerate(reversed(levels[:-1])):
            high = self.lateral_convs[step](top_down[0])
            top_down[0] = high
            upsampled = F.interpolate(high, scale_factor=2.0, mode="nearest")
            top_down.insert(0, self.fpn_blocks[step](paddle.concat([upsampled, low], axis=1)))

        outputs = [top_down[0]]
        for step, high in enumerate(top_down[1:]):
            downsampled = self.downsample_convs[step](outputs[-1])
            outputs.append(self.pan_blocks[step](paddle.concat([downsampled, high], axis=1)))
        return outputs

    def _attend(self, encoder: nn.Layer, level: int, feature: paddle.Tensor) -> paddle.Tensor:
        if self.training or not self.eval_size:
            height, width = feature.shape[2:]
            position = sine_position_embedding(width, height, self.hidden_dim)
        else:
            height, width = (size // self.feat_strides[level] for size in self.eval_size)
            position = getattr(self, f"position_{level}")
        memory = encoder(feature.flatten(2).transpose([0, 2, 1]), pos_embed=position)
        return memory.transpose([0, 2, 1]).reshape([-1, self.hidden_dim, height, width])
