"""Optional dependencies, which an extra installs."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it. Call it early: before the training, not after.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'This needs {module}, which is not installed: pip install "metricopt_hf[{extra}]" (or: pip install '
            f"{module})."
        ) from error
