"""Write report.html beside an INT8 model: `act-pipeline report` in this clone."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("act_pipeline.cli.report")
