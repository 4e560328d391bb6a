"""How far two tasks share their tangent space: the NTK overlap matrix (Doan et al., AISTATS 2021), from kernels alone.

With phi(X) = U Sigma V^T the Jacobian of a task's outputs, O = V_S^T V_k has the cosines of the principal angles between both
tasks' tangent spaces as its singular values. V has a column for every parameter and is never formed:
O = Sigma_S^-1 U_S^T K_Sk U_k Sigma_k^-1.
"""

from typing import NamedTuple

import numpy as np

from bibau_jax.errors import UserError
from bibau_jax.theory import drift, flow


class Overlap(NamedTuple):
    """Two tasks' shared tangent space in scalars, each 0..1 but the angle: 0 for orthogonal tasks, 1 for a task with itself.

    `frobenius`: |O|_F^2 over the smaller rank, the mean squared cosine. `spectral`: |O|_2, the largest cosine.
    `angle`: mean principal angle in degrees, 0..90. `energy`: the share of the first task's squared gradients that lies in the
    second's tangent space, sum_i sigma_i^2 |O_i|^2 / sum_i sigma_i^2. `cosines`: all singular values, descending.
    `ranks`: how many directions each task has above the cut.
    """

    frobenius: float
    spectral: float
    angle: float
    energy: float
    cosines: np.ndarray
    ranks: tuple[int, int]


def matrix(first: np.ndarray, second: np.ndarray, between: np.ndarray, *, cut: float = flow.CUT) -> np.ndarray:
    """The overlap matrix O, float64 [rank of the first, rank of the second], by descending eigenvalues.

    `first` and `second` are the kernels of each task with itself, `between` that of the first with the second. Directions count
    whose eigenvalue is above `cut` times the largest. UserError for kernels that are zero, or not symmetric and finite.
    """
    return _matrix(_kept(first, cut), _kept(second, cut), between)


def _matrix(one: flow.Spectrum, other: flow.Spectrum, between: np.ndarray) -> np.ndarray:
    shared = one.vectors.T @ np.asarray(between, np.float64) @ other.vectors
    return shared / np.sqrt(np.outer(one.values, other.values))


def overlap(first: np.ndarray, second: np.ndarray, between: np.ndarray, *, cut: float = flow.CUT) -> Overlap:
    """The scalars of `matrix`, with its errors; cosines that rounding puts above 1 are taken as 1."""
    one, other = _kept(first, cut), _kept(second, cut)
    found = _matrix(one, other, between)
    cosines = np.clip(np.linalg.svd(found, compute_uv=False), 0.0, 1.0)
    shares = np.minimum((found**2).sum(1), 1.0)
    return Overlap(
        frobenius=float(np.mean(cosines**2)),
        spectral=float(cosines[0]),
        angle=float(np.degrees(np.arccos(cosines)).mean()),
        energy=float(one.values @ shares / one.values.sum()),
        cosines=cosines,
        ranks=found.shape,
    )


def forgetting_bound(
    kernel: np.ndarray,
    tasks: list[drift.Task],
    outputs: list[np.ndarray],
    *,
    ridge: float = 0.0,
    cut: float = flow.CUT,
) -> float:
    """An upper bound on the catastrophic forgetting (Eq. 6) of the first task of a stream by all later ones, from overlaps.

    (sigma_1 sum_k |O_k|_2 |M_k y~_k|)^2 with M_k = Sigma_k (Sigma_k^2 + ridge)^-1 U_k^T (after Doan et al., 2021), O_k the
    overlap of the first task with task k, and y~_k the residual that task k finds. It holds for tasks learned for any time.

    Args:
      kernel, tasks, ridge: what `drift.stream` was given. outputs: what it returned.
      cut: directions below this share of a kernel's largest eigenvalue do not count. UserError as for `matrix`.
    """
    rows = [drift.kernel_rows(task.rows, outputs[0].shape[1]) for task in tasks]
    first, reach = _kept(kernel[np.ix_(rows[0], rows[0])], cut), 0.0
    for own, task, found in zip(rows[1:], tasks[1:], outputs[1:-1], strict=True):
        later = _kept(kernel[np.ix_(own, own)], cut)
        shared = _matrix(first, later, kernel[np.ix_(rows[0], own)])
        residual = later.vectors.T @ (task.targets - found[task.rows]).reshape(-1)
        pushed = np.sqrt(later.values) / (later.values + ridge) * residual
        reach += np.linalg.norm(shared, 2) * np.linalg.norm(pushed)
    return float(first.values[0] * reach**2)


def _kept(kernel: np.ndarray, cut: float) -> flow.Spectrum:
    """The eigenvalues above `cut` times the largest, descending, with their eigenvectors."""
    of = flow.spectrum(kernel)
    if not 0 <= cut < 1 or of.values[-1] == 0:
        raise UserError(f"an overlap needs kernels that are not zero, and 0 <= cut < 1, not cut={cut:g}")
    above = np.flatnonzero(of.values > cut * of.values[-1])[::-1]
    return flow.Spectrum(of.values[above], of.vectors[:, above])


def shuffled(images: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Images [N, H, W, C] whose pixels change places, differently in each: what two tasks share that share no image content."""
    rng, (count, height, width, channels) = np.random.default_rng(seed), images.shape
    order = np.argsort(rng.random((count, height * width)), axis=1)[..., None]
    return np.take_along_axis(images.reshape(count, -1, channels), order, 1).reshape(images.shape)
