"""Training of a linearised network by gradient flow, in the space of its outputs (Lee et al., NeurIPS 2019; Eq. 4).

A linearised network is moved along J^T alone: after any training on inputs X its parameters are theta_0 + J(X)^T a, and its
outputs elsewhere f_0(x) + K(x, X) a. The functions here find the coefficients a [n, K], in float64, for the losses summed over
samples and outputs; divide times by their number for mean losses.
"""

from typing import NamedTuple

import numpy as np
from scipy import integrate, special

from bibau_jax.errors import UserError

CUT = 1e-6  # eigenvalues below this share of the largest are rounding: kernels come from float32 Jacobians


class Spectrum(NamedTuple):
    """A kernel's eigenvalues [m], ascending and not negative, and its eigenvectors [m, m] in columns; float64."""

    values: np.ndarray
    vectors: np.ndarray


def spectrum(kernel: np.ndarray) -> Spectrum:
    """The eigendecomposition of a symmetric kernel [m, m] in float64; negative eigenvalues, which are rounding, become 0.

    UserError for a kernel that is empty, not finite or not symmetric.
    """
    kernel = np.asarray(kernel, np.float64)
    if not np.isfinite(kernel).all():
        raise UserError("the kernel holds numbers that are not finite")
    if (
        kernel.ndim != 2
        or not kernel.size
        or kernel.shape[0] != kernel.shape[1]
        or not np.allclose(kernel, kernel.T, atol=1e-4 * np.abs(kernel).max())
    ):
        raise UserError(f"a spectrum needs the symmetric kernel of a set with itself, not one of shape {list(kernel.shape)}")
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    return Spectrum(np.maximum(values, 0.0), vectors)


def squared(
    of: Spectrum,
    start: np.ndarray,
    targets: np.ndarray,
    *,
    time: float = np.inf,
    ridge: float = 0.0,
    step_size: float = 0.0,
    cut: float = CUT,
) -> np.ndarray:
    """The coefficients a [n, K] after gradient flow for `time` on |f - y|^2 / 2, in closed form.

    a = (1 - exp(-(K + ridge) t)) (K + ridge)^-1 (y - f_0). At infinite time this is kernel regression, by the pseudo-inverse
    where there is no ridge.

    Args:
      start: outputs f_0 [n, K] of the training inputs. targets: y [n, K], e.g. centred one-hot rows.
      ridge: weight of |theta - theta_0|^2 / 2 beside the loss.
      step_size: above 0, gradient descent by time / step_size such steps instead of the flow.
      cut: at infinite time, eigenvalues of K + ridge below this share of the largest are left out.

    UserError for shapes that do not fit the kernel, a negative time or ridge, and a step that is negative, not below one over
    the largest eigenvalue, or not contained in the time a whole number of times.
    """
    if not ridge >= 0:
        raise UserError(f"ridge={ridge} must not be negative")
    values = of.values + ridge
    _check(values, start, targets, time, step_size)
    # A step of gradient descent multiplies what is left by 1 - step_size * value, a flow as long by exp(-step_size * value).
    rates = -np.log1p(-step_size * values) / step_size if step_size else values
    known = values > (0.0 if np.isfinite(time) else cut * values.max())
    safe = np.where(known, values, 1.0)
    slow = time if np.isfinite(time) else 0.0
    grown = np.where(known, -np.expm1(-np.where(known, rates, 1.0) * time) / safe, slow)
    residual = (np.asarray(targets, np.float64) - start).reshape(-1)
    return (of.vectors @ (grown * (of.vectors.T @ residual))).reshape(np.shape(start))


def cross_entropy(
    kernel: np.ndarray, start: np.ndarray, labels: np.ndarray, *, time: float, step_size: float = 0.0
) -> np.ndarray:
    """The coefficients a [n, K] after gradient flow for `time` on the summed cross-entropy, integrated numerically.

    da/dt = onehot(y) - softmax(f_0 + K a), by an adaptive Runge-Kutta method; with `step_size`, by gradient descent instead.
    `labels` [n] are 0..K-1. UserError as for `squared` and `spectrum`, and for an infinite time, labels out of that range, or a
    flow that cannot be followed.
    """
    shape, truth = np.shape(start), one_hot(labels, np.shape(start)[-1])
    _check(spectrum(kernel).values, start, truth, time, step_size)
    if not np.isfinite(time):
        raise UserError("cross-entropy has no end of its flow: give a finite time")

    def change(_, flat):
        return (truth - special.softmax(moved(kernel, start, flat.reshape(shape)), axis=1)).reshape(-1)

    coefficients = np.zeros(truth.size)
    if step_size:
        for _ in range(round(time / step_size)):
            coefficients += step_size * change(0.0, coefficients)
        return coefficients.reshape(shape)
    if time == 0:
        return coefficients.reshape(shape)
    found = integrate.solve_ivp(change, (0.0, time), coefficients, rtol=1e-6, atol=1e-9, t_eval=(time,))
    if not found.success:
        raise UserError(f"the flow of the cross-entropy could not be followed to time {time}: {found.message}")
    return found.y[:, -1].reshape(shape)


def _check(values: np.ndarray, start: np.ndarray, targets: np.ndarray, time: float, step_size: float) -> None:
    """Raises `UserError` unless outputs and targets fit the kernel with these eigenvalues, and so do the time and its steps."""
    if np.shape(start) != np.shape(targets) or np.size(start) != len(values):
        raise UserError(
            f"outputs {list(np.shape(start))} and targets {list(np.shape(targets))} must be of one shape, with as many "
            f"numbers as the kernel has rows, {len(values)}"
        )
    if not time >= 0:
        raise UserError(f"time={time} must not be negative")
    if not 0 <= step_size < np.inf:
        raise UserError(f"step_size={step_size} must be finite and not negative")
    if step_size * values.max() >= 1:
        raise UserError(f"step_size must stay below {1 / values.max():.3g}, one over the kernel's largest eigenvalue")
    steps = time / step_size if step_size and np.isfinite(time) else 0
    if abs(steps - round(steps)) > 1e-6 * steps:
        raise UserError(f"time={time:g} is no whole number of steps of step_size={step_size:g}")


def moved(block: np.ndarray, start: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Outputs [N, K] of inputs whose kernel with the training inputs is `block` [N K, n K]: f_0(x) + K(x, X) a."""
    return np.asarray(start, np.float64) + (block @ coefficients.reshape(-1)).reshape(np.shape(start))


def one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """1 for the true class and 0 for the others, float64 [n, K]; UserError unless `labels` [n] are 0..K-1."""
    found = (np.asarray(labels)[..., None] == np.arange(num_classes)).astype(np.float64)
    if found.ndim != 2 or not found.any(1).all():
        raise UserError(f"labels must be one whole number from 0 to {num_classes - 1} for each image")
    return found


def centred_one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Targets for the squared loss: 1 - 1/K for the true class and -1/K for the others, [n, K]; errors as `one_hot`."""
    return one_hot(labels, num_classes) - 1 / num_classes
