"""CLP, channel Lipschitz pruning (Zheng et al., ECCV 2022): prunes channels that could answer a small change strongly. No data.

A channel's Lipschitz bound is the largest singular value of its filter times the gain of the norm behind it; within a layer,
those far above the others are taken for the backdoor's.
"""

import jax
import numpy as np

from bibau_jax import train
from bibau_jax.data import ImageSet
from bibau_jax.defenses.protocol import Purified
from bibau_jax.defenses.pruning import check_network, count, outliers, prune
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier
from bibau_jax.models.classifier import at


def lipschitz(kernel: np.ndarray, scale: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Upper bounds of the Lipschitz constants of channels [C] of a normalised convolution.

    kernel [h, w, in, C]; scale and running variance [C] of the norm. Each filter is read as a matrix [in, h w]. A channel
    without variance says nothing and has bound 0.
    """
    height, width, inputs, channels = kernel.shape
    filters = np.asarray(kernel, np.float64).transpose(3, 2, 0, 1).reshape(channels, inputs, height * width)
    largest = np.linalg.norm(filters, ord=2, axis=(1, 2))
    gain = np.abs(scale) / np.sqrt(np.maximum(np.asarray(variance, np.float64), 1e-30))
    return np.where(np.asarray(variance) > 0, largest * gain, 0.0)


def check(num_classes: int, *, u: float = 3.0, **others) -> None:
    """Raises `UserError` on settings that `purify` cannot use."""
    if u < 0:
        raise UserError(f"clp.u must not be negative, got {u}")


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet | None = None,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    u: float = 3.0,
) -> Purified:
    """Prunes, with their biases, the channels whose Lipschitz bound is above mean + u std of their layer (the paper: u = 3).

    Convolutions and norms are paired as the network's description says. Looks at no image at all.
    """
    check_network(classifier)
    check(classifier.num_classes, u=u)
    variables, pruned = jax.device_get(variables), {}
    for pair in classifier.norms:
        kernel, norm = at(variables["params"], pair.conv)["kernel"], at(variables["params"], pair.norm)
        bounds = lipschitz(kernel, norm["scale"], at(variables["batch_stats"], pair.norm)["var"])
        pruned["/".join(pair.norm)] = outliers(bounds, u)
    return Purified(prune(classifier, variables, pruned, bias=True), [], told=count(pruned))
