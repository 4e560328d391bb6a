"""Inside a network: what its modules are given and what they give, by their paths, and what follows if they gave otherwise."""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax

from bibau_jax.models.classifier import Classifier, Outputs, Path

SEEN = ("output", "input")


def look(
    classifier: Classifier, variables, pixels: jax.Array, paths: Iterable[Path], *, what: str = "output", train: bool = False
) -> tuple[Outputs, dict[str, jax.Array]]:
    """The network's outputs, and what the modules at `paths` were given ("input") or gave ("output"), by "/"-joined path."""
    wanted, found = set(paths), {}

    def intercept(call, arguments, options, context):
        given = call(*arguments, **options)
        path = context.module.path
        if context.method_name == "__call__" and path in wanted:
            found["/".join(path)] = given if what == "output" else arguments[0]
        return given

    with nn.intercept_methods(intercept):
        outputs = classifier.apply(variables, pixels, train=train)
    return outputs, {"/".join(path): found["/".join(path)] for path in paths}


def replace(
    classifier: Classifier, variables, pixels: jax.Array, path: Path, change: Callable, *, train: bool = False
) -> Outputs:
    """The network's outputs where the module at `path` gives `change(its output)`.

    Inside `jit`, what only led to an output that is not used is not computed: a `change` that ignores what it is given runs
    the rest of the network alone.
    """

    def intercept(call, arguments, options, context):
        given = call(*arguments, **options)
        return change(given) if context.method_name == "__call__" and context.module.path == path else given

    with nn.intercept_methods(intercept):
        return classifier.apply(variables, pixels, train=train)
