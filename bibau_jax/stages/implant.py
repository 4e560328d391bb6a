"""The stage that makes what is to be purified: the backdoored model, and its clean twin."""

import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np

from bibau_jax import attacks, checkpoint, keys, train
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.errors import UserError
from bibau_jax.importers.torch_file import sha256
from bibau_jax.metrics import cost
from bibau_jax.run import Run, attack_as_trained, finish, is_done, write_arrays


def run(this: Run, command: str) -> None:
    """Trains the backdoored model on the poisoned set, and its clean twin on the same images without poison.

    Neither where it is taken from another run.
    """
    section = this.config["implant"]
    if not section["reuse"]:
        _train_model(this, "implant", command, poisoned=True)
    if section["clean_twin"] == "train":
        _train_model(this, "clean", command, poisoned=False)


def _train_model(this: Run, stage: str, command: str, *, poisoned: bool) -> None:
    folder = this.folder / stage
    if is_done(this, stage, command):
        return
    attack, split, section = this.attack, this.splits.train, this.config["implant"]
    key = keys.stream(this.key, "implant")  # the twin starts from the same weights and sees the same order
    with cost.measure() as spent:
        control = attack.control if poisoned else None
        shift = {name: this.config["data"][name] for name in ("padding", "flip")}
        prepare, training, extra, learned, before = partial(train.augmented, **shift), split, (), (), []
        if control:
            augment = partial(crop_and_flip, **shift)
            learned, before = _learned(this, control, key, split, augment)
        hand = control if control and control.prepare else None  # in training
        if hand:
            prepare, extra = partial(control.prepare, augment=augment), learned
        if poisoned and not (hand and hand.stamps):  # who stamps every batch anew is given clean images
            training = (control.finish(attack, learned) if control else attack).poison(split)
        told = {"images": training.images, "labels": training.labels}
        if hand and not hand.stamps:
            told |= {"poisoned": training.poisoned, "cover": training.cover}
        batch_size = min(section["batch_size"], len(split))
        schedule = train.learning_rate_schedule(
            section["schedule"], section["learning_rate"], section["epochs"] * (len(split) // batch_size)
        )
        optimizer = train.sgd(schedule, momentum=section["momentum"], weight_decay=section["weight_decay"])
        extra_optimizer = control.optimizer if control else None
        state, history = train.fit(
            partial(
                train.train_step,
                classifier=this.classifier,
                optimizer=optimizer,
                prepare=prepare,
                extra_optimizer=extra_optimizer,
            ),
            train.new_state(this.first_weights(keys.stream(key, "init")), optimizer, extra, extra_optimizer),
            told,
            key=key,
            epochs=section["epochs"],
            batch_size=section["batch_size"],
            journal=this.journal(stage),
        )
    if hand:
        learned = jax.device_get(state.extra)
    if hand and hand.stamps:
        training = control.finish(attack, learned).poison(split)
    if poisoned:
        told = {"seed": np.int64(this.config["seed"]), "poison_ratio": training.poisoned.mean(), "means": _means(training)}
        write_arrays(folder / "poison.npz", training.flags() | told)
    start = section["start"]
    began = {"start": start, "start_sha256": sha256(Path(start).expanduser())} if start else {}
    finish(this, stage, {"variables": state.variables, "extra": learned}, [*before, *history], spent, command, began)


def _learned(this: Run, control: attacks.Control, key, split, augment):
    """What the attack learns before the victim's training, and its history; kept beside it, so that it is learned once."""
    stage, journal = "implant/trigger", this.journal("implant/trigger")
    if not (this.folder / stage / "model").exists():
        extra, history = control.init(keys.stream(key, "trigger"), split, journal, augment)
        checkpoint.save(this.folder / stage / "model", {"extra": extra}, {"history": history})
    shutil.rmtree(journal.keeper.directory, ignore_errors=True)  # those of its parts too
    tree, info = checkpoint.load(this.folder / stage / "model")
    return {"extra": (), **tree}["extra"], info["history"]


def poisoned_split(this: Run) -> attacks.PoisonedSplit:
    """The training set as it was poisoned for this run's backdoored model, made again from the attack and what it learned.

    Of an attack that stamps every batch anew, a fixed set of the same kind. UserError where flags or images are not those
    saved with the run, of which the mean pixels are kept.
    """
    attack, _ = attack_as_trained(this)
    made, path = attack.poison(this.splits.train), this.model_folder("implant").parent / "poison.npz"
    with np.load(path) as saved:
        same = all(np.array_equal(saved[name], values) for name, values in made.flags().items())
        if not same or np.abs(saved["means"] - _means(made)).max() > 0.1:  # rounding differs between machines
            raise UserError(f"{path} holds another poisoned set than this version of bibau_jax makes of the same settings")
    return made


def _means(split: attacks.PoisonedSplit) -> np.ndarray:
    """The mean pixel of every image, float32 [N]."""
    return split.images.mean((1, 2, 3), dtype=np.float32)
