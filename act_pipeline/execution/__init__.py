"""Programs made to run quickly and safely in Paddle's executors: kernels, threads, memory, checks for NaN."""
