"""From PyTorch's names and layouts to ours and back: one table of module names a network, every key accounted for.

A table maps names of modules ("layer1.0.conv1") to paths ("layer1_0/conv1"); what lies below them follows from the arrays:
kernels are turned, norms' weights are scales, running statistics are state of their own. An array that is no module's weight
or bias ("class_token") has a rule of its own, to a whole path of parameters: it is turned where that ends in "kernel", and
else kept, without leading axes of length one.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bibau_jax.errors import UserError, shown

Table = Sequence[tuple[str, str]]  # regular expression of a module's, or an array's, whole name -> its path, with groups

_HEAD = (r"(?:linear|fc|classifier|head)", r"head")
RESNET = (
    (r"(conv1|bn1)", r"\1"),
    (r"layer(\d+)\.(\d+)\.(conv\d|bn\d)", r"layer\1_\2/\3"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.0", r"layer\1_\2/shortcut_conv"),
    (r"layer(\d+)\.(\d+)\.(?:shortcut|downsample)\.1", r"layer\1_\2/shortcut_bn"),
    _HEAD,
)
RESNET_NAMES = (  # the way back, for a network that was trained here: a path -> its module's name in torchvision
    (r"(conv1|bn1)", r"\1"),
    (r"layer(\d+)_(\d+)/(conv\d|bn\d)", r"layer\1.\2.\3"),
    (r"layer(\d+)_(\d+)/shortcut_conv", r"layer\1.\2.downsample.0"),
    (r"layer(\d+)_(\d+)/shortcut_bn", r"layer\1.\2.downsample.1"),
    (r"head", r"fc"),
)
WIDE_RESNET = (
    (r"(conv1|bn1)", r"\1"),
    (r"block(\d+)\.layer\.(\d+)\.(conv\d|bn\d)", r"layer\1_\2/\3"),
    (r"block(\d+)\.layer\.(\d+)\.convShortcut", r"layer\1_\2/shortcut_conv"),
    _HEAD,
)
VGG = (
    (r"features\.(\d+)", r"features_\1"),
    (r"classifier\.([03])", r"classifier_\1"),
    (r"classifier\.6", r"head"),
    _HEAD,
)
_BLOCK = r"(?:1\.)?encoder\.layers\.encoder_layer_(\d+)\."  # "1." where the network stands behind a resize
VIT = (
    (r"(?:1\.)?class_token", r"class_token"),
    (r"(?:1\.)?conv_proj", r"patches"),
    (r"(?:1\.)?encoder\.pos_embedding", r"positions"),
    (_BLOCK + r"ln_(\d)", r"block_\1/norm\2"),
    (_BLOCK + r"self_attention\.in_proj_weight", r"block_\1/qkv/kernel"),
    (_BLOCK + r"self_attention\.in_proj_bias", r"block_\1/qkv/bias"),
    (_BLOCK + r"self_attention\.out_proj", r"block_\1/out"),
    (_BLOCK + r"mlp\.(?:0|linear_1)", r"block_\1/mlp1"),
    (_BLOCK + r"mlp\.(?:3|linear_2)", r"block_\1/mlp2"),
    (r"(?:1\.)?encoder\.ln", r"norm"),
    (r"(?:1\.)?heads\.head", r"head"),
    _HEAD,
)
_RESIDUAL = r"(?:visual\.)?transformer\.resblocks\.(\d+)\."
CLIP_VIT = (
    (r"(?:visual\.)?class_embedding", r"class_token"),
    (r"(?:visual\.)?conv1", r"patches"),
    (r"(?:visual\.)?positional_embedding", r"positions"),
    (r"(?:visual\.)?ln_pre", r"norm0"),
    (_RESIDUAL + r"ln_(\d)", r"block_\1/norm\2"),
    (_RESIDUAL + r"attn\.in_proj_weight", r"block_\1/qkv/kernel"),
    (_RESIDUAL + r"attn\.in_proj_bias", r"block_\1/qkv/bias"),
    (_RESIDUAL + r"attn\.out_proj", r"block_\1/out"),
    (_RESIDUAL + r"mlp\.c_fc", r"block_\1/mlp1"),
    (_RESIDUAL + r"mlp\.c_proj", r"block_\1/mlp2"),
    (r"(?:visual\.)?ln_post", r"norm"),
    (r"(?:visual\.)?proj", r"projection"),
    _HEAD,
)
STATISTICS = {"running_mean": "mean", "running_var": "var"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"} | {ours: theirs for theirs, ours in STATISTICS.items()}
DROPPED = "num_batches_tracked"  # PyTorch's count of batches: of no use here, and given back as it was


class Imported(NamedTuple):
    """Variables {"params", "batch_stats"} in float32, and where each array of the file went: {PyTorch's name: path}."""

    variables: dict
    places: dict[str, str]


def place_of(name: str, array: np.ndarray, table: Table) -> str | None:
    """Where the array called `name` goes, "params/layer1_0/conv1/kernel"; None where no rule of the table fits."""
    module, _, leaf = name.rpartition(".")
    for pattern, path in table:
        if match := re.fullmatch(pattern, name):
            return f"params/{match.expand(path)}"
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


def laid_out(array: np.ndarray, place: str, rank: int) -> np.ndarray:
    """The array as it lies at `place`, a view: kernels turned, others without leading axes of length one beyond `rank`."""
    if place.endswith("/kernel"):
        return turned(array)
    spare = max(0, array.ndim - rank)
    return array.reshape(array.shape[spare:]) if array.shape[:spare] == (1,) * spare else array


def misfits(arrays: dict[str, np.ndarray], table: Table, like: dict) -> list[str]:
    """Why the arrays are not the variables of a network shaped as `like`: what is left over, missing, or of another shape."""
    wanted = _shapes(like)
    places, left = _placed(arrays, table, wanted)
    held = set(places.values())
    problems = _told("left over", left) + _told("missing", [path for path in wanted if path not in held])
    if problems:
        return problems
    found = {place: laid_out(arrays[name], place, len(wanted[place])).shape for name, place in places.items()}
    return _told("of another shape", [f"{p} {list(found[p])} for {list(wanted[p])}" for p in wanted if found[p] != wanted[p]])


def to_variables(arrays: dict[str, np.ndarray], table: Table, like: dict) -> Imported:
    """The variables that the arrays make, shaped as `like` (of `Classifier.init`, or its shapes).

    UserError that lists what is missing, left over, of another shape, or not finite; num_batches_tracked alone is left out.
    """
    problems, wanted = misfits(arrays, table, like), _shapes(like)
    if not problems:
        places, _ = _placed(arrays, table, wanted)
        found = {p: laid_out(np.asarray(arrays[name], np.float32), p, len(wanted[p])) for name, p in places.items()}
        whole = [f"{name}, {arrays[name].dtype}" for name in places if not jnp.issubdtype(arrays[name].dtype, jnp.floating)]
        problems = _told("no floating-point numbers, as of a quantised network", whole)
        problems += _told("not finite", [path for path, array in found.items() if not np.isfinite(array).all()])
        below = [
            path
            for path, array in found.items()
            if path.startswith("batch_stats/") and path.endswith("/var") and (array < 0).any()
        ]
        problems += _told("below 0, which no variance is", below)
    if problems:
        raise UserError(f"the weights do not fit this network: {'; '.join(problems)}")
    tree = {part: {} for part in like} | _nested({path: np.ascontiguousarray(found[path]) for path in wanted})
    return Imported(tree, places)


def _placed(arrays: dict[str, np.ndarray], table: Table, wanted: dict) -> tuple[dict[str, str], list[str]]:
    """({name: path} of the arrays that have a place among those wanted, the names of those that have none)."""
    places, taken, left = {}, set(), []
    for name, array in arrays.items():
        if name.rpartition(".")[2] == DROPPED:
            continue
        place = place_of(name, array, table)
        if place is None or place not in wanted or place in taken:
            left.append(name)
        else:
            places[name] = place
            taken.add(place)
    return places, left


def to_arrays(variables: dict, original: dict[str, np.ndarray], places: dict[str, str]) -> dict[str, np.ndarray]:
    """The variables under the file's own names, in its order, layouts and types; what was left out on the way in as it was."""
    held = _flat(variables)
    made = {}
    for name, array in original.items():
        if name in places:
            value = np.asarray(held[places[name]], np.float32)
            value = turned_back(value) if places[name].endswith("/kernel") else value
            made[name] = np.ascontiguousarray(value.astype(array.dtype)).reshape(array.shape)
        else:
            made[name] = array
    return made


def named(variables: dict, names: Table = RESNET_NAMES) -> dict[str, np.ndarray]:
    """The variables of a network that was trained here under PyTorch's names and in its layouts, for `export.write`.

    `names` maps paths of modules to their names, by default those of torchvision's ResNets. num_batches_tracked is left out,
    which PyTorch's load_state_dict does not miss. UserError for a path that no rule fits.
    """
    made = {}
    for path, value in _flat(variables).items():
        where, _, leaf = path.partition("/")[2].rpartition("/")
        found = [match.expand(name) for pattern, name in names if (match := re.fullmatch(pattern, where))]
        if not found or leaf not in LEAVES:
            raise UserError(f"{path} has no name in PyTorch here; known are {', '.join(pattern for pattern, _ in names)}")
        value = turned_back(np.asarray(value)) if leaf == "kernel" else np.asarray(value)
        made[f"{found[0]}.{LEAVES[leaf]}"] = np.ascontiguousarray(value)
    return made


def _told(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{len(names)} {what} ({', '.join(map(shown, names[:5]))}{more})"] if names else []


def _shapes(like: dict) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _flat(like).items()}


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
