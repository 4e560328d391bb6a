"""Attacks by file name: `attacks.get("badnets").make(key, target_label=0, poison_ratio=0.1)`."""

import importlib
import pkgutil
from types import ModuleType

from bibau_jax.attacks.protocol import Attack, Control, PoisonedSplit
from bibau_jax.errors import unknown

__all__ = ["FROM_FILES", "Attack", "Control", "PoisonedSplit", "get", "names"]

FROM_FILES = {"patch"}  # attacks that are nothing without a file of one's own
NOT_ATTACKS = {"protocol", "gallery", "coupling", "networks"}


def names() -> list[str]:
    """The attacks there are, one file each."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_ATTACKS)


def get(name: str) -> ModuleType:
    """The module of the attack `name`, with its function `make`; unknown names raise `UserError`."""
    if name not in names():
        raise unknown("attack", name, names())
    return importlib.import_module(f"{__name__}.{name}")
