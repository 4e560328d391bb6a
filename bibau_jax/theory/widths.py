"""Drift and forgetting of real networks of several widths against their linearised prediction, over three tasks.

python -m bibau_jax.theory.widths --out=results/theory

Clean digits, then triggered ones with the attacker's label, then triggered ones with their true labels, each learned by
gradient descent on the squared loss; the linearisation at the start predicts all three (`drift.stream`).
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

from bibau_jax import attacks, data, keys, models, parallel, progress, records, train
from bibau_jax.errors import UserError
from bibau_jax.theory import drift, flow, linearize, ntk, path

WIDTHS = (4, 16, 64)
NETWORK = {"num_classes": 10, "image_shape": (16, 16, 1), "mean": (0.305,), "std": (0.376,), "stages": (1,)}
TASKS = ("clean", "backdoor", "unlearning")


def inputs(seed: int, *, clean: int = 20, triggered: int = 10) -> tuple[np.ndarray, list[drift.Task], dict[str, np.ndarray]]:
    """(images, the three tasks, the rows of each kind of images); as many unseen ones follow those of the tasks.

    Kinds: `clean` and `triggered`, which are trained on, `unseen_clean` and `unseen_triggered`, which are not.
    """
    digits = data.load("digits")
    order = np.random.default_rng(seed).permutation(len(digits.train))
    attack = attacks.get("badnets").make(keys.root(seed), num_classes=10)
    chosen = digits.train.take(order[: 2 * clean])
    others = digits.train.take(order[2 * clean :])
    others = others.take(np.flatnonzero(attack.aim(others.labels) != others.labels)[: 2 * triggered])
    images = np.concatenate([chosen.images, attack.stamp(others.images, others.ids)])
    ends = np.cumsum([clean, clean, triggered, triggered])
    names = ("clean", "unseen_clean", "triggered", "unseen_triggered")
    rows = dict(zip(names, np.split(np.arange(len(images)), ends[:-1]), strict=True))
    true = flow.centred_one_hot(np.concatenate([chosen.labels, others.labels]), 10)
    aims = flow.centred_one_hot(attack.aim(others.labels[:triggered]), 10)
    tasks = [
        drift.Task(rows["clean"], true[rows["clean"]]),
        drift.Task(rows["triggered"], aims),
        drift.Task(rows["triggered"], true[rows["triggered"]]),
    ]
    return images, tasks, rows


def of_width(width: int, seed: int, *, steps: int = 100, largest: float = 0.5) -> dict:
    """One network's three trainings: how far each leads from its linearisation, and drifts as measured and predicted.

    `gap` is |f - f_lin| over |f_lin - f_0|, on the images trained on and on unseen ones. `drift` is the mean squared drift
    |delta|^2 (Eq. 5-6) of the last task on each kind of images, of the network and by prediction.
    """
    images, tasks, rows = inputs(seed)
    classifier = models.build("resnet18", width=width, **NETWORK)
    fresh = classifier.init(keys.stream(keys.root(seed), "init"))
    # As they begin, running statistics are those of no data, and signals shrink from layer to layer.
    variables = path.recalibrated(classifier, fresh, data.load("digits").train.images[:128])
    kernel, start = ntk.kernel(classifier, variables, images), train.logits(classifier, variables, images)
    step_size = float(largest / flow.spectrum(kernel).values[-1])
    linear = drift.stream(kernel, start, tasks, time=steps * step_size, step_size=step_size)
    real, state = [start], variables
    for task in tasks:
        options = {"loss": "squared", "step_size": step_size, "steps": steps}
        state = linearize.descend(classifier, state, images[task.rows], task.targets, **options)
        real.append(train.logits(classifier, state, images))
    return {"width": width, "seed": seed, "tasks": _compared(real, linear, rows)}


def _compared(real: list, linear: list, rows: dict) -> dict:
    seen = np.concatenate([rows["clean"], rows["triggered"]])
    unseen = np.concatenate([rows["unseen_clean"], rows["unseen_triggered"]])
    found = {}
    for index, name in enumerate(TASKS, 1):
        gaps = [
            float(np.linalg.norm((real[index] - linear[index])[part]) / np.linalg.norm((linear[index] - linear[0])[part]))
            for part in (seen, unseen)
        ]
        drifts = {
            kind: [drift.catastrophic_forgetting((run[index] - run[index - 1])[part]) / len(part) for run in (real, linear)]
            for kind, part in rows.items()
        }
        found[name] = {"gap_seen": gaps[0], "gap_unseen": gaps[1], "drift": drifts}
    return found


def main(arguments=None) -> None:
    """The command line."""
    from bibau_jax.cli import fail
    from bibau_jax.report import theory

    parser = argparse.ArgumentParser(prog="python -m bibau_jax.theory.widths", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the record and the picture")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="of the networks' first stage, comma-separated")
    parser.add_argument("--seeds", type=int, default=3, help="how many; of data and start")
    parser.add_argument("--steps", type=int, default=100, help="of gradient descent, each task")
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "bibau_jax.theory.widths", *(sys.argv[1:] if arguments is None else arguments)])
    parallel.keep_compiled()
    parallel.use_cores(ntk.BLOCK)
    try:
        widths, runs = _widths(given.widths), []
        for name in ("seeds", "steps"):
            if getattr(given, name) < 1:
                raise UserError(f"--{name}={getattr(given, name)} must be at least 1")
        with progress.bar(len(widths) * given.seeds, "widths", unit="network", show=parallel.is_lead()) as bar:
            for width in widths:
                for seed in range(given.seeds):
                    runs.append(of_width(width, seed, steps=given.steps))
                    bar.advance()
        settings = {"widths": widths, "seeds": given.seeds, "steps": given.steps}
        if parallel.is_lead():
            told = records.write_study(given.out / "widths.json", "widths", command, settings, {"runs": runs})
            print(theory.widths(told.found, given.out / "widths.png"))
    except UserError as error:
        fail(error)


def _widths(told: str) -> list[int]:
    try:
        widths = [int(width) for width in told.split(",")]
    except ValueError:
        raise UserError(f'--widths="{told}" must be numbers with commas between them, e.g. 4,16,64') from None
    if min(widths) < 1:
        raise UserError(f"--widths={told} must be at least 1 each")
    return widths


if __name__ == "__main__":
    main()
