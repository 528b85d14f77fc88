"""RT-DETR (Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", 2023) for `ppdet`'s workspace.

`paddledet` 2.6.0, the newest release that can be installed, has the parts of DINO but no RT-DETR. This package
adds the missing modules under PaddleDetection's official names, so that its model YAMLs and ``.pdparams`` load
unchanged. Read in the way of the data: `backbone`, `encoder`, `decoder`, `loss`, `architecture`, `build`.
"""

from act_pipeline.rtdetr.build import build_model, load_weights

__all__ = ["build_model", "load_weights"]
