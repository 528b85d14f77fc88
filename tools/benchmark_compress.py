"""Time a training, or calibration, compared with other tools; for developers of this repository."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("tools.dev.benchmark_compress")
