"""Import of PaddleDetection without its messages and without packages that only its object tracking needs."""

from __future__ import annotations

import builtins
import importlib
import sys
from types import ModuleType
from typing import Any

from act_pipeline.core.errors import UserError

# ppdet 2.6.0 always imports its object tracking and with it these modules, which takes 2 seconds.
_FOR_TRACKING = ("sklearn", "matplotlib.pyplot")


class _OnDemand(ModuleType):
    """Placeholder that imports the module when an attribute is accessed."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_ppdet(module: str = "ppdet") -> ModuleType:
    """Import ``ppdet`` or one of its modules.

    ppdet 2.6.0 prints twice that its object tracking lacks numba; these lines are suppressed. Modules that it imports
    only for object tracking are imported on first use.

    Args:
        module: the module to import.

    Raises:
        UserError: ppdet is not installed.
    """
    if module in sys.modules:
        return sys.modules[module]
    say = builtins.print

    def say_unless_numba(*values: Any, **options: Any) -> None:
        if not (values and "numba" in str(values[0])):
            say(*values, **options)

    builtins.print = say_unless_numba
    standing_in = {name: _OnDemand(name) for name in _FOR_TRACKING if name not in sys.modules}
    sys.modules.update(standing_in)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "ppdet":
            raise
        raise UserError(
            "the package paddledet (ppdet) is missing, expected version 2.6.0; install it from the lock files in "
            "requirements/"
        ) from None
    finally:
        builtins.print = say
        for name, stand_in in standing_in.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
