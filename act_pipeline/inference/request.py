"""A request to ``deploy/infer_eval.py``."""

from __future__ import annotations

from dataclasses import dataclass

from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME

HINTS = ("latency", "throughput")


@dataclass(frozen=True)
class InferenceRequest:
    """What to run and where; the fields are the flags of ``deploy/infer_eval.py``.

    Attributes:
        model_path: the model folder, or an ONNX file; None for the sample's model, INT8 unless ``precision`` is a float
            one.
        model_filename: file name of the program.
        params_filename: file name of the parameters.
        reader_config: the reader YAML; None for the sample's.
        image_file: run on this image instead of the data set, and draw the detections.
        engine: a name in :data:`act_pipeline.engines.ENGINES`; ``auto`` for the fastest one; ``all`` for every
            available one; None for Paddle with ``use_trt`` and ``use_mkldnn``, or ``auto`` for an ONNX file.
        device: ``auto`` (a GPU if there is one that the engine can use), ``CPU`` or ``GPU``.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``; None for int8 with an INT8 model and fp32 with a float one.
        use_trt: run in Paddle with TensorRT.
        use_dynamic_shape: use the collected shapes in TensorRT.
        use_mkldnn: use oneDNN on the CPU.
        cpu_threads: number of CPU threads; None for all CPUs available to this process.
        benchmark: measure latency only, on the data set's first images, on ``image_file``, or on random input if the
            data set cannot be read.
        include_nms: has no effect: the model's outputs decide whether NMS is left to do.
        trt_calib_mode: let TensorRT calibrate INT8 scales itself.
        img_shape: (height, width) of the network's input in pixels; None for the reader's.
        batch_size: images per run.
        hint: ``latency``: one run at a time on all threads; ``throughput``: as many parallel requests as the runtime
            recommends, where the engine has requests.
        limit: evaluate the first so many images of the data set; None for all.
        threshold: minimum score of the detections that are drawn and listed.
        output_dir: folder for drawn images.
        json: where to write the record, ``eval.json``.
        collect_shape_only: stop after collecting the shapes.
        shards: number of processes for the evaluation; None for this process, and on Ray as many as fit.
        executor: one of :data:`act_pipeline.core.process_pool.EXECUTORS`.
        ray_address: address of the Ray cluster.
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
    hint: str = "latency"
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
        """Whether the evaluation runs in other processes."""
        return self.executor == "ray" or (self.shards or 1) > 1
