"""A network replaced by its tangent at given parameters (Eq. 4), and how far the two are apart after the same training.

f_lin(x; theta) = f(x; theta_0) + J(x) (theta - theta_0), BatchNorm in evaluation mode: running statistics belong to the point
of linearisation and stay as they are.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel, train
from bibau_jax.errors import UserError
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier
from bibau_jax.theory import flow, ntk, products

LOSSES = ("squared", "cross_entropy")


def outputs(classifier: Classifier, start, params, images: np.ndarray, *, batch_size: int = products.BATCH) -> np.ndarray:
    """The logits [N, classes] of the network linearised around `start` (its variables) at other parameters `params`."""
    direction = jax.tree.map(lambda end, begin: np.asarray(end) - np.asarray(begin), params, start["params"])
    here = train.logits(classifier.in_float32(), start, images, batch_size)
    return here + products.push(classifier, start, images, direction, batch_size=batch_size)


def parameters(classifier: Classifier, start, images: np.ndarray, coefficients: np.ndarray):
    """theta_0 + J(X)^T a: the linearised network's parameters after a training that `flow` found the coefficients of."""
    return jax.tree.map(np.add, jax.device_get(start["params"]), products.pull(classifier, start, images, coefficients))


def descend(
    classifier: Classifier, variables, images: np.ndarray, targets: np.ndarray, *, loss: str, step_size: float, steps: int
) -> dict:
    """The variables of the network itself after `steps` of gradient descent on all images at once, evaluation mode.

    `loss` is "squared" (|f - y|^2 / 2, `targets` [n, K]) or "cross_entropy" (`targets` labels [n]), summed over images.
    UserError for another loss, no images, targets that do not fit them, a step size that is not positive, or steps below 0.
    """
    if loss not in LOSSES:
        raise UserError(f'loss "{loss}" is unknown; choose one of {", ".join(LOSSES)}')
    classes = classifier.num_classes
    rows = np.shape(flow.one_hot(targets, classes) if loss == "cross_entropy" else targets)
    if not len(images) or rows != (len(images), classes):
        raise UserError(
            f"training on n images takes targets [n, {classes}], or n labels for the cross-entropy, not "
            f"{list(np.shape(targets))} for {len(images)}"
        )
    if not 0 < step_size < np.inf or steps < 0:
        raise UserError(f"step_size={step_size} must be positive and finite, steps={steps} not negative")
    targets = np.asarray(targets, np.int32 if loss == "cross_entropy" else np.float32)
    size = parallel.padded(len(images))
    weights = (np.arange(size) < len(images)).astype(np.float32)
    filled = [np.concatenate([a, np.zeros((size - len(a), *a.shape[1:]), a.dtype)]) for a in (np.asarray(images), targets)]
    state = parallel.replicate(dict(variables))
    given = parallel.replicate((*filled, weights))
    for _ in range(steps):
        state = _step(classifier.in_float32(), loss, state, given, step_size)
    return jax.device_get(state)


@partial(jax.jit, static_argnums=(0, 1))
def _step(classifier, loss, variables, given, step_size):
    images, targets, weights = parallel.shard(given)

    def total(params):
        logits = classifier.apply(variables | {"params": params}, images).logits
        if loss == "squared":
            each = ((logits - targets) ** 2).sum(1) / 2
        else:
            each = cross_entropy(logits, targets)
        return (weights * each).sum()

    with jax.default_matmul_precision("float32"):
        gradient = jax.grad(total)(variables["params"])
    return variables | {"params": jax.tree.map(lambda p, g: p - step_size * g, variables["params"], gradient)}


class Gap(NamedTuple):
    """How far a trained network is from its linearisation: |f - f_lin| / |f_lin - f_0| on training images and on others.

    `moved` is |theta - theta_0| / |theta_0|; `loss` what was left of the training loss, as a share of its start.
    """

    training: float
    others: float
    moved: float
    loss: float


def gap(
    classifier: Classifier,
    variables,
    images: np.ndarray,
    targets: np.ndarray,
    others: np.ndarray,
    *,
    steps: int = 200,
    largest: float = 0.5,
    gigabytes: float = 8.0,
) -> Gap:
    """Trains the network and its linearisation alike on the squared loss and compares their outputs.

    Both take `steps` of gradient descent whose size is `largest` over the kernel's largest eigenvalue; the linearised one in
    closed form. Goes to 0 as the network is made wider.
    """
    everything = np.concatenate([images, others])
    size = len(images) * classifier.num_classes
    block = ntk.kernel(classifier, variables, everything, images, gigabytes=gigabytes)
    start = train.logits(classifier.in_float32(), variables, everything)
    of = flow.spectrum(block[:size])
    step_size = largest / of.values[-1]
    found = flow.squared(of, start[: len(images)], targets, time=steps * step_size, step_size=step_size)
    linear = flow.moved(block, start, found)
    trained = descend(classifier, variables, images, targets, loss="squared", step_size=float(step_size), steps=steps)
    real = train.logits(classifier.in_float32(), trained, everything)
    first, rest = (_relative(real[part] - linear[part], linear[part] - start[part]) for part in _halves(len(images)))
    left = _relative(real[: len(images)] - targets, start[: len(images)] - targets) ** 2
    return Gap(first, rest, _distance(variables["params"], trained["params"]), left)


def _halves(count: int) -> tuple[slice, slice]:
    return slice(None, count), slice(count, None)


def _relative(difference: np.ndarray, scale: np.ndarray) -> float:
    return float(np.linalg.norm(difference) / np.linalg.norm(scale))


def _distance(start, end) -> float:
    square = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (start, end)), strict=True))
    return float(np.sqrt(square / sum(float(jnp.sum(a**2)) for a in jax.tree.leaves(start))))
