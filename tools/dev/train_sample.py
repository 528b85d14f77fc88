"""Train the RT-DETR of the built-in sample from scratch, and save its weights in PaddleDetection's form.

Example: python tools/train_sample.py --output output/sample/rtdetr_sample.pdparams
Needs: pip install torch transformers pillow scipy "numpy<2" opencv-python-headless scikit-learn pycocotools tqdm pyyaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, train, print the score."""
    try:
        from tools.dev.sample_training import Settings, train
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, and training needs it: pip install torch transformers pillow "
            "scipy 'numpy<2', best in an environment of their own"
        ) from None
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default=str(CONFIGS / "rtdetr" / "rtdetr_sample.yml"))
    parser.add_argument("--output", default="output/sample/rtdetr_sample.pdparams", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="resume from the state next to --output")
    for name in ("iters", "batch_size", "lr", "warmup", "seed", "eval_every", "eval_scenes", "threads"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default: %(default)s")
    flags = vars(parser.parse_args(argv))
    config, output, resume = flags.pop("config"), flags.pop("output"), flags.pop("resume")
    scores = train(config, output, Settings(**flags), resume)
    print(
        f"{output}: mAP {scores['map']:.4f}, mAP50 {scores['map50']:.4f} on scenes that are in neither set of the "
        f"sample; {scores['seconds']:.0f} s"
    )
    return 0
