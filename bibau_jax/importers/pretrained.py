"""Weights that training begins with: those of a file in all but the head, which is new for the classes at hand."""

from pathlib import Path

from bibau_jax.errors import UserError
from bibau_jax.importers import architectures, rules, torch_file
from bibau_jax.models import Classifier, own_file
from bibau_jax.models.classifier import at

TOWER = "visual."  # what the names of CLIP's image encoder begin with, beside a text encoder's


def begin(path, classifier: Classifier, variables: dict, *, name: str, file: str = "") -> dict:
    """`variables` of `Classifier.init` with the file's weights in place of all but the head.

    `name` is the network's in `bibau_jax.models`, `file` one's own network instead (see `own_file`). A head in the file is left
    out, and so is the text encoder of a whole CLIP. UserError, one line, for a file that cannot be read or does not fit.
    """
    path = Path(path).expanduser()
    arrays = torch_file.read(path).arrays
    if any(key.startswith(TOWER) for key in arrays):
        arrays = {key: array for key, array in arrays.items() if key.startswith(TOWER)}
    table = own_file.load(file).table if file else architectures.NETWORKS[name].table
    head = f"params/{'/'.join(classifier.head)}/"
    arrays = {key: array for key, array in arrays.items() if not (rules.place_of(key, array, table) or "").startswith(head)}
    rest = variables | {"params": _without(variables["params"], classifier.head)}
    try:
        found = rules.to_variables(arrays, table, rest).variables
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found | {"params": _with(found["params"], classifier.head, at(variables["params"], classifier.head))}


def _without(tree: dict, path: tuple[str, ...]) -> dict:
    first, rest = path[0], path[1:]
    kept = {name: value for name, value in tree.items() if name != first}
    return kept | ({first: _without(tree[first], rest)} if rest else {})


def _with(tree: dict, path: tuple[str, ...], value) -> dict:
    first, rest = path[0], path[1:]
    return tree | {first: _with(tree.get(first, {}), rest, value) if rest else value}
