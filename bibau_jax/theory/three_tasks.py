"""Three linear tasks, clean -> backdoor -> unlearning, in closed form: when unlearning is complete, and by how much it fails.

python -m bibau_jax.theory.three_tasks --out=results/theory

The paper sketches this (Fig. 2) and does not compute it. Clean inputs have the features c_i, orthonormal; triggered ones
b_i = cos(tilt) e_i + sin(tilt) c_i, where e_i is orthogonal to every clean feature. Every task is learned to the end by the
linearised model (`drift.stream`). The backdoor moves the outputs of b_i by a_i; all drifts are from the clean model, in shares
of |a|.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bibau_jax import records
from bibau_jax.errors import UserError, unknown
from bibau_jax.theory import drift

COUNT = 8  # inputs of each task
TILTS = tuple(float(angle) for angle in range(0, 91, 5))


class Drifts(NamedTuple):
    """|f - f_clean| over |a|, on clean inputs and on triggered ones (Eq. 9 asks for 0 and 0)."""

    clean: float
    triggered: float


def _turned(tilt, turn):
    return np.sin(tilt) * np.sin(turn) ** 2, np.sin(turn) ** 2


# What each third task leaves behind, from `tilt` (of the backdoor towards the clean task) and `turn` (of the unlearning inputs
# away from the triggered ones, into directions that neither task has), in radians.
PREDICTED = {
    "nothing": lambda tilt, turn: (np.sin(tilt), 1.0),
    "clean": lambda tilt, turn: (0.0, np.cos(tilt) ** 2),
    "orthogonal": lambda tilt, turn: (np.sin(tilt), np.sin(tilt) ** 2),
    "orthogonal_and_clean": lambda tilt, turn: (0.0, 0.0),
    "parallel": _turned,
}


def predicted(unlearning: str, *, tilt: float = 0.0, turn: float = 0.0) -> Drifts:
    """The drifts that are left by formula; angles in degrees. For the names and their tasks see `measured`.

    UserError for a name that is not among PREDICTED.
    """
    _check(unlearning)
    return Drifts(*map(float, PREDICTED[unlearning](*np.radians([tilt, turn]))))


def _check(unlearning: str) -> None:
    if unlearning not in PREDICTED:
        raise unknown("unlearning task", unlearning, PREDICTED)


def measured(unlearning: str, *, tilt: float = 0.0, turn: float = 0.0, count: int = COUNT, seed: int = 0) -> Drifts:
    """The drifts that are left after the three tasks were learned, each of `count` inputs with random targets.

    The third task's targets are what the clean model says of its inputs (Proposition 4.3). Its inputs have the features:
    "clean" c_i, as fine-tuning; "orthogonal" e_i, orthogonal to the clean task (Proposition 4.2, second condition);
    "orthogonal_and_clean" both; "parallel" cos(turn) b_i + sin(turn) g_i with g_i foreign to both tasks (first condition);
    "nothing" has none. UserError for a name that is not among PREDICTED.
    """
    _check(unlearning)
    features = _features(tilt, turn, count, seed)
    inputs = np.concatenate(list(features.values()))
    rows = {name: np.arange(count) + index * count for index, name in enumerate(features)}
    rng, start = np.random.default_rng(seed + 1), np.zeros((len(inputs), 1))
    wanted = rng.normal(size=(2, count, 1))
    tasks = [drift.Task(rows["clean"], wanted[0]), drift.Task(rows["triggered"], wanted[1])]
    clean, backdoored = drift.stream(inputs @ inputs.T, start, tasks)[1:]
    third = {"orthogonal_and_clean": ["orthogonal", "clean"], "nothing": []}.get(unlearning, [unlearning])
    chosen = np.concatenate([rows[name] for name in third]) if third else np.zeros(0, int)
    last = drift.stream(inputs @ inputs.T, backdoored, [drift.Task(chosen, clean[chosen])])[1] if third else backdoored
    implanted = drift.catastrophic_forgetting((backdoored - clean)[rows["triggered"]])
    left = (drift.catastrophic_forgetting((last - clean)[rows[name]]) for name in ("clean", "triggered"))
    return Drifts(*(float(np.sqrt(each / implanted)) for each in left))


def _features(tilt: float, turn: float, count: int, seed: int) -> dict[str, np.ndarray]:
    """The features [count, 4 count] of each kind of inputs, in a basis drawn at random."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(4 * count, 4 * count)))
    clean, trigger, foreign = (basis[index * count : (index + 1) * count] for index in range(3))
    tilt, turn = np.radians([tilt, turn])
    triggered = np.cos(tilt) * trigger + np.sin(tilt) * clean
    parallel = np.cos(turn) * triggered + np.sin(turn) * foreign
    return {"clean": clean, "triggered": triggered, "orthogonal": trigger, "parallel": parallel}


def study() -> dict:
    """Both drifts of every unlearning task over the tilt, and of the parallel one over its turn: measured and predicted."""
    found = {}
    for name in PREDICTED:
        pairs = [(measured(name, tilt=tilt), predicted(name, tilt=tilt)) for tilt in TILTS]
        found[name] = _columns("tilt", pairs)
    pairs = [(measured("parallel", tilt=30.0, turn=turn), predicted("parallel", tilt=30.0, turn=turn)) for turn in TILTS]
    return found | {"parallel_turned": _columns("turn", pairs)}


def _columns(angle: str, pairs) -> dict[str, list[float]]:
    columns = {angle: list(TILTS)}
    for index, kind in enumerate(("measured", "predicted")):
        for name in Drifts._fields:
            columns[f"{name}_{kind}"] = [getattr(pair[index], name) for pair in pairs]
    return columns


def main(arguments=None) -> None:
    """The command line."""
    from bibau_jax.cli import fail
    from bibau_jax.report import theory

    parser = argparse.ArgumentParser(prog="python -m bibau_jax.theory.three_tasks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the record and the picture")
    out = parser.parse_args(arguments).out
    command = shlex.join(["python", "-m", "bibau_jax.theory.three_tasks", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        told = records.write_study(out / "three_tasks.json", "three_tasks", command, {"count": COUNT, "seed": 0}, study())
        print(theory.three_tasks(told.found, out / "three_tasks.png"))
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
