"""The straight line between two models' weights, as in Min et al., NeurIPS 2024: is the backdoor only a step away?"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bibau_jax import parallel
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier

BATCH = 128
UPDATES = 60  # of running statistics, which keep nine tenths each time


def between(start, end, share: float):
    """(1 - t) start + t end for every parameter and running statistic."""
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, start, end)


@partial(jax.jit, static_argnames="classifier")
def _moments(classifier, variables, pixels):
    return classifier.apply(variables, parallel.shard(pixels), train=True).statistics


def recalibrated(classifier: Classifier, variables, images: np.ndarray) -> dict:
    """The variables with running statistics of their own on clean uint8 images [N, H, W, C].

    Statistics between two models are those of neither; they are brought up to date by UPDATES forward passes in train mode.
    UserError for fewer images than there are devices.
    """
    size = parallel.batch_of(min(BATCH, len(images)))
    if len(images) < size:
        raise UserError(f"new statistics need at least {size} images, there are {len(images)}")
    starts = range(0, len(images) - size + 1, size)
    for begin in itertools.islice(itertools.cycle(starts), UPDATES):
        batch = parallel.replicate(images[begin : begin + size])
        statistics = _moments(classifier, parallel.replicate(variables), batch)
        variables = {"params": variables["params"], "batch_stats": jax.tree.map(jnp.asarray, statistics)}
    return jax.device_get(variables)
