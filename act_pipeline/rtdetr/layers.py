"""Layers shared by several parts of RT-DETR."""

from __future__ import annotations

import paddle
from paddle import nn


def batch_norm(channels: int, lr_mult: float = 1.0) -> nn.BatchNorm2D:
    """Return a BatchNorm for [N, channels, H, W] whose parameters have no weight decay.

    Args:
        channels: number of channels.
        lr_mult: learning rate multiplier of its parameters.
    """
    no_decay = paddle.regularizer.L2Decay(0.0)
    return nn.BatchNorm2D(
        channels,
        weight_attr=paddle.ParamAttr(regularizer=no_decay, learning_rate=lr_mult),
        bias_attr=paddle.ParamAttr(regularizer=no_decay, learning_rate=lr_mult),
    )
