"""Do the package and its PyTorch twin compute the same numbers? The judge is the twin in float64.

Run as `python benchmarks/speed.py --check`. Three columns: how far the two float32 sides are apart, and how far each is from
the judge. A ReLU whose input is 0 up to rounding may open on one side and not on the other, which moves a gradient by far more
than rounding, and every further PGD step enlarges that. So the batches are small and the steps few, several batches are drawn,
and the median over them is what counts; the largest is printed beside it.
"""

import dataclasses

import jax
import numpy as np
import optax
import sides
import torch
import twin

# L_iewc awake (Q > 1/c) on a network that barely moved, and its gradient of the size of the others'.
WEIGHTS = sides.FULL._replace(iewc=1e-5, iewc_cap=1e5)
NORMS = ("l2", "linf")


def with_norm(case: sides.Case, norm: str) -> sides.Case:
    """The same case with the perturbation bounded in another norm."""
    return dataclasses.replace(case, perturbation=case.perturbation._replace(norm=norm))


def ours(case: sides.Case, attacks: dict[str, sides.Ours]) -> dict:
    """What the package makes of a case: perturbations, metrics of one update, all that it changes, and the Fisher."""
    found = {}
    for norm, side in attacks.items():
        side.restart(with_norm(case, norm))
        found[f"perturbation_{norm}"] = np.asarray(side.attack()) - case.images
    side = attacks["l2"]
    metrics = side.update()
    assert metrics["iewc_awake"] == 1.0
    momentum = optax.tree_utils.tree_get(side.state.opt_state, "trace")
    changed = {"params": side.state.params, "batch_stats": side.state.statistics, "momentum": momentum}
    return jax.device_get({**found, **metrics, **changed, "fisher": side.fisher()})


def theirs(case: sides.Case, dtype) -> dict:
    """What the twin makes of it in `dtype`, under the package's names."""
    found = {
        f"perturbation_{n}": twin.to_numpy(sides.Theirs(with_norm(case, n), dtype=dtype).attack()) - case.images for n in NORMS
    }
    side = sides.Theirs(case, dtype=dtype)
    fisher = twin.tree_of(side.net, side.fisher())
    metrics = {name: float(value) for name, value in side.update().items()}
    momentum = {name: side.optimizer.state[p]["momentum_buffer"] for name, p in side.net.named_parameters()}
    changed = {**twin.variables_of(side.net), "momentum": twin.tree_of(side.net, momentum)}
    return {**found, **metrics, **changed, "fisher": fisher}


def distance(actual, wanted) -> float:
    """The largest difference, each array's relative to its largest magnitude."""

    def one(a, w):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        return np.abs(a - w).max() / max(np.abs(w).max(), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(one, actual, wanted)))


def differences(case: sides.Case, draws: int = 7) -> dict[str, np.ndarray]:
    """[draws, 3] of every quantity: ours to twin, ours to judge, twin to judge, on so many batches of random images.

    For a case made with padding 0: the two sides draw different crops.
    """
    case = dataclasses.replace(case, weights=WEIGHTS)
    attacks = {norm: sides.Ours(with_norm(case, norm)) for norm in NORMS}
    found: dict[str, list] = {}
    for seed in range(draws):
        images = np.random.default_rng(seed).integers(0, 256, case.images.shape, np.uint8)
        drawn = dataclasses.replace(case, images=images)
        a, b, judge = ours(drawn, attacks), theirs(drawn, torch.float32), theirs(drawn, torch.float64)
        for name in judge:
            found.setdefault(name, []).append([distance(x[name], y[name]) for x, y in ((a, b), (a, judge), (b, judge))])
    return {name: np.array(rows) for name, rows in found.items()}
