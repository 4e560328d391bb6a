"""Assumption 1 as an experiment: clean and backdoor task together, backdoor first, or clean first (appendix E.1, Fig. 6).

python -m bibau_jax.theory.task_stream --config=configs/theory/task_stream.py --workdir=runs/task_stream

The two tasks share a classification head, so each is accompanied by a few images of the other. Every setting is a list of
phases, each trained from where the last one ended; the same command goes on where it was cut off.
"""

import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, logging

from bibau_jax import attacks, cli, keys, parallel, preflight, records, train, workdir
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.metrics import rates
from bibau_jax.models import Classifier
from bibau_jax.run import Run

TRAINING = ("batch_size", "learning_rate", "schedule", "momentum", "weight_decay")


class Phase(NamedTuple):
    """A part of a training: its task's name, what it sees, and for how many epochs."""

    task: str
    images: ImageSet
    epochs: int


def phases(
    key: jax.Array,
    poisoned: attacks.PoisonedSplit,
    *,
    epochs: int = 100,
    first_epochs: int = 20,
    clean_share: float = 0.1,
    poison_share: float = 0.01,
    poisoned_images: int = 10,
) -> dict[str, list[Phase]]:
    """The three settings of appendix E.1 from a poisoned training set, each `epochs` long in all.

    together: all images. backdoor_first: all poisoned images and `clean_share` of the clean ones for `first_epochs`, then all
    clean ones and `poison_share` of the poisoned. clean_first: all clean images and `poisoned_images` of the others, then all
    poisoned ones and `clean_share` of the clean for `first_epochs` (the paper leaves open when it changes; ours is the mirror
    image). A share above 0 is one image at least. UserError for numbers out of range and a set without poisoned images.
    """
    if not 0 < first_epochs < epochs:
        raise UserError(f"stream.first_epochs={first_epochs} must lie between 0 and stream.epochs={epochs}")
    for name, share in (("clean_share", clean_share), ("poison_share", poison_share)):
        if not 0 <= share <= 1:
            raise UserError(f"stream.{name}={share} must lie in 0..1")
    if poisoned_images < 0:
        raise UserError(f"stream.poisoned={poisoned_images} must not be negative")
    if not poisoned.poisoned.any():
        raise UserError("no image is poisoned, so there is no backdoor to learn; see the attack's poison_ratio")
    bad, good = np.flatnonzero(poisoned.poisoned), np.flatnonzero(~poisoned.poisoned)
    order = [np.asarray(jax.random.permutation(keys.stream(key, name), rows)) for name, rows in (("bad", bad), ("good", good))]
    some_good = order[1][: max(clean_share > 0, round(clean_share * len(good)))]
    images = ImageSet(poisoned.images, poisoned.labels.astype(np.int32), np.arange(len(poisoned.images), dtype=np.int32))

    def of(task, rows, count):
        return Phase(task, images.take(np.sort(np.concatenate(rows))), count)

    backdoor = partial(of, "backdoor", [bad, some_good])
    few, rest = order[0][: max(poison_share > 0, round(poison_share * len(bad)))], epochs - first_epochs
    return {
        "together": [of("both", [bad, good], epochs)],
        "backdoor_first": [backdoor(first_epochs), of("clean", [good, few], rest)],
        "clean_first": [of("clean", [good, order[0][:poisoned_images]], rest), backdoor(first_epochs)],
    }


def learn(
    key: jax.Array,
    classifier: Classifier,
    variables,
    told: list[Phase],
    *,
    watch: Callable,
    journal: train.Journal = train.Journal(),
    padding: int = 4,
    flip: bool = True,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    schedule: str = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> list[dict]:
    """Trains through the phases from `variables` on; one entry an epoch: its number over all, its task, and what `watch` adds.

    `watch(state, epoch) -> dict` is called after every epoch. The schedule begins anew with each phase.
    """
    entries = []
    for index, phase in enumerate(told):
        size = len(phase.images)
        steps = phase.epochs * max(1, size // min(batch_size, size))
        optimizer = train.sgd(
            train.learning_rate_schedule(schedule, learning_rate, steps), momentum=momentum, weight_decay=weight_decay
        )
        prepare = partial(train.augmented, padding=padding, flip=flip)
        state, history = train.fit(
            partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=prepare),
            train.new_state(variables, optimizer),
            {"images": phase.images.images, "labels": phase.images.labels},
            key=keys.stream(key, "phase", index),
            epochs=phase.epochs,
            batch_size=batch_size,
            after_epoch=watch,
            journal=journal.part(f"{index}_{phase.task}"),
        )
        variables = jax.device_get(state.variables)
        entries += [entry | {"epoch": len(entries) + number, "task": phase.task} for number, entry in enumerate(history, 1)]
    return entries


def watched(classifier: Classifier, attack: attacks.Attack, test: ImageSet) -> Callable:
    """An `after_epoch` for `train.fit`: clean accuracy `ca` and attack success rate `asr` on test images, percent."""
    triggered, aims = attack.stamp(test.images, test.ids), attack.aim(test.labels)

    def after(state, epoch):
        plain, hit = (train.predict(classifier, state.variables, images) for images in (test.images, triggered))
        ca = records.Rate(*rates.clean_accuracy(plain, test.labels)).percent
        return {"ca": ca, "asr": records.Rate(*rates.attack_success_rate(hit, test.labels, aims)).percent}

    return after


def check(config: dict) -> None:
    """Raises `UserError` where there is no section stream, or trainings cannot be run by it."""
    if "stream" not in config:
        raise UserError("the config has no section stream; take configs/theory/task_stream.py")
    preflight.training("stream", config["stream"])


def settings(this: Run) -> dict[str, list[Phase]]:
    """The phases of every setting, as the run's config has them."""
    section = this.config["stream"]
    given = {name: section[name] for name in ("epochs", "first_epochs", "clean_share", "poison_share")}
    key = keys.stream(keys.stream(this.key, "task_stream"), "images")
    return phases(key, this.attack.poison(this.splits.train), poisoned_images=section["poisoned"], **given)


def study(this: Run, told: dict[str, list[Phase]]) -> dict:
    """{setting: its entries} of all three, from one start; a setting that is finished in the run's folder is not run again."""
    key, options = keys.stream(this.key, "task_stream"), {name: this.config["data"][name] for name in ("padding", "flip")}
    options |= {name: this.config["stream"][name] for name in TRAINING}
    count = this.config["reactivate"]["test_size"] or len(this.measured)
    watch = watched(this.classifier, this.attack, this.measured.take(slice(0, count)))
    found = {}
    for name, parts in told.items():
        journal, place = this.journal(name), this.folder / f"{name}.json"
        if not place.exists():
            start = this.classifier.init(keys.stream(key, "init"))
            entries = learn(keys.stream(key, name), this.classifier, start, parts, watch=watch, journal=journal, **options)
            if parallel.is_lead():
                records.write_study(place, "task_stream_setting", _command(), {"setting": name}, {"epochs": entries})
                shutil.rmtree(this.folder / name, ignore_errors=True)  # the checkpoints of its phases
            parallel.wait(name)
        found[name] = records.read_study(place).found["epochs"]
    return found


def _command() -> str:
    return shlex.join(["python", "-m", "bibau_jax.theory.task_stream", *sys.argv[1:]])


def run(config: dict, folder: str) -> Path:
    """All three settings in a folder that is claimed for this config; returns the path of the figure."""
    from bibau_jax.report import theory

    check(config)
    this = Run(config, Path(folder).expanduser().absolute())
    if this.attack.control is not None:
        raise UserError(f'attack "{this.attack.name}" takes a hand in training, which a stream of tasks has no room for')
    told = settings(this)
    workdir.claim(folder, config)
    found = study(this, told)
    if parallel.is_lead():
        written = records.write_study(this.folder / "task_stream.json", "task_stream", _command(), config, found)
        return theory.task_stream(written.found, this.folder / "task_stream.png")
    return this.folder / "task_stream.png"


def command(argv: list[str]) -> None:
    """The command line."""
    logging.set_verbosity(logging.WARNING)
    config = cli.CONFIG.value.to_dict()
    parallel.keep_compiled()
    try:
        check(config)
        parallel.use_cores(config["stream"]["batch_size"])
        print(run(config, cli.WORKDIR.value))
    except UserError as error:
        cli.fail(error)
    except KeyboardInterrupt:
        cli.fail("interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    app.run(command, flags_parser=cli.parse)
