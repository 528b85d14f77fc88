"""Import of RT-DETR and RT-DETRv2 of Hugging Face's ``transformers``, without PyTorch.

Modules in the order of the data flow: `safetensors_file`, `values`, `backbone`, `model_config`, `preprocessor`, and
`folder`.
"""

from act_pipeline.importers.hugging_face.folder import import_hugging_face

__all__ = ["import_hugging_face"]
