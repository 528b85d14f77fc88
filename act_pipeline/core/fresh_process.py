"""A process of Python that finds the package this one runs."""

from __future__ import annotations

import os
import site
from pathlib import Path

_PARENT = Path(__file__).resolve().parents[2]


def package_environment(**more: str) -> dict[str, str]:
    """Return the environment in which ``python -m act_pipeline...`` finds this package, from any working directory.

    A script of the repository runs that repository's package without an installation, and a new process would not find
    it.

    Args:
        more: further variables.
    """
    environment = {**os.environ, **more}
    # Of what is installed Python knows itself; on PYTHONPATH it would come before Python's own modules.
    if _PARENT not in [Path(place).resolve() for place in (*site.getsitepackages(), site.getusersitepackages())]:
        places = [str(_PARENT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return environment
