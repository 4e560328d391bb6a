"""How far two tasks share their tangent space: the NTK overlap matrix (Doan et al., AISTATS 2021), from kernels alone.

With phi(X) = U Sigma V^T the Jacobian of a task's outputs, O = V_S^T V_k has the cosines of the principal angles between both
tasks' tangent spaces as its singular values. V has a column for every parameter and is never formed:
O = Sigma_S^-1 U_S^T K_Sk U_k Sigma_k^-1.
"""

from typing import NamedTuple

import numpy as np

from bibau_jax.theory import flow

CUT = 1e-6  # eigenvalues below this share of the largest are rounding: kernels come from float32 Jacobians


class Overlap(NamedTuple):
    """Two tasks' shared tangent space in scalars, each 0..1 but the angle: 0 for orthogonal tasks, 1 for a task with itself.

    `frobenius`: |O|_F^2 over the smaller rank, the mean squared cosine. `spectral`: |O|_2, the largest cosine.
    `angle`: mean principal angle in degrees, 0..90. `energy`: the share of the first task's squared gradients that lies in the
    second's tangent space, sum_i sigma_i^2 |O_i|^2 / sum_i sigma_i^2. `cosines`: all singular values, descending.
    `ranks`: how many directions each task has above CUT.
    """

    frobenius: float
    spectral: float
    angle: float
    energy: float
    cosines: np.ndarray
    ranks: tuple[int, int]


def matrix(first: np.ndarray, second: np.ndarray, between: np.ndarray, *, cut: float = CUT) -> np.ndarray:
    """The overlap matrix O, float64 [rank of the first, rank of the second], by descending eigenvalues.

    `first` and `second` are the kernels of each task with itself, `between` that of the first with the second.
    """
    (values, vectors), (others, axes) = _kept(first, cut), _kept(second, cut)
    return (vectors.T @ np.asarray(between, np.float64) @ axes) / np.sqrt(np.outer(values, others))


def overlap(first: np.ndarray, second: np.ndarray, between: np.ndarray, *, cut: float = CUT) -> Overlap:
    """The scalars of `matrix`; cosines that rounding puts above 1 are taken as 1."""
    found = matrix(first, second, between, cut=cut)
    cosines = np.clip(np.linalg.svd(found, compute_uv=False), 0.0, 1.0)
    values = _kept(first, cut).values
    shares = np.minimum((found**2).sum(1), 1.0)
    return Overlap(
        frobenius=float(np.mean(cosines**2)),
        spectral=float(cosines[0]),
        angle=float(np.degrees(np.arccos(cosines)).mean()),
        energy=float(values @ shares / values.sum()),
        cosines=cosines,
        ranks=found.shape,
    )


def forgetting_bound(
    first: np.ndarray, found: np.ndarray, second: np.ndarray, residual: np.ndarray, *, cut: float = CUT
) -> float:
    """An upper bound on the catastrophic forgetting of the first task when the second is fitted to the end.

    (sigma_1 |O|_2 |Sigma_k^-1 U_k^T y~|)^2, from the overlap matrix `found` and the residual y~ [n, K] that the second task
    meets.
    """
    (values, _), (others, axes) = _kept(first, cut), _kept(second, cut)
    pushed = (axes.T @ np.asarray(residual, np.float64).reshape(-1)) / np.sqrt(others)
    return float(values[0] * np.linalg.norm(found, 2) ** 2 * (pushed @ pushed))


def _kept(kernel: np.ndarray, cut: float) -> flow.Spectrum:
    """The eigenvalues above `cut` times the largest, descending, with their eigenvectors."""
    of = flow.spectrum(kernel)
    above = np.flatnonzero(of.values > cut * of.values[-1])[::-1]
    return flow.Spectrum(of.values[above], of.vectors[:, above])


def shuffled(images: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Images [N, H, W, C] whose pixels change places, differently in each: what two tasks share that share no image content."""
    rng, (count, height, width, channels) = np.random.default_rng(seed), images.shape
    order = np.argsort(rng.random((count, height * width)), axis=1)[..., None]
    return np.take_along_axis(images.reshape(count, -1, channels), order, 1).reshape(images.shape)
