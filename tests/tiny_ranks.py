"""`tiny_training` as one of several processes.

Run it as ``python -m paddle.distributed.launch ... tests/tiny_ranks.py DIR JSON``. Every rank saves its weights and
moving averages in ``DIR/rank<N>.npz``; for the other files of rank 0 see `tiny_training`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_training  # noqa: E402

from act_pipeline.compress.qat.distributed.launch import join  # noqa: E402
from act_pipeline.compress.qat.distributed.ranks import Ranks  # noqa: E402
from act_pipeline.compress.qat.distributed.remote_training import train_on_command  # noqa: E402
from act_pipeline.compress.qat.resume.training_checkpoint import TrainingCheckpoint  # noqa: E402
from act_pipeline.core.errors import run_command  # noqa: E402


def note_variables(directory: Path, rank: int) -> None:
    """Save the variables that training changes to a file after each step."""
    import numpy as np

    from act_pipeline.compress.qat import state

    note = TrainingCheckpoint.note_step

    def note_step(self, position) -> None:
        note(self, position)
        np.savez(directory / f"rank{rank}.npz", **state.read_variables(self._names))

    TrainingCheckpoint.note_step = note_step


def work(ranks: Ranks) -> int:
    directory, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    (directory / f"rank{ranks.rank}.pid").write_text(str(os.getpid()))
    slow = settings.pop("slow_score", 0.0)
    note_variables(directory, ranks.rank)
    if not ranks.leads:
        names = ("iterations", "optimizer", "loss", "overrides")
        config = tiny_training.make_config(
            directory / "config1.yml", **{name: settings[name] for name in names if name in settings}
        )
        train_on_command(config, lambda: tiny_training.Numbers(settings.get("seconds", 0.0)), "CPU", ranks)

    def score(model) -> float:
        time.sleep(slow)
        return tiny_training.near(model)

    training = tiny_training.run(directory, progress=True, ranks=ranks, score=score, **settings)
    (directory / "result.json").write_text(json.dumps(tiny_training.result(training)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda argv: join().run(work)))
