"""The diagonal Fisher information of a classifier over a set of images, on all devices (Eq. 23-25)."""

from collections.abc import Callable
from functools import cache

import jax
import numpy as np

from bibau_jax import parallel
from bibau_jax.method import fisher
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import Classifier


def diagonal_fisher(classifier: Classifier, variables, images, labels, *, chunk: int = 32):
    """Mean over images of (d log p(label | image) / d params)^2, a pytree like the parameters; float32, evaluation mode.

    Args:
      images: [N, H, W, C] pixels 0..255. labels: [N] classes whose likelihood is taken.
      chunk: per-example gradients held at a time on a device; memory is `chunk` copies of the parameters.
    """
    summed = _summed(classifier.in_float32(), chunk, parallel.mesh())
    variables, size = parallel.replicate(dict(variables)), len(images)
    examples = _pad((np.asarray(images), np.asarray(labels)), parallel.padded(size, chunk))
    total = summed(variables, parallel.replicate(examples))
    return jax.tree.map(lambda leaf: leaf / size, total)


def _pad(arrays, block):
    size = len(arrays[0])
    weights = (np.arange(block) < size).astype(np.float32)
    return *(np.concatenate([a, np.zeros((block - size, *a.shape[1:]), a.dtype)]) for a in arrays), weights


@cache
def _summed(classifier: Classifier, chunk: int, mesh) -> Callable:  # the mesh is part of the cache's key
    def total(variables, examples):
        images, labels, weights = examples
        statistics = variables["batch_stats"]

        def log_likelihood(params, example):
            pixels, label = example
            logits = classifier.apply({"params": params, "batch_stats": statistics}, pixels[None]).logits
            return -cross_entropy(logits, label[None])[0]

        return fisher.sum_of_squared_gradients(log_likelihood, variables["params"], (images, labels), weights, chunk=chunk)

    return parallel.sum_over_devices(total)
