"""Models of Paddle 3 and PaddleX 3 (``inference.json``) into float models, through paddle2onnx."""

from act_pipeline.importers.paddle3.importer import import_paddle3

__all__ = ["import_paddle3"]
