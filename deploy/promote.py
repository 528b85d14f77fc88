"""Put an INT8 model into a repository of versions: `act-pipeline promote` in this clone."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.promote")
