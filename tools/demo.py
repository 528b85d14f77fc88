"""Run the whole path on the built-in sample: `act-pipeline demo` in this clone; what `make demo` runs."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("act_pipeline.cli.demo")
