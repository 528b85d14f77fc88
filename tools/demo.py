"""Run the whole path on the built-in sample: `act-pipeline demo` in this clone; what `make demo` runs."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.demo")
