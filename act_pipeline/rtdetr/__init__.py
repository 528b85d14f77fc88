"""RT-DETR (Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", 2023) for `ppdet`'s workspace.

`paddledet` 2.6.0, the latest installable release, has the modules of DINO but no RT-DETR. This package adds the missing
modules under PaddleDetection's official names, so that its model YAMLs and ``.pdparams`` load unchanged. Modules in the
order of the data flow: `backbone`, `encoder`, `decoder`, `loss`, `architecture`, `build`.
"""

from act_pipeline.rtdetr.build import build_model, load_weights

__all__ = ["build_model", "load_weights"]
