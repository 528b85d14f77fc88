"""Make the built-in sample data set: `act-pipeline make-sample` in this clone."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("act_pipeline.cli.make_sample")
