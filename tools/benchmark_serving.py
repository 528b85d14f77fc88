"""Time a running server under concurrent clients; for developers of this repository."""

if __name__ == "__main__":
    from _clone import run_module

    run_module("tools.dev.benchmark_serving")
