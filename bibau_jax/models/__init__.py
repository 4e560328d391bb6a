"""Networks by file and function name: `models.build("resnet18", ...)` gives a `Classifier`."""

import inspect

from bibau_jax.errors import UserError, unknown
from bibau_jax.models.classifier import Classifier, NormOfConv, Outputs
from bibau_jax.models.preact_resnet import preact_resnet18
from bibau_jax.models.resnet import resnet18, resnet18_imagenet, resnet20
from bibau_jax.models.vgg import vgg19_bn
from bibau_jax.models.vit import clip_vit_b_32, vit_b_32
from bibau_jax.models.wide_resnet import wide_resnet16

__all__ = ["Classifier", "NormOfConv", "Outputs", "build", "names", "options"]

BUILDERS = {
    "resnet18": resnet18,
    "resnet18_imagenet": resnet18_imagenet,
    "resnet20": resnet20,
    "preact_resnet18": preact_resnet18,
    "wide_resnet16": wide_resnet16,
    "vgg19_bn": vgg19_bn,
    "vit_b_32": vit_b_32,
    "clip_vit_b_32": clip_vit_b_32,
}


def names() -> list[str]:
    """The networks that `build` knows."""
    return sorted(BUILDERS)


def check(name: str) -> None:
    """Refuses a name that `build` does not know."""
    if name not in BUILDERS:
        raise unknown("model", name, names())


def options(name: str) -> dict:
    """The options that a network has of its own, with their defaults: "width", "stages", and what else its function takes."""
    check(name)
    parameters = inspect.signature(BUILDERS[name]).parameters
    return {option: parameter.default for option, parameter in parameters.items() if parameter.default is not parameter.empty}


def build(name: str, **given) -> Classifier:
    """The network `name` as a `Classifier`; what is `given` goes to its function. Unknown names and options: `UserError`."""
    known = options(name)
    for option in given.keys() - known.keys() - {"num_classes", "image_shape"}:
        raise UserError(f"model.{option} is no setting of {name}; it has {', '.join(known)}")
    if min(given.get("stages", (1,)), default=0) < 1 or given.get("width", 1) < 1:
        raise UserError("model.width and every entry of model.stages must be at least 1")
    for option in ("heads", "hidden"):
        if given.get(option, 0) < 0:
            raise UserError(f"model.{option} must not be negative, got {given[option]}")
    return BUILDERS[name](**given)
