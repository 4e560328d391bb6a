"""The stage that purifies the backdoored model, by the main defence and by those beside it."""

import dataclasses

from bibau_jax import checkpoint, defenses, keys, limits, parallel, progress, records, train
from bibau_jax.data import ImageSet
from bibau_jax.errors import Diverged, NotApplicable, UserError
from bibau_jax.metrics import cost
from bibau_jax.run import Run, attack_as_trained, finish, is_done, load_model, write_arrays
from bibau_jax.stages.implant import poisoned_split

AIMED = ("bibau_t", "bibau_u", "base_at")  # can be told which class is the attacker's
# In the folder of a defence beside the main one that gave no model, by the error that says why.
FAILED = {NotApplicable: "not_applicable", Diverged: "diverged"}


def run(this: Run, command: str) -> None:
    """Runs the main defence and those beside it, each on the backdoored model and the defender's clean images."""
    variables, _, _ = load_model(this, "implant")
    left_out = {failed for found in failures(this).values() for failed in found}
    for row in this.rows:
        stage = f"purify/{row}"
        if is_done(this, stage, command):
            continue
        if row in left_out:
            progress.say(f"{stage}: left out, as before", show=parallel.is_lead())
            continue
        clock, guard = limits.Clock(this.config["defense"]["max_seconds"]), _guard(this, stage, variables)
        journal = dataclasses.replace(this.journal(stage), clock=clock, guard=guard)
        try:
            with cost.measure() as spent:
                purified = apply(this, row, variables, journal)
        except tuple(FAILED) as reason:  # one of many must not cost the others their numbers
            if row == this.config["defense"]["name"]:
                raise
            kind = FAILED[type(reason)]
            progress.say(f"{stage}: {kind.replace('_', ' ')}: {reason}", show=parallel.is_lead())
            if parallel.is_lead():
                (this.folder / stage).mkdir(parents=True, exist_ok=True)
                records.write_text(this.folder / stage / f"{kind}.txt", f"{reason}\n")
            parallel.wait("left out")
            continue
        for name, arrays in (("samples", purified.samples), ("evidence", purified.evidence)):
            if arrays is not None:
                write_arrays(this.folder / stage / f"{name}.npz", arrays)
        told = _told(this, purified, guard) | ({"out_of_time": True} if clock.has_cut else {})
        if clock.has_cut:
            progress.say(f"{stage}: defense.max_seconds ended it before its last epoch", show=parallel.is_lead())
        finish(this, stage, {"variables": purified.variables}, purified.history, spent, command, told=told)


def failures(this: Run) -> dict[str, dict[str, str]]:
    """The defences that gave no model, and why, by kind: {"not_applicable": {"clp": "..."}}; kinds without any are left out."""
    found = {}
    for kind in FAILED.values():
        places = {row: this.folder / "purify" / row / f"{kind}.txt" for row in this.rows}
        found[kind] = {row: path.read_text().strip() for row, path in places.items() if path.exists()}
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def _guard(this: Run, stage: str, variables) -> limits.Guard:
    """The limit on what a defence may cost, counted on the held-out images."""
    limit, held_out = this.config["defense"]["max_loss"], this.splits.validation
    if not limit:
        return limits.Guard()
    if not len(held_out):
        raise UserError("defense.max_loss needs held-out images to count on (data.validation_size or data.held_out)")
    before = train.accuracy(this.classifier, variables, held_out.images, held_out.labels)
    return limits.Guard(limit, before, checkpoint.Keeper(this.folder / stage / "best", every_steps=1, keep=1))


def _told(this: Run, purified: defenses.Purified, guard: limits.Guard) -> dict:
    """What the defence and the guard say of the model; the guard also of a defence that has no epochs to choose from."""
    if guard.keeper is not None:
        guard.keeper.clear()
        held_out = this.splits.validation
        guard.judge(train.accuracy(this.classifier, purified.variables, held_out.images, held_out.labels))
    if guard.told:
        progress.say(f"purify: {guard.told}", show=parallel.is_lead())
    return purified.told | ({"guard": guard.told} if guard.told else {})


def apply(this: Run, row: str, variables, journal: train.Journal) -> defenses.Purified:
    """What a defence makes of the backdoored model with this run's data and settings, its traces left to `journal`."""
    options = this.options(row)
    if row in AIMED and this.config["defense"]["target_label"] < 0:
        is_sure = row == "bibau_t"
        if this.scanned_class is None and (is_sure or options["pgd"].aimed):
            raise UserError(f"{row} needs the attacker's class: run the stage scan first, or set defense.target_label")
        if this.scanned_class == -1 and is_sure:
            raise UserError(
                "bibau_t needs the attacker's class, and the scan found no trigger for any: set defense.target_label, or start "
                "anew with a longer search (scan.epochs)"
            )
        if not is_sure and this.config["defense"]["pgd"]["aimed"] and not options["pgd"].aimed:
            progress.say(f"purify: {row}: no class stands out in the scan, so no images are aimed at one", show=journal.show)
    if defenses.is_ideal(row):
        options["triggered"] = _triggered(this)
    if defenses.is_informed(row):
        options["poisoned"] = _poisoned(this)
    key = keys.stream(this.key, "purify")  # every defence sees the same batches
    given = (key, this.classifier, variables, this.splits.clean)
    return defenses.get(row).purify(*given, held_out=this.splits.validation, journal=journal, **options)


def _poisoned(this: Run) -> ImageSet:
    """The training set as the model saw it, poisoned (unless it is a clean twin's), for a defence that asks for it."""
    if this.config["implant"]["innocent"]:
        return this.splits.train
    split = poisoned_split(this)
    return ImageSet(split.images, split.labels, this.splits.train.ids)


def _triggered(this: Run) -> ImageSet:
    """The clean images with the trigger under their true labels, for what is no defence and may see them."""
    attack, _ = attack_as_trained(this)
    clean = this.splits.clean
    return ImageSet(attack.stamp(clean.images, clean.ids), clean.labels, clean.ids)
