#!/usr/bin/env python3
"""Build model.plan from the bundle's ONNX file with the Python module of TensorRT or TensorRT-RTX, without trtexec."""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from preprocess import Refused, one_line  # noqa: E402
from run import HERE, load_bundle  # noqa: E402
from tensorrt_runtime import import_module  # noqa: E402


def build(bundle, trt, source, target):
    """Build an engine; works for TensorRT 8.5 and later, and for TensorRT-RTX without a GPU."""
    logger = trt.Logger(trt.Logger.ERROR)
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    flags, kinds = 0, trt.NetworkDefinitionCreationFlag
    wanted = "STRONGLY_TYPED" if bundle["typed"] else "EXPLICIT_BATCH"
    if hasattr(kinds, wanted):
        flags = 1 << int(getattr(kinds, wanted))
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    with open(source, "rb") as file:
        if not parser.parse(file.read()):
            raise Refused("TensorRT cannot parse %s: %s" % (source, one_line(parser.get_error(0).desc())))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, bundle["workspace_mib"] << 20)
    if not bundle["typed"]:
        for name in ["FP16"] + (["INT8"] if bundle["precision"] == "int8" else []):
            config.set_flag(getattr(trt.BuilderFlag, name))
    if bundle["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in bundle["profile"].items():
            profile.set_shape(name, *(tuple(shape) for shape in shapes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("TensorRT cannot build an engine of %s, see its messages above" % source)
    with open(target + ".part", "wb") as file:
        file.write(plan)
    os.replace(target + ".part", target)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=os.path.join(HERE, "model.plan"), help="file to write")
    options = parser.parse_args(argv)
    try:
        bundle = load_bundle()
        trt = import_module(bundle)
        found = ".".join(trt.__version__.split(".")[: 2 if bundle["tensorrt"].startswith("8") else 1])
        if bundle["target"] != "rtx" and found != bundle["tensorrt"]:
            needed = (bundle["tensorrt"], trt.__version__)
            raise Refused("this bundle is for TensorRT %s, here is %s: make one with --tensorrt" % needed)
        build(bundle, trt, os.path.join(HERE, bundle["model"]), options.output)
    except (Refused, OSError) as error:
        print("error: %s" % one_line(error), file=sys.stderr)
        return 2
    print("%s: %.2f MB" % (options.output, os.path.getsize(options.output) / 1e6))
    return 0


if __name__ == "__main__":
    sys.exit(main())
