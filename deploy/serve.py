"""Serve the versions of a repository: `act-pipeline serve` in this clone."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.serve")
