"""Data: COCO-style data sets and the preprocessing of a reader YAML; importing it loads neither paddle nor ppdet."""

from act_pipeline.data.annotations import Annotations
from act_pipeline.data.dataset import Dataset
from act_pipeline.data.loader import Loader
from act_pipeline.data.reader import Reader

__all__ = ["Annotations", "Dataset", "Loader", "Reader"]
