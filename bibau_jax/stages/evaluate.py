"""The stage that measures every model there is, on the whole test set (or the validation images: `measured_on`)."""

import dataclasses
from functools import partial
from typing import NamedTuple

import numpy as np

from bibau_jax import attacks, checkpoint, parallel, progress, records, train
from bibau_jax.metrics import cost, rates
from bibau_jax.run import Run, attack_as_trained, load_model, measured_so_far, update, write_arrays
from bibau_jax.stages import purify

HARDLY = 50.0  # percent of ASR below which a backdoored model is not worth a defence
# What the models are called in the record; other defences keep their own names, and the main one's model is "purified".
MODELS = {"none": "backdoored", "clean": "clean", "ft": "finetuned"}


class Measured(NamedTuple):
    """A model there is: its name in the record, its row in tables, and the stage that left it."""

    name: str
    label: str
    stage: str


BEFORE = Measured("backdoored", "none", "implant")  # the model that is to be purified


def run(this: Run, command: str) -> None:
    """Clean accuracy, attack success rate and robust accuracy of every model there is, on all of `Run.measured`.

    A model that was measured before keeps its numbers, those of `reactivate` too.
    """
    found, told = models(this), measured_so_far(this)
    wanted = [one for one in found.values() if not is_measured(this, one, told)]
    if not wanted and (this.folder / "strip.npz").exists():
        progress.say("evaluate: done", show=parallel.is_lead())
        return
    attack, _ = attack_as_trained(this)
    test, metrics, predict = this.measured, {}, partial(train.predict, this.classifier)
    left_out = purify.failures(this)
    with cost.measure() as spent:
        triggered, aims = attack.stamp(test.images, test.ids), attack.aim(test.labels)
        with progress.bar(len(wanted), "evaluate", unit="model", show=parallel.is_lead()) as bar:
            for one in wanted:
                variables, _, info = load_model(this, one.stage)
                clean, hit = predict(variables, test.images), predict(variables, triggered)
                scanned = told[one.name].extra if _is_of(one, told, info) else {}
                metrics[one.name] = records.Measurement(
                    one.label,
                    records.Rate(*rates.clean_accuracy(clean, test.labels)),
                    records.Rate(*rates.attack_success_rate(hit, test.labels, aims)),
                    records.Rate(*rates.robust_accuracy(hit, test.labels, aims)),
                    info["seconds"],
                    scanned | _told(info) | (left_out if one == BEFORE else {}),
                )
                bar.advance()
        shown = {one.name: load_model(this, one.stage)[0] for one in found.values() if one.name in ("backdoored", "purified")}
        write_arrays(this.folder / "strip.npz", _strip(this, attack, shown))
    update(this, command, metrics=metrics, stages={"evaluate": records.StageCost(**dataclasses.asdict(spent))})
    taken = (told | metrics)["backdoored"].asr.percent
    if taken < HARDLY and not this.config["implant"]["innocent"]:
        more = "more poison (attack.poison_ratio), a stronger trigger or more epochs may help"
        progress.say(f"evaluate: the backdoor hardly took, ASR {taken:.1f} %; {more}", show=parallel.is_lead())


def is_measured(this: Run, one: Measured, told: dict) -> bool:
    """Whether the record's metrics hold numbers of this very model, those on triggered images among them."""
    return _is_of(one, told, checkpoint.info(this.model_folder(one.stage))) and told[one.name].asr is not None


def _is_of(one: Measured, told: dict, info: dict) -> bool:
    known = told.get(one.name)
    return known is not None and known.defense == one.label and known.extra.get("model_sha256") == info["sha256"]


def begun(this: Run, one: Measured) -> records.Measurement:
    """The record's row of this very model; where there is none, a new one with its clean accuracy alone."""
    told, info = measured_so_far(this), checkpoint.info(this.model_folder(one.stage))
    if _is_of(one, told, info):
        return told[one.name]
    test = this.measured
    predicted = train.predict(this.classifier, load_model(this, one.stage)[0], test.images)
    correct = records.Rate(*rates.clean_accuracy(predicted, test.labels))
    return records.Measurement(one.label, correct, None, None, info["seconds"], _told(info))


def _told(info: dict) -> dict:
    return {"model_sha256": info["sha256"]} | info.get("told", {})


def models(this: Run) -> dict[str, Measured]:
    """The models that can be measured, by row, the backdoored one first; says which are missing, and not what cannot be."""
    wanted = {"clean": "clean"} if this.config["implant"]["clean_twin"] != "none" else {}
    wanted |= {row: f"purify/{row}" for row in this.rows}
    found = {row: stage for row, stage in wanted.items() if (this.folder / stage / "model").exists()}
    if this.config["implant"]["clean_twin"] not in ("train", "none"):
        found |= {"clean": "clean"}
    failed = {row for of_kind in purify.failures(this).values() for row in of_kind}
    if missing := [stage for row, stage in wanted.items() if row not in found and row not in failed]:
        progress.say(f"evaluate: without {', '.join(missing)}, not done yet", show=parallel.is_lead())
    stages = {"none": "implant"} | found
    return {row: Measured(_name(this, row), _label(this, row), stage) for row, stage in stages.items()}


def _name(this: Run, row: str) -> str:
    return "purified" if row == this.config["defense"]["name"] else MODELS.get(row, row)


def _label(this: Run, row: str) -> str:
    """The row's name in tables: of an ablation, "bibau_u:+A"."""
    ablation = this.config["defense"]["ablation"]
    return f"{row}:{ablation}" if row in ("bibau_t", "bibau_u") and ablation != "+A+B" else row


def _strip(this: Run, attack: attacks.Attack, variables: dict) -> dict:
    """A few of the defender's images, clean, triggered and adversarial, and what the models make of them."""
    samples = [this.folder / "purify" / row / "samples.npz" for row in this.rows]
    samples = next((np.load(path) for path in samples if path.exists()), None)
    clean = this.splits.clean
    if samples is None:
        chosen = clean.take(np.flatnonzero(attack.aim(clean.labels) != clean.labels)[:8])
        kinds = {}
    else:
        chosen = clean.take(samples["rows"])
        kinds = {"adversarial": samples["adversarial"]}
    kinds |= {"clean": chosen.images, "triggered": attack.stamp(chosen.images, chosen.ids)}
    seen = {
        f"{kind}_by_{name}": train.predict(this.classifier, variables[name], images)
        for kind, images in kinds.items()
        for name in ("backdoored", "purified")
        if name in variables
    }
    aims = attack.aim(chosen.labels)
    return kinds | seen | {"labels": chosen.labels, "aims": aims, "class_names": np.array(this.dataset.class_names)}
