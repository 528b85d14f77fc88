"""Turn failures of a run into one line that states what is saved and how to resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.core.errors import Interrupted, UserError, describe_os_error
from act_pipeline.execution.finite_checks import Diverged

# Paddle raises plain RuntimeError or SystemError for these.
_OUT_OF_MEMORY = ("ResourceExhausted", "Out of memory", "bad_alloc", "Cannot allocate memory", "alloc failed")


@contextlib.contextmanager
def explained(checkpoints: Checkpoints, batch_size: int) -> Iterator[None]:
    """Turn failures in the ``with`` block that a user can fix into a :class:`UserError` that states what is saved.

    Args:
        checkpoints: the checkpoint of the run.
        batch_size: the batch size of the training.

    Raises:
        UserError: the training diverged, memory or disk space does not suffice, or a data file is missing.
        Interrupted: the run was interrupted; the message states how to resume.
    """
    try:
        yield
    except Interrupted as error:
        raise Interrupted(error.signum, _join(checkpoints.how_to_continue(), checkpoints.best())) from None
    except Diverged as error:
        # No hint to resume: the run would diverge again in the same way.
        raise UserError(_join(str(error), checkpoints.best())) from error
    except UserError as error:
        raise UserError(_join(str(error), _kept(checkpoints))) from error
    except OSError as error:
        reason = describe_os_error(error)
        if reason is None and isinstance(error, FileNotFoundError) and error.filename:
            reason = f"{error.filename} is gone; put it back"
        if reason is None:
            raise
        raise UserError(_join(reason, _kept(checkpoints))) from error
    except (MemoryError, RuntimeError, SystemError) as error:
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in _OUT_OF_MEMORY):
            raise
        if batch_size > 1:
            # No hint to resume: a checkpoint is valid only for the same batch size.
            reason = (
                f"memory does not suffice for batches of {batch_size}: set EvalReader.batch_size to {batch_size // 2} "
                "in the reader and start again"
            )
            raise UserError(_join(reason, checkpoints.best())) from error
        reason = "memory does not suffice, and the batch size is 1 already: end other programs, or take more memory"
        raise UserError(_join(reason, _kept(checkpoints))) from error


def _kept(checkpoints: Checkpoints) -> str:
    return _join(checkpoints.how_to_continue(), checkpoints.best()) if checkpoints.written else ""


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
