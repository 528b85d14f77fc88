"""Compare all engines and precisions of this machine: `act-pipeline benchmark` in this clone."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("act_pipeline.cli.benchmark")
