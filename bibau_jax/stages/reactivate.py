"""The stage that tells a backdoor that is gone from one that is hidden: re-activation attacks and layer-wise evidence.

Every model that `evaluate` measured is attacked; the numbers join its row in the record as they come.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bibau_jax import parallel, progress, records, workdir
from bibau_jax.errors import UserError
from bibau_jax.metrics import cost
from bibau_jax.reactivation import query
from bibau_jax.run import Run, measured_so_far, update
from bibau_jax.stages import checks, evaluate

FREE = ("reactivate.checks",)  # which checks were made changes none of them
AT_MOST = (("query", "epsilon", 255), ("universal", "epsilon", 255), ("square", "epsilon", 255), ("bec", "share", 1))
AT_MOST += (("retuning", "momentum", 0.999), ("query", "momentum", 0.999))
BOUNDED = ("query", "universal", "square")  # whose epsilon is in grey levels: below 1 it changes no image
MAY_BE_ZERO = ("poisoned", "layers", "momentum", "centre", "alpha", "budget")  # of the settings
LEAST = 4  # attackable test images that checks need: half of them for angles, and two at least to compare


def run(this: Run, command: str) -> None:
    """Runs the checks of `config["reactivate"]["checks"]` that the record lacks, model by model."""
    asked, models, told = chosen(this.config), evaluate.models(this), measured_so_far(this)
    for row, one in models.items():
        if not evaluate.is_measured(this, one, told):
            raise UserError(f'the model "{row}" has no measurements yet; run the stage "evaluate" first')
    if "clean" not in models and (lost := [check for check in asked if CHECKS[check].twin]):
        progress.say(f"reactivate: without {', '.join(lost)}, for want of a clean twin", show=parallel.is_lead())
    if "linearity" in asked and not this.classifier.norms:
        progress.say("reactivate: without linearity, for want of norms behind convolutions", show=parallel.is_lead())
        asked.remove("linearity")
    told = _shared(this, command, models, told)
    if "query" in asked and {"clean", "ibu"} & models.keys() == {"clean"} and "q_asr" not in told[models["clean"].name].extra:
        why = "reactivate: the clean twin without query, for want of another clean model (ibu) to compare it with"
        progress.say(why, show=parallel.is_lead())
    missing = [
        (row, check)
        for row, one in models.items()
        for check in asked
        if applies(check, row, models) and CHECKS[check].key not in told[one.name].extra
    ]
    if not missing:
        progress.say("reactivate: done", show=parallel.is_lead())
        return
    scene = checks.scene_of(this, {row: one.stage for row, one in models.items()})
    for row, check in missing:
        checks.only_of(scene, row)
        with cost.measure() as spent:
            found = CHECKS[check].measure(scene, row)
        found |= {f"{check}_seconds": spent.seconds}  # the stage's cost is that of all checks together
        _note(this, command, models[row].name, f"reactivate/{row}", found, spent)


def _shared(this: Run, command: str, models: dict, told: dict) -> dict:
    """The measurements with what the run that the backdoored model is taken from found out about it and about the twin."""
    other = this.config["implant"]["reuse"]
    path = Path(other).expanduser() / "record.json"
    if not other or not path.exists():
        return told
    theirs = records.read(path)
    sections = [{"reactivate": config.get("reactivate", {})} for config in (theirs.config, this.config)]
    if workdir.differences(*sections, ignore=FREE) or theirs.config.get("measured_on", "test") != this.config["measured_on"]:
        return told
    taken = {}
    for name in (models[row].name for row in ("none", "clean") if row in models):
        same = theirs.metrics.get(name)
        if same is not None and same.extra.get("model_sha256") == told[name].extra["model_sha256"]:
            taken[name] = dataclasses.replace(told[name], extra=same.extra | told[name].extra)
    if any(taken[name] != told[name] for name in taken):
        update(this, command, metrics=taken)
    return told | taken


def _note(this: Run, command: str, name: str, stage: str, found: dict, spent) -> None:
    """Adds what a check found to the model's row, and what it cost to the stage's."""
    record = records.read(this.folder / "record.json")
    measured, before = record.metrics[name], record.stages.get(stage)
    costs = dataclasses.asdict(spent)
    if before is not None:
        costs["seconds"] += before.seconds
        for peak in ("peak_memory_mb", "device_peak_memory_mb"):
            costs[peak] = max(filter(None, (costs[peak], getattr(before, peak))), default=costs[peak])
    parallel.wait("noted")  # nobody writes before everybody has read
    metrics = {name: dataclasses.replace(measured, extra=measured.extra | found)}
    update(this, command, metrics=metrics, stages={stage: records.StageCost(**costs)})


class Check(NamedTuple):
    """One check: what measures it, the number that shows that it was done, and the rows that it is for.

    `twin` says that it needs a clean twin, `backdoored` that the backdoored model is measured too.
    """

    measure: Callable[[checks.Scene, str], dict]
    key: str
    twin: bool = False
    backdoored: bool = False


CHECKS = {
    "retuning": Check(checks.retuning_attack, "r_asr"),
    "query": Check(checks.query_attack, "q_asr", twin=True),
    "universal": Check(checks.universal_attack, "u_asr"),
    "square": Check(checks.square_attack, "s_asr"),
    "bec": Check(checks.backdoor_existence, "bec", twin=True, backdoored=True),
    "orthogonality": Check(checks.gradient_angles, "orthogonality", backdoored=True),
    "linearity": Check(checks.straightness, "linearity", backdoored=True),
    "path": Check(checks.weight_path, "path"),
    "features": Check(checks.features, "features_images", backdoored=True),
}


def check(this: Run, attack: str, asked: Sequence[str] = ()) -> None:
    """Raises `UserError` on the first setting of the checks that cannot be used: of those `asked` for, and of the config's.

    `attack` is the one whose poisoned images are counted in a retuning.
    """
    section, asked = this.config["reactivate"], [*asked, *chosen(this.config)]
    if "query" in asked and section["query"]["gradient"] == "white_box":
        asked = [*asked, "retuning"]  # which makes its teacher
    if section["test_size"] < 0:
        raise UserError(f"reactivate.test_size must not be negative: {section['test_size']}")
    for name in asked:
        for option, value in section.get(name, {}).items():
            if not isinstance(value, str) and (value < 0 or value == 0 and option not in MAY_BE_ZERO):
                raise UserError(f"reactivate.{name}.{option} must be positive, got {value}")
    for name in BOUNDED:
        if name in asked and section[name]["epsilon"] < 1:
            raise UserError(f"reactivate.{name}.epsilon must be at least 1 grey level, got {section[name]['epsilon']}")
    for name, option, most in AT_MOST:
        if name in asked and section[name][option] > most:
            raise UserError(f"reactivate.{name}.{option} must be at most {most}, got {section[name][option]}")
    if "retuning" in asked:
        checks.retuning_sizes(this, attack)
    if "query" in asked and section["query"]["gradient"] not in query.GRADIENTS:
        raise UserError(f"reactivate.query.gradient must be one of {', '.join(query.GRADIENTS)}")
    if "query" in asked and section["query"]["gradient"] == "queries" and section["query"]["budget"]:
        given, count = section["query"], 2 * min(section["query"]["images"], len(this.splits.train) // 2)
        query.epochs_paid(given["budget"], count, min(given["batch_size"], count), given["directions"])
    if asked and attack != "patch":  # whose file is read by those who lay it on
        checks.check_tested(this, this.attack_named(attack), LEAST)


def chosen(config: dict) -> list[str]:
    """The checks that the config asks for, in the order of CHECKS; unknown ones raise `UserError`."""
    asked = [check.strip() for check in config["reactivate"]["checks"].split(",") if check.strip()]
    for check in asked:
        if check not in CHECKS:
            raise UserError(f'reactivate.checks: "{check}" is unknown; known: {", ".join(CHECKS)}')
    return [check for check in CHECKS if check in asked]


def applies(check: str, row: str, rows) -> bool:
    """Whether a check is made of the model of a row, given the rows there are."""
    if check == "query" and row == "clean" and "ibu" not in rows:
        return False  # it would be its own clean model, and what wakes it would be ruled out by it
    return (CHECKS[check].backdoored or row != "none") and (not CHECKS[check].twin or "clean" in rows)
