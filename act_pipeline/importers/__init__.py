"""Float models from files of other frameworks."""

from act_pipeline.importers.hugging_face import import_hugging_face
from act_pipeline.importers.import_model import ImportedModel, import_onnx
from act_pipeline.importers.paddle3 import import_paddle3
from act_pipeline.importers.torch_weights import import_torch_checkpoint

__all__ = ["ImportedModel", "import_hugging_face", "import_onnx", "import_paddle3", "import_torch_checkpoint"]
