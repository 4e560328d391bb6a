"""Defences by file name: `defenses.get("bibau_u").purify(key, classifier, variables, clean)`."""

import importlib
import inspect
import pkgutil
from types import ModuleType

from bibau_jax.defenses.protocol import Ideal, Informed, Purified
from bibau_jax.errors import unknown

__all__ = ["Ideal", "Informed", "Purified", "chooses", "get", "is_ideal", "is_informed", "names"]

# bibau is the method, adversarial its E-step, bibau_u and bibau_t are its two modes
NOT_DEFENSES = {"protocol", "bibau", "adversarial", "pruning", "inversion"}


def names() -> list[str]:
    """The defences there are, one file each."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_DEFENSES)


def get(name: str) -> ModuleType:
    """The module of the defence `name`, with its function `purify`; unknown names raise `UserError`."""
    if name not in names():
        raise unknown("defence", name, names())
    return importlib.import_module(f"{__name__}.{name}")


def is_ideal(name: str) -> bool:
    """Whether it asks for triggered images: a reference that defences are measured by, none itself."""
    return "triggered" in inspect.signature(get(name).purify).parameters


def is_informed(name: str) -> bool:
    """Whether it asks for poisoned training images, which most defenders do not have."""
    return "poisoned" in inspect.signature(get(name).purify).parameters


def chooses(name: str) -> bool:
    """Whether it chooses something, as a threshold, by the accuracy on held-out clean images."""
    return "max_loss" in inspect.signature(get(name).purify).parameters
