"""Make the built-in sample data set: `act-pipeline make-sample` in this clone."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.make_sample")
