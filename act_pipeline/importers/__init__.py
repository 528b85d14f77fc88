"""Float models from files of other frameworks."""

from act_pipeline.importers.import_model import ImportedModel, import_onnx

__all__ = ["ImportedModel", "import_onnx"]
