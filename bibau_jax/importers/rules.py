"""From PyTorch's names and layouts to ours and back: one table of module names a network, every key accounted for.

A table maps names of modules ("layer1.0.conv1") to paths ("layer1_0/conv1"); what lies below them follows from the arrays:
kernels are turned, norms' weights are scales, running statistics are state of their own.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bibau_jax.errors import UserError

Table = Sequence[tuple[str, str]]  # regular expression of a module's whole name -> its path, with groups

_HEAD = (r"(?:linear|fc|classifier|head)", r"head")
RESNET = (
    (r"(conv1|bn1)", r"\1"),
    (r"layer(\d+)\.(\d+)\.(conv\d|bn\d)", r"layer\1_\2/\3"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.0", r"layer\1_\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.1", r"layer\1_\2/shortcut_bn"),
    _HEAD,
)
WIDE_RESNET = (
    (r"(conv1|bn1)", r"\1"),
    (r"block(\d+)\.layer\.(\d+)\.(conv\d|bn\d)", r"layer\1_\2/\3"),
    (r"block(\d+)\.layer\.(\d+)\.convShortcut", r"layer\1_\2/shortcut_conv"),
    _HEAD,
)
STATISTICS = {"running_mean": "mean", "running_var": "var"}
DROPPED = "num_batches_tracked"  # PyTorch's count of batches: of no use here, and given back as it was


class Imported(NamedTuple):
    """Variables {"params", "batch_stats"} in float32, and where each array of the file went: {PyTorch's name: path}."""

    variables: dict
    places: dict[str, str]


def place_of(name: str, array: np.ndarray, table: Table) -> str | None:
    """Where the array called `name` goes, "params/layer1_0/conv1/kernel"; None where no rule of the table fits."""
    module, _, leaf = name.rpartition(".")
    for pattern, path in table:
        if match := re.fullmatch(pattern, module):
            where = match.expand(path)
            if leaf in STATISTICS:
                return f"batch_stats/{where}/{STATISTICS[leaf]}"
            if leaf == "weight":
                return f"params/{where}/{'scale' if array.ndim == 1 else 'kernel'}"
            return f"params/{where}/bias" if leaf == "bias" else None
    return None


def turned(array: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, [K, D] to [D, K]; vectors as they are."""
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def turned_back(array: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, [D, K] to [K, D]; vectors as they are."""
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def to_variables(arrays: dict[str, np.ndarray], table: Table, like: dict) -> Imported:
    """The variables that the arrays make, shaped as `like` (of `Classifier.init`, or its shapes).

    UserError that lists what is missing, left over, of another shape, or not finite; num_batches_tracked alone is left out.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in _flat(like).items()}
    places, found, left = {}, {}, []
    for name, array in arrays.items():
        if name.rpartition(".")[2] == DROPPED:
            continue
        place = place_of(name, array, table)
        if place is None or place not in wanted or place in found:
            left.append(name)
            continue
        places[name], found[place] = place, turned(np.asarray(array, np.float32))
    problems = _told("are left over", left) + _told("are missing", [path for path in wanted if path not in found])
    if not problems:
        other = [f"{p} {list(found[p].shape)} for {list(wanted[p])}" for p in wanted if found[p].shape != wanted[p]]
        problems = _told("have another shape", other)
        problems += _told("are not finite", [path for path, array in found.items() if not np.isfinite(array).all()])
    if problems:
        raise UserError(f"the weights do not fit this network: {'; '.join(problems)}")
    return Imported(_nested({path: np.ascontiguousarray(found[path]) for path in wanted}), places)


def to_arrays(variables: dict, original: dict[str, np.ndarray], places: dict[str, str]) -> dict[str, np.ndarray]:
    """The variables under the file's own names, in its order, layouts and types; what was left out on the way in as it was."""
    held = _flat(variables)
    made = {}
    for name, array in original.items():
        if name in places:
            value = turned_back(np.asarray(held[places[name]], np.float32))
            made[name] = np.ascontiguousarray(value.astype(array.dtype)).reshape(array.shape)
        else:
            made[name] = array
    return made


def _told(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{len(names)} {what} ({', '.join(names[:5])}{more})"] if names else []


def _flat(tree, path: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        where = f"{path}/{name}" if path else name
        found |= _flat(value, where) if hasattr(value, "items") else {where: value}
    return found


def _nested(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return tree
