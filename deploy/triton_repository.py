"""Write a model repository for Triton Inference Server: `act-pipeline triton-repository` in this clone."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.triton_repository")
