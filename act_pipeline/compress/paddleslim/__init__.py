"""All that touches PaddleSlim's and Paddle's quantization passes."""
