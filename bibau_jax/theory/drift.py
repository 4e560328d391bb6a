"""Drift and catastrophic forgetting (Eq. 5-7; Doan et al., AISTATS 2021): of trained models, and in closed form.

Drift is what training on later tasks changes in the outputs of an earlier task's inputs; forgetting is its squared norm.
"""

from typing import NamedTuple

import numpy as np

from bibau_jax import train
from bibau_jax.errors import UserError
from bibau_jax.models import Classifier
from bibau_jax.theory import flow


def drift(classifier: Classifier, earlier, later, images: np.ndarray) -> np.ndarray:
    """f_later(x) - f_earlier(x) of the logits, float32 [N, classes] (Eq. 5); `earlier` and `later` are variables."""
    ends = (train.logits(classifier.in_float32(), variables, images) for variables in (later, earlier))
    return np.subtract(*ends)


def catastrophic_forgetting(drifted: np.ndarray) -> float:
    """The squared norm of a drift [N, classes] over all images and outputs (Eq. 6): no loss of accuracy, but of outputs."""
    return float(np.sum(np.square(drifted, dtype=np.float64)))


class Task(NamedTuple):
    """One task of a stream: `rows` [n] of the inputs that the kernel is of, and what they are trained towards [n, classes]."""

    rows: np.ndarray
    targets: np.ndarray


def stream(
    kernel: np.ndarray,
    start: np.ndarray,
    tasks: list[Task],
    *,
    ridge: float = 0.0,
    time: float = np.inf,
    step_size: float = 0.0,
    cut: float = flow.CUT,
) -> list[np.ndarray]:
    """Outputs of all inputs before the tasks and after each of them, learned in turn by the linearised network (Eq. 4, 7).

    f_k(x) = f_{k-1}(x) + K(x, X_k) a_k, where a_k are `flow.squared`'s coefficients for the residual that task k finds. The
    difference of two entries is the drift of the tasks between them.

    Args:
      kernel: [N K, N K] over the inputs of all tasks and any others. start: outputs f_0 [N, K] of all of them.
      ridge, time, step_size, cut: of every task's training, as `flow.squared` takes them.

    UserError for a task without inputs, and as for `flow.squared`.
    """
    found = [np.asarray(start, np.float64)]
    for rows, targets in tasks:
        if not len(rows):
            raise UserError(f"task {len(found)} of the stream has no inputs")
        flat = kernel_rows(rows, np.shape(start)[1])
        of = flow.spectrum(kernel[np.ix_(flat, flat)])
        coefficients = flow.squared(of, found[-1][rows], targets, ridge=ridge, time=time, step_size=step_size, cut=cut)
        found.append(flow.moved(kernel[:, flat], found[-1], coefficients))
    return found


def kernel_rows(rows: np.ndarray, classes: int) -> np.ndarray:
    """The rows of a kernel [N K, N K] that belong to the inputs at `rows` [n], [n K]."""
    return (np.asarray(rows)[:, None] * classes + np.arange(classes)).reshape(-1)
