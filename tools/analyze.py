"""Analyse a float RT-DETR before it is compressed: `act-pipeline analyze` in this clone."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("act_pipeline.cli.analyze")
