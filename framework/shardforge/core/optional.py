"""Optional packages: one way to import them, one message when they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from shardforge.core.errors import LaunchError


def installed(module: str) -> bool:
    """Whether `module` can be found; nothing is imported but its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(module: str, *, for_: str, extra: str = "", field: str = "", fix: str = "") -> ModuleType:
    """Import `module`, or say which extra of ShardForge brings it, or how else to get it (`fix`).

    `for_` is the feature, `field` what asked for it.
    """
    try:
        return importlib.import_module(module)
    except Exception as cause:  # some packages raise RuntimeError or OSError when half installed
        package = module.split(".")[0].replace("_", "-")
        raise LaunchError(
            f"{for_} needs the package {package}, which cannot be imported here ({type(cause).__name__}: {cause})",
            field,
            fix or f"pip install 'shardforge[{extra}]'",
        ) from cause
