"""The backbones of RT-DETR: PP-HGNetV2, and `ppdet`'s ResNet with ``freeze_stem_only``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdet.core.workspace import serializable
from ppdet.modeling.backbones import resnet as ppdet_resnet
from ppdet.modeling.shape_spec import ShapeSpec

from act_pipeline.rtdetr.layers import batch_norm


@dataclass(frozen=True)
class _Stage:
    """One row of PP-HGNetV2's architecture table."""

    in_channels: int
    mid_channels: int
    out_channels: int
    blocks: int
    downsample: bool
    light: bool
    kernel_size: int
    layers: int


@dataclass(frozen=True)
class Architecture:
    """Widths of the stem, and the four stages of one PP-HGNetV2."""

    stem: tuple[int, int, int]
    stages: tuple[_Stage, ...]


ARCHITECTURES = {
    "S": Architecture(
        (3, 24, 32),
        (
            _Stage(32, 32, 64, 1, False, False, 3, 3),
            _Stage(64, 48, 256, 1, True, False, 3, 3),
            _Stage(256, 96, 512, 2, True, True, 5, 3),
            _Stage(512, 192, 1024, 1, True, True, 5, 3),
        ),
    ),
    "L": Architecture(
        (3, 32, 48),
        (
            _Stage(48, 48, 128, 1, False, False, 3, 6),
            _Stage(128, 96, 512, 1, True, False, 3, 6),
            _Stage(512, 192, 1024, 3, True, True, 5, 6),
            _Stage(1024, 384, 2048, 1, True, True, 5, 6),
        ),
    ),
    "X": Architecture(
        (3, 32, 64),
        (
            _Stage(64, 64, 128, 1, False, False, 3, 6),
            _Stage(128, 128, 512, 2, True, False, 3, 6),
            _Stage(512, 256, 1024, 5, True, True, 5, 6),
            _Stage(1024, 512, 2048, 2, True, True, 5, 6),
        ),
    ),
}


class _ConvBNAct(nn.Layer):
    """Convolution, BatchNorm and an optional ReLU: ``[N, C, H, W] -> [N, C', H', W']``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        same_padding: bool = False,
        lr_mult: float = 1.0,
    ):
        super().__init__()
        # An even kernel pads one side only; Paddle's "SAME" puts the extra row and column at the end.
        padding = "SAME" if same_padding else (kernel_size - 1) // 2
        self.conv = nn.Conv2D(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups=groups,
            bias_attr=False,
            weight_attr=paddle.ParamAttr(learning_rate=lr_mult),
        )
        self.bn = batch_norm(out_channels, lr_mult)
        self.act = act

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x) if self.act else x


class _LightConvBNAct(nn.Layer):
    """A pointwise convolution followed by a depthwise one; only the second has an activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, lr_mult: float):
        super().__init__()
        self.conv1 = _ConvBNAct(in_channels, out_channels, 1, act=False, lr_mult=lr_mult)
        self.conv2 = _ConvBNAct(out_channels, out_channels, kernel_size, groups=out_channels, lr_mult=lr_mult)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class _Stem(nn.Layer):
    """Stem with a convolution and a pooling branch that are concatenated: ``[N, 3, H, W] -> [N, C, H/4, W/4]``."""

    def __init__(self, channels: Sequence[int], lr_mult: float):
        super().__init__()
        in_channels, mid, out = channels
        self.stem1 = _ConvBNAct(in_channels, mid, 3, stride=2, lr_mult=lr_mult)
        self.stem2a = _ConvBNAct(mid, mid // 2, 2, same_padding=True, lr_mult=lr_mult)
        self.stem2b = _ConvBNAct(mid // 2, mid, 2, same_padding=True, lr_mult=lr_mult)
        self.stem3 = _ConvBNAct(mid * 2, mid, 3, stride=2, lr_mult=lr_mult)
        self.stem4 = _ConvBNAct(mid, out, 1, lr_mult=lr_mult)
        self.pool = nn.MaxPool2D(kernel_size=2, stride=1, ceil_mode=True, padding="SAME")

    def forward(self, x):
        x = self.stem1(x)
        convolved = self.stem2b(self.stem2a(x))
        return self.stem4(self.stem3(paddle.concat([self.pool(x), convolved], axis=1)))


class _Block(nn.Layer):
    """HG block: a chain of convolutions whose input and outputs are all concatenated and squeezed."""

    def __init__(self, in_channels: int, stage: _Stage, residual: bool, lr_mult: float):
        super().__init__()
        self.residual = residual
        self.layers = nn.LayerList()
        for index in range(stage.layers):
            source = in_channels if index == 0 else stage.mid_channels
            if stage.light:
                layer = _LightConvBNAct(source, stage.mid_channels, stage.kernel_size, lr_mult)
            else:
                layer = _ConvBNAct(source, stage.mid_channels, stage.kernel_size, lr_mult=lr_mult)
            self.layers.append(layer)
        joined = in_channels + stage.layers * stage.mid_channels
        self.aggregation_squeeze_conv = _ConvBNAct(joined, stage.out_channels // 2, 1, lr_mult=lr_mult)
        self.aggregation_excitation_conv = _ConvBNAct(stage.out_channels // 2, stage.out_channels, 1, lr_mult=lr_mult)

    def forward(self, x):
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y = self.aggregation_excitation_conv(self.aggregation_squeeze_conv(paddle.concat(outputs, axis=1)))
        return y + x if self.residual else y


class _StageLayer(nn.Layer):
    def __init__(self, stage: _Stage, lr_mult: float):
        super().__init__()
        self.downsample = (
            _ConvBNAct(
                stage.in_channels, stage.in_channels, 3, stride=2, groups=stage.in_channels, act=False, lr_mult=lr_mult
            )
            if stage.downsample
            else None
        )
        self.blocks = nn.Sequential(
            *[
                _Block(stage.in_channels if index == 0 else stage.out_channels, stage, index > 0, lr_mult)
                for index in range(stage.blocks)
            ]
        )

    def forward(self, x):
        return self.blocks(x if self.downsample is None else self.downsample(x))


@serializable
class PPHGNetV2(nn.Layer):
    """PP-HGNetV2 as a backbone.

    Args:
        arch: ``S``, ``L`` or ``X``.
        lr_mult_list: learning rate multipliers of the stem and the four stages.
        return_idx: indices of the stages whose outputs are returned.
        freeze_stem_only: with ``freeze_at >= 0``, whether only the stem is frozen.
        freeze_at: index of the last frozen stage; -1 freezes nothing.
        freeze_norm: whether the statistics and parameters of BatchNorm are fixed in training.
    """

    def __init__(
        self,
        arch: str = "L",
        lr_mult_list: Sequence[float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        return_idx: Sequence[int] = (1, 2, 3),
        freeze_stem_only: bool = True,
        freeze_at: int = 0,
        freeze_norm: bool = True,
    ):
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"PPHGNetV2.arch is {arch!r}, expected one of {sorted(ARCHITECTURES)}")
        architecture = ARCHITECTURES[arch]
        self.return_idx = list(return_idx)
        self.stem = _Stem(architecture.stem, lr_mult_list[0])
        self.stages = nn.LayerList(
            [_StageLayer(stage, lr_mult_list[index + 1]) for index, stage in enumerate(architecture.stages)]
        )
        self._out_channels = [stage.out_channels for stage in architecture.stages]
        if freeze_at >= 0:
            _freeze(self.stem)
            if not freeze_stem_only:
                for stage in self.stages[: freeze_at + 1]:
                    _freeze(stage)
        if freeze_norm:
            for layer in self.sublayers():
                if isinstance(layer, nn.BatchNorm2D):
                    _freeze(layer)
                    layer._use_global_stats = True

    @property
    def out_shape(self) -> list[ShapeSpec]:
        return [ShapeSpec(channels=self._out_channels[index], stride=4 * 2**index) for index in self.return_idx]

    def forward(self, inputs):
        """Compute the feature maps.

        Args:
            inputs: a dict with ``image`` [N, 3, H, W].

        Returns:
            a list of [N, C_i, H / stride_i, W / stride_i], one per entry of ``return_idx``.
        """
        x = self.stem(inputs["image"])
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.return_idx:
                outputs.append(x)
        return outputs


@serializable
class ResNet(ppdet_resnet.ResNet):
    """`ppdet`'s ResNet with the additional argument ``freeze_stem_only``, which RT-DETR's configs use."""

    __shared__ = ["norm_type"]

    def __init__(
        self,
        depth=50,
        ch_in=64,
        variant="b",
        lr_mult_list=[1.0, 1.0, 1.0, 1.0],  # noqa: B006  (read only; ppdet's schema wants plain lists)
        groups=1,
        base_width=64,
        norm_type="bn",
        norm_decay=0,
        freeze_norm=True,
        freeze_at=0,
        return_idx=[0, 1, 2, 3],  # noqa: B006
        dcn_v2_stages=[-1],  # noqa: B006
        num_stages=4,
        std_senet=False,
        freeze_stem_only=False,
    ):
        super().__init__(
            depth=depth,
            ch_in=ch_in,
            variant=variant,
            lr_mult_list=lr_mult_list,
            groups=groups,
            base_width=base_width,
            norm_type=norm_type,
            norm_decay=norm_decay,
            freeze_norm=freeze_norm,
            freeze_at=-1 if freeze_stem_only else freeze_at,
            return_idx=return_idx,
            dcn_v2_stages=dcn_v2_stages,
            num_stages=num_stages,
            std_senet=std_senet,
        )
        if freeze_stem_only and freeze_at >= 0:
            _freeze(self.conv1)


def _freeze(layer: nn.Layer) -> None:
    for parameter in layer.parameters():
        parameter.stop_gradient = True
