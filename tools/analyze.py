"""Analyse a float RT-DETR before it is compressed: `act-pipeline analyze` in this clone."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.analyze")
