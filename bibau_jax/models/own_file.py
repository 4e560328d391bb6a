"""A network of one's own, from a Python file outside the package that says how it is built and what its keys are called.

The file defines `build(*, num_classes, image_shape, mean, std, dtype) -> Classifier` and `TABLE`, from PyTorch's names to its
own (`bibau_jax/importers/rules.py`). It is run as it stands: only a file that one trusts may be named. examples/small_vgg.py.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bibau_jax.errors import UserError
from bibau_jax.models.classifier import Classifier, at

OPTIONS = {"num_classes", "image_shape", "mean", "std", "dtype"}  # that a file's `build` is given


class OwnNetwork(NamedTuple):
    """What a file defines: `build(num_classes=, image_shape=, mean=, std=, dtype=)`, checked, and the table of its keys."""

    build: Callable[..., Classifier]
    table: Sequence[tuple[str, str]]


def load(path: str) -> OwnNetwork:
    """The network of a file; UserError, one line that names it, where it is not there, fails, or lacks a name."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"model.file={path}: there is no such file")
    spec = importlib.util.spec_from_file_location(place.stem, place)
    if spec is None:
        raise UserError(f"model.file={path}: it is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a stranger's file does wrong
        raise _failed(path, "it cannot be imported", error) from error
    if lacking := [name for name in ("build", "TABLE") if not hasattr(module, name)]:
        raise UserError(f"model.file={path}: it does not define {' and '.join(lacking)}")
    if not callable(module.build) or not _is_table(module.TABLE):
        raise UserError(f"model.file={path}: build must be a function and TABLE a sequence of (regular expression, path)")
    for pattern, _ in module.TABLE:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"model.file={path}: TABLE has no regular expression in {pattern!r}: {error}") from error
    return OwnNetwork(lambda **options: _built(path, module.build, options), tuple(module.TABLE))


def _is_table(table) -> bool:
    rules = table if isinstance(table, (tuple, list)) else [None]
    pairs = all(isinstance(rule, (tuple, list)) and len(rule) == 2 for rule in rules)
    return pairs and all(isinstance(part, str) for rule in rules for part in rule)


def _built(path: str, build: Callable, options: dict) -> Classifier:
    if spare := options.keys() - OPTIONS:
        raise UserError(f"model.{min(spare)} is no setting of a network from a file, model.file={path}: it stands in there")
    try:
        network = build(**options)
    except UserError:
        raise
    except Exception as error:
        raise _failed(path, "build fails", error) from error
    if not isinstance(network, Classifier):
        raise UserError(
            f"model.file={path}: build gives a {type(network).__name__}, and must give a bibau_jax.models.Classifier"
        )
    if (network.num_classes, network.image_shape) != (options["num_classes"], options["image_shape"]):
        raise UserError(f"model.file={path}: build gives a Classifier for other classes or images than it was asked for")
    _try(path, network)
    return network


def _try(path: str, network: Classifier) -> None:
    """Refuses a network that cannot be run, or whose outputs or head are not as `Classifier` says; nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.uint8)
    try:
        variables = jax.eval_shape(network.init, jax.random.key(0))
        outputs = jax.eval_shape(network.in_float32().apply, variables, image)
        kernel = at(variables["params"], network.head)["kernel"]
        given = outputs.logits.shape, kernel.shape
        wanted = (1, network.num_classes), (outputs.features.shape[-1], network.num_classes)
    except Exception as error:
        raise _failed(path, f"its network cannot be run on images of {list(network.image_shape)}", error) from error
    if given != wanted:
        raise UserError(f"model.file={path}: logits and head's kernel are {given}, and must be {wanted}")


def _failed(path: str, what: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:200]
    return UserError(f"model.file={path}: {what} ({type(error).__name__}: {said})")
