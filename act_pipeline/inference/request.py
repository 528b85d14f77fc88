"""What ``deploy/infer_eval.py`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME


@dataclass(frozen=True)
class InferenceRequest:
    """What to run and where; the fields are the flags of ``deploy/infer_eval.py``.

    Attributes:
        model_path: the model folder, or an ONNX file; None: the sample's, INT8 unless ``precision`` is a float one.
        model_filename: the program in it.
        params_filename: the parameters in it.
        reader_config: the reader YAML; None: the sample's.
        image_file: run on this picture instead of the data set, and draw.
        engine: a name of :data:`act_pipeline.engines.ENGINES`, ``auto``, the fastest here, or ``all``, each
            that is here; None: Paddle, as
            ``use_trt`` and ``use_mkldnn`` say, and ``auto`` for an ONNX file.
        device: ``auto`` (a GPU if there is one that the engine can use), ``CPU`` or ``GPU``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8``; None: int8 for an INT8 model, fp32 for a float one.
        use_trt: run in Paddle with TensorRT.
        use_dynamic_shape: give TensorRT the collected shapes.
        use_mkldnn: use oneDNN on the CPU.
        cpu_threads: None: all CPUs that this process may use.
        benchmark: time only, on the data set's first images, on ``image_file``, or on random input without either.
        include_nms: has no effect on RT-DETR, which has no NMS.
        trt_calib_mode: TensorRT calibrates INT8 scales itself.
        img_shape: (height, width) of the network's input; None: the reader's.
        batch_size: images in a run.
        limit: the first so many images of the data set.
        threshold: smallest score that is drawn and listed.
        output_dir: where pictures go.
        json: where to write the record, ``eval.json``.
        collect_shape_only: stop when the shapes are collected.
        shards: evaluate in so many processes; None: in this one, and on Ray in as many as fit.
        executor: where they are, one of :data:`act_pipeline.core.process_pool.EXECUTORS`.
        ray_address: of the Ray cluster.
    """

    model_path: str | None = None
    model_filename: str = MODEL_FILENAME
    params_filename: str = PARAMS_FILENAME
    reader_config: str | None = None
    image_file: str | None = None
    engine: str | None = None
    device: str = "auto"
    precision: str | None = None
    use_trt: bool = False
    use_dynamic_shape: bool = True
    use_mkldnn: bool = False
    cpu_threads: int | None = None
    benchmark: bool = False
    include_nms: bool = True
    trt_calib_mode: bool = False
    img_shape: tuple[int, int] | None = None
    batch_size: int = 1
    limit: int | None = None
    threshold: float = 0.5
    output_dir: str = "output/infer"
    json: str | None = None
    collect_shape_only: bool = False
    shards: int | None = None
    executor: str = "local"
    ray_address: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether other processes evaluate."""
        return self.executor == "ray" or (self.shards or 1) > 1
