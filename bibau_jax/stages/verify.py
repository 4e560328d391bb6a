"""The stage that looks whether a stranger's model is rid of its backdoor, without anybody knowing the trigger.

A trigger inverted for the class that the scan suspects stands in for it: does it still work, and can it be brought back? Where
the real one is given, it is measured too, and its rates go by their ordinary names.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from bibau_jax import attacks, checkpoint, keys, npz, records, train
from bibau_jax.attacks import patch
from bibau_jax.data import ImageSet
from bibau_jax.defenses import Purified, ibu
from bibau_jax.errors import UserError
from bibau_jax.metrics import cost, rates
from bibau_jax.run import Run, load_model, update, write_arrays
from bibau_jax.stages import checks, evaluate, purify, reactivate, scan

REAL, STAND_IN = "real", "stand_in"  # triggers, and the folders of what was tried with them
DRAWN = f"verify/{STAND_IN}/trigger.npz"
BEGIN = {REAL: "", STAND_IN: "stand_in_"}  # what the names of their rates begin with


def run(this: Run, command: str) -> None:
    """Measures the suspicious model and every purified one: accuracy, scan, and how well triggers work and wake."""
    before = scan.of_model(this, command, evaluate.BEFORE, "scan")
    found = evaluate.models(this)
    scenes = {kind: _scene(this, kind, attack, found) for kind, attack in triggers(this, before, found).items()}
    for row, one in found.items():
        if row != "none" and row == this.config["defense"]["name"]:
            scan.of_model(this, command, one, "verify/scan")
        _measure(this, command, row, one, scenes)


def triggers(this: Run, found: scan.Scan, models: dict[str, evaluate.Measured]) -> dict[str, attacks.Attack]:
    """The triggers to verify with: a stand-in for that of the class that is suspected, if any, and the real one if given."""
    section, label, made = this.config["verify"], found.suspected, {}
    options = {"num_classes": this.classifier.num_classes}
    if label >= 0:
        inverted = stand_in(this, found, models)
        made[STAND_IN] = patch.of_arrays(this.key, inverted["mask"], inverted["pattern"], target_label=label, **options)
    if section["trigger"]:
        given = patch.read(section["trigger"])
        made[REAL] = patch.of_arrays(this.key, *given, target_label=section["target_label"], **options)
    return made


def stand_in(this: Run, found: scan.Scan, models: dict[str, evaluate.Measured]) -> dict[str, np.ndarray]:
    """mask [H, W, 1] in 0..1 and pattern [H, W, C] in 0..255 of the smallest trigger that works before and after fine-tuning.

    What the scan inverts is in part a quirk of the weights as they are, which any further training takes away: tried with it, a
    backdoor looks gone that is not. Fine-tuning takes the quirk and leaves the backdoor, so what works on the suspicious model
    and on a fine-tuned copy of it is nearer to the trigger (ours). The scan's own where the search finds none, and then
    `from_scan` says so.
    """
    path, label = this.folder / DRAWN, found.suspected
    if not path.exists():
        variables, journal = load_model(this, evaluate.BEFORE.stage)[0], this.journal(f"verify/{STAND_IN}/inverted")
        tuned = load_model(this, models["ft"].stage)[0] if "ft" in models else _fine_tuned(this, variables)
        given = (keys.stream(this.key, "stand_in"), this.classifier, variables, this.splits.clean)
        triggers = scan.searched(*given, classes=(label,), also=(tuned,), journal=journal, **scan.search_of(this))
        from_scan = not np.isfinite(triggers.sizes[0])
        kept, place = (found.triggers, label) if from_scan else (triggers, 0)
        arrays = {"mask": kept.masks[place], "pattern": kept.patterns[place], "reached": kept.reached[place]}
        arrays |= {"label": np.array(label), "example": this.measured.images[0], "from_scan": np.array(from_scan)}
        write_arrays(path, arrays)
        journal.keeper.clear()
    return npz.left(path, "mask", "pattern")


def check(this: Run) -> None:
    """Raises `UserError` on a trigger that cannot be laid over the images, or aims outside the classes."""
    section = this.config["verify"]
    if section["trigger"]:
        if section["target_label"] < 0:
            raise UserError("which class does verify.trigger lead to? set --config.verify.target_label")
        given = patch.read(section["trigger"])
        options = {"num_classes": this.classifier.num_classes, "target_label": section["target_label"]}
        first = this.measured.take(slice(8))
        if (patch.of_arrays(this.key, *given, **options).stamp(first.images, first.ids) == first.images).all():
            raise UserError(f"{section['trigger']} changes no pixel of the first images")
    elif section["target_label"] >= this.classifier.num_classes:
        raise UserError(f"verify.target_label {section['target_label']} is outside 0..{this.classifier.num_classes - 1}")
    reactivate.check(this, "patch", ("retuning", "query"))


def _scene(this: Run, kind: str, attack: attacks.Attack, found: dict) -> checks.Scene:
    """One trigger on the images that are measured, with a model that unlearned it knowing it: a clean one for comparison."""
    stages = {row: one.stage for row, one in found.items()}
    scene = checks.staged(this, attack, this.measured, stages, room=f"verify/{kind}")
    checks.only_of(scene, "ibu")
    return dataclasses.replace(scene, models=scene.models | {"clean": _ideal(this, kind, attack, scene.models["none"])})


def _ideal(this: Run, kind: str, attack: attacks.Attack, variables) -> dict:
    """The suspicious model after IBU on this trigger."""

    def made(journal) -> Purified:
        clean = this.splits.clean
        triggered = ImageSet(attack.stamp(clean.images, clean.ids), clean.labels, clean.ids)
        key, options = keys.stream(this.key, "purify"), this.options("ibu")
        return ibu.purify(key, this.classifier, variables, clean, triggered=triggered, journal=journal, **options)

    return _kept(this, f"verify/{kind}/ibu", made)


def _fine_tuned(this: Run, variables) -> dict:
    """The suspicious model after fine-tuning, as the defence `ft` does it."""
    return _kept(this, f"verify/{STAND_IN}/tuned", lambda journal: purify.apply(this, "ft", variables, journal))


def _kept(this: Run, stage: str, made: Callable[[train.Journal], Purified]) -> dict:
    """The variables of a model that verification needs, from disk where it was made before."""
    journal = this.journal(stage)
    place = this.folder / journal.stage / "model"
    if not place.exists():
        checkpoint.save(place, {"variables": made(journal).variables}, {})
        journal.keeper.clear()
    return checkpoint.load(place)[0]["variables"]


def _measure(this: Run, command: str, row: str, one: evaluate.Measured, scenes: dict[str, checks.Scene]) -> None:
    """Adds to a model's row what is not measured of it yet, trigger by trigger."""
    told = evaluate.begun(this, one)
    for kind, scene in scenes.items():
        if told.extra.get(f"{BEGIN[kind]}triggered_sha256") == scene.digest:
            continue
        checks.only_of(scene, row)
        with cost.measure() as spent:
            told = _tried(scene, row, kind, told)
        update(
            this,
            command,
            metrics={one.name: told},
            stages={f"verify/{kind}/{row}": records.StageCost(**dataclasses.asdict(spent))},
        )


def _tried(scene: checks.Scene, row: str, kind: str, told: records.Measurement) -> records.Measurement:
    """The measurement with one trigger's rates: as it is, and for what was purified, called back."""
    predicted = train.predict(scene.this.classifier, scene.models[row], scene.triggered)
    hit = records.Rate(*rates.attack_success_rate(predicted, scene.test.labels, scene.aims))
    found = {}
    if row != "none":
        found = checks.retuning_attack(scene, row) | checks.query_attack(scene, row)
    found |= {"triggered_sha256": scene.digest}
    if kind == STAND_IN:
        found |= {"asr": hit.percent, "from_scan": bool(npz.left(scene.this.folder / DRAWN).get("from_scan", False))}
        found = {f"{BEGIN[kind]}{name}": value for name, value in found.items()}
        return dataclasses.replace(told, extra=told.extra | found)
    robust = records.Rate(*rates.robust_accuracy(predicted, scene.test.labels, scene.aims))
    return dataclasses.replace(told, asr=hit, robust_accuracy=robust, extra=told.extra | found)
