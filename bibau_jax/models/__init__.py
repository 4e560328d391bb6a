"""Networks by file and function name: `models.build("resnet18", ...)` gives a `Classifier`."""

from bibau_jax.errors import UserError, unknown
from bibau_jax.models.classifier import Classifier, NormOfConv, Outputs
from bibau_jax.models.resnet import resnet18, resnet20
from bibau_jax.models.wide_resnet import wide_resnet16

__all__ = ["Classifier", "NormOfConv", "Outputs", "build", "names"]

BUILDERS = {"resnet18": resnet18, "resnet20": resnet20, "wide_resnet16": wide_resnet16}


def names() -> list[str]:
    """The networks that `build` knows."""
    return sorted(BUILDERS)


def check(name: str) -> None:
    """Refuses a name that `build` does not know."""
    if name not in BUILDERS:
        raise unknown("model", name, names())


def build(name: str, **options) -> Classifier:
    """The network `name` as a `Classifier`; `options` go to its function. Unknown names raise `UserError`."""
    check(name)
    if min(options.get("stages", (1,))) < 1 or options.get("width", 1) < 1:
        raise UserError("model.width and every entry of model.stages must be at least 1")
    return BUILDERS[name](**options)
