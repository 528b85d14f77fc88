"""Find which ops of an INT8 model TensorRT computes sooner in FP16: `act-pipeline placement` in this clone."""

if __name__ == "__main__":  # processes that the command starts import this file too
    from _clone import run_module

    run_module("act_pipeline.cli.placement")
