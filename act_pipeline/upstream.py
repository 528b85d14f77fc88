"""Importing PaddleDetection without what it prints."""

from __future__ import annotations

import builtins
import importlib
import sys
from types import ModuleType
from typing import Any

from act_pipeline.errors import UserError


def import_ppdet(module: str = "ppdet") -> ModuleType:
    """Import ``ppdet`` or one of its modules.

    ppdet 2.6.0 prints twice that its object tracking would like numba, which has no place in a detection run.

    Raises:
        UserError: it is not installed.
    """
    if module in sys.modules:
        return sys.modules[module]
    say = builtins.print

    def say_unless_numba(*values: Any, **options: Any) -> None:
        if not (values and "numba" in str(values[0])):
            say(*values, **options)

    builtins.print = say_unless_numba
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "ppdet":
            raise
        raise UserError(
            "the package paddledet (ppdet) is missing, expected version 2.6.0; install it from the lock files in requirements/"
        ) from None
    finally:
        builtins.print = say
