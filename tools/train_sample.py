"""Train the built-in sample's RT-DETR from scratch; for developers of this repository."""

if __name__ == "__main__":  # a process that one of the command's starts imports this file
    from _clone import run_module

    run_module("tools.dev.train_sample")
