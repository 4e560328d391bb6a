"""What the tangent kernel does to a vector, without the kernel: for networks and image sets whose kernel does not fit.

`pull` is J^T v, `push` is J d, `product` is J J'^T v; `solve` inverts J J^T + ridge by conjugate gradients.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel, progress
from bibau_jax.models import Classifier

BATCH = 128


@partial(jax.jit, static_argnums=0)
def _pull(classifier, variables, pixels, vector):
    pixels, vector = parallel.shard((pixels, vector))
    with jax.default_matmul_precision("float32"):
        _, pull = jax.vjp(lambda params: classifier.apply(variables | {"params": params}, pixels).logits, variables["params"])
        return pull(vector)[0]


@partial(jax.jit, static_argnums=0)
def _push(classifier, variables, pixels, direction):
    def logits(params):
        return classifier.apply(variables | {"params": params}, parallel.shard(pixels)).logits

    with jax.default_matmul_precision("float32"):
        return jax.jvp(logits, (variables["params"],), (direction,))[1]


def pull(classifier: Classifier, variables, images: np.ndarray, vector: np.ndarray, *, batch_size: int = BATCH):
    """J^T v: the gradient of the inner product of all logits with `vector` [N, classes], a pytree like the parameters."""
    classifier, variables, total = classifier.in_float32(), parallel.replicate(dict(variables)), None
    # The filled-up rows of the last batch carry zeros, and so add nothing.
    for (pixels, part), _ in parallel.blocks(batch_size, images, np.asarray(vector, np.float32)):
        found = _pull(classifier, variables, pixels, part)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return jax.device_get(total)


def push(classifier: Classifier, variables, images: np.ndarray, direction, *, batch_size: int = BATCH) -> np.ndarray:
    """J d: how fast every logit [N, classes] changes as the parameters move along `direction`, a pytree like them."""
    classifier, found = classifier.in_float32(), []
    variables, direction = parallel.replicate((dict(variables), direction))
    for (pixels,), count in parallel.blocks(batch_size, images):
        found.append(parallel.gather(_push(classifier, variables, pixels, direction))[:count])
    return np.concatenate(found)


def product(classifier: Classifier, variables, images, others, vector, *, batch_size: int = BATCH) -> np.ndarray:
    """K v = J J'^T v, [N, classes], for `vector` [M, classes] over the `others` [M, H, W, C]."""
    direction = pull(classifier, variables, others, vector, batch_size=batch_size)
    return push(classifier, variables, images, direction, batch_size=batch_size)


class Solution(NamedTuple):
    """What conjugate gradients found: the vector, the norm of what is left over that of the right-hand side, and the steps."""

    vector: np.ndarray
    residual: float
    steps: int


def solve(
    classifier: Classifier,
    variables,
    images: np.ndarray,
    residual: np.ndarray,
    *,
    ridge: float = 0.0,
    tolerance: float = 1e-4,
    steps: int = 100,
    batch_size: int = BATCH,
    show: bool = False,
) -> Solution:
    """a of (J J^T + ridge) a = residual [N, classes], by conjugate gradients; one `product` a step.

    Ends where what is left is below `tolerance`, or after `steps`; look at `Solution.residual`. Float32 products carry it to
    about 1e-4 where there is no ridge.
    """
    goal = np.asarray(residual, np.float64)
    found, left = np.zeros_like(goal), goal.copy()
    direction, square = left.copy(), np.vdot(left, left)
    size, taken = np.linalg.norm(goal), 0
    with progress.bar(steps, "conjugate gradients", show=show and parallel.is_lead()) as bar:
        while taken < steps and np.sqrt(square) > tolerance * size:
            image = product(classifier, variables, images, images, direction, batch_size=batch_size) + ridge * direction
            length = square / np.vdot(direction, image)
            found, left = found + length * direction, left - length * image
            before, square, taken = square, np.vdot(left, left), taken + 1
            direction = left + square / before * direction
            bar.advance(left=np.sqrt(square) / size)
    return Solution(found, float(np.sqrt(square) / size) if size else 0.0, taken)
