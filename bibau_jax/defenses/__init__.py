"""Defences by file name: `defenses.get("bibau_u").purify(key, classifier, variables, clean)`."""

import importlib
import pkgutil
from types import ModuleType

from bibau_jax.defenses.protocol import Purified
from bibau_jax.errors import unknown

__all__ = ["Purified", "get", "names"]

NOT_DEFENSES = {"protocol", "bibau"}  # bibau is the method itself; bibau_u and bibau_t are its two modes


def names() -> list[str]:
    """The defences there are, one file each."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_DEFENSES)


def get(name: str) -> ModuleType:
    """The module of the defence `name`, with its function `purify`; unknown names raise `UserError`."""
    if name not in names():
        raise unknown("defence", name, names())
    return importlib.import_module(f"{__name__}.{name}")
