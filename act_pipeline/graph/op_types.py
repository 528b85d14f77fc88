"""Names of Paddle's op types that several modules ask for."""

CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
# What INT8 kernels of the runtimes compute, and what is counted in ``act.json``.
QUANTIZABLE_OPS = (*CONVOLUTIONS, "matmul_v2")
ACTIVATIONS = ("relu", "silu", "swish", "sigmoid", "gelu", "hard_swish", "leaky_relu", "relu6")
QUANTIZE, DEQUANTIZE = "quantize_linear", "dequantize_linear"
# Attribute of a convolution whose weights hold a BatchNorm: one factor an output channel, see `graph.folding`.
BATCH_NORM_FACTOR = "batch_norm_factor"
# Attribute of a matmul_v2 with an INT8 weight whose other input is rounded by its own range when the model runs.
DYNAMIC = "act_dynamic"
# Attribute of a quantize_linear: the least value of its tensor on the calibration images. Runtimes with zero points may
# round with it (graph.int8_rounding.unsigned_range); the op itself, and TensorRT, round symmetrically.
LOWEST = "act_lowest"
# That pick rows by indices, and those that only give a tensor another shape.
GATHERING = ("gather_nd", "gather", "take_along_axis", "index_sample")
RESHAPING = ("reshape2", "flatten_contiguous_range", "flatten2")
TOP_K = ("top_k_v2", "top_k")
