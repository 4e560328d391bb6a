"""The stage that brings in a stranger's model, in the place of one that is implanted here."""

from bibau_jax import parallel, progress
from bibau_jax.errors import UserError
from bibau_jax.importers.suspect import said
from bibau_jax.run import Run, finish, is_done, load_model


def run(this: Run, command: str) -> None:
    """Keeps the weights of the file as the model to purify; refuses a file that is not the one that was brought in before."""
    suspect, spent = this.brought
    if not (this.folder / "implant" / "model").exists():
        for line in said(suspect.told):
            progress.say(f"import: {line}", show=parallel.is_lead())
    if is_done(this, "implant", command, called="import"):
        before = load_model(this, "implant")[2]["told"]
        if before["sha256"] != suspect.told["sha256"]:
            raise UserError(f"{suspect.told['file']} is not the file that {this.folder} began with; choose another --workdir")
        if before.get("images_sha256", suspect.told["images_sha256"]) != suspect.told["images_sha256"]:
            raise UserError(
                f"the clean images or those of data.test are not those that {this.folder} began with, so some that it "
                "trained on could be measured on; choose another --workdir"
            )
        begun, now = before.get("images", suspect.told["images"]), suspect.told["images"]
        if begun != now:
            raise UserError(
                f"with these settings {now['held_out']:,} clean images are held out, {this.folder} began with "
                f"{begun['held_out']:,}: what chooses by them, or limits a loss by them, needs another --workdir"
            )
        return
    finish(this, "implant", {"variables": suspect.variables}, [], spent, command, told=suspect.told)
