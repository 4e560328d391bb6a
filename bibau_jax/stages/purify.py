"""The stage that purifies the backdoored model, by the main defence and by those beside it."""

from bibau_jax import defenses, keys
from bibau_jax.data import ImageSet
from bibau_jax.metrics import cost
from bibau_jax.run import Run, attack_as_trained, finish, is_done, load_model, write_arrays


def run(this: Run, command: str) -> None:
    """Runs the main defence and those beside it, each on the backdoored model and the defender's clean images."""
    variables, _, _ = load_model(this, "implant")
    for row in this.rows:
        stage = f"purify/{row}"
        if is_done(this, stage, command):
            continue
        options = this.options(row)
        if defenses.is_ideal(row):
            options["triggered"] = _triggered(this)
        with cost.measure() as spent:
            purified = defenses.get(row).purify(
                keys.stream(this.key, "purify"),  # every defence sees the same batches
                this.classifier,
                variables,
                this.splits.clean,
                held_out=this.splits.validation,
                journal=this.journal(stage),
                **options,
            )
        if purified.samples is not None:
            write_arrays(this.folder / stage / "samples.npz", purified.samples)
        finish(this, stage, {"variables": purified.variables}, purified.history, spent, command)


def _triggered(this: Run) -> ImageSet:
    """The clean images with the trigger under their true labels, for what is no defence and may see them."""
    attack, _ = attack_as_trained(this)
    clean = this.splits.clean
    return ImageSet(attack.stamp(clean.images, clean.ids), clean.labels, clean.ids)
