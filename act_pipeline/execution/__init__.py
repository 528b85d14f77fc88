"""Fast and safe execution of programs in Paddle's executors: kernels, threads, memory, checks for NaN."""
