"""Time a training, or calibration, beside what others do; for developers of this repository."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("tools.dev.benchmark_compress")
