"""Do the package and its PyTorch twin compute the same numbers? The judge is the twin in float64.

Run as `python benchmarks/speed.py --check`. Three columns: how far the two float32 sides are apart, and how far each is from
the judge. A ReLU whose input is 0 up to rounding may open on one side and not on the other, which moves a gradient by far more
than rounding, and sign steps and many PGD steps enlarge that; so the claim is that ours is as near to the judge as PyTorch is.
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


def ours(case: sides.Case) -> dict:
    """What the package makes of a case: perturbations, metrics of one update, all that it changes, and the Fisher."""
    found = {f"perturbation_{n}": np.asarray(sides.Ours(with_norm(case, n)).attack()) - case.images for n in NORMS}
    side = sides.Ours(case)
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


def distance(actual, wanted, share: bool) -> float:
    """The largest difference, each array's relative to its largest magnitude; or the share of entries over 0.001 apart."""

    def one(a, w):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        return (np.abs(a - w) > 1e-3).mean() if share else np.abs(a - w).max() / max(np.abs(w).max(), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(one, actual, wanted)))


def differences(case: sides.Case) -> dict[str, list[float]]:
    """[ours to twin, ours to judge, twin to judge] of every quantity; for a case made with padding 0, which draws no crops."""
    case = dataclasses.replace(case, weights=WEIGHTS)
    a, b, judge = ours(case), theirs(case, torch.float32), theirs(case, torch.float64)
    pairs = ((a, b), (a, judge), (b, judge))
    # Sign steps of tiny gradients are a coin's toss: there the share of pixels counts, not the size.
    return {name: [distance(x[name], y[name], name == "perturbation_linf") for x, y in pairs] for name in judge}
