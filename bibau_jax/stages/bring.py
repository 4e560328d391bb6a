"""The stage that brings in a stranger's model, in the place of one that is implanted here."""

import dataclasses

from bibau_jax import parallel, progress
from bibau_jax.errors import UserError
from bibau_jax.importers.suspect import said
from bibau_jax.run import Run, finish, is_done, load_model, measured_so_far, update
from bibau_jax.stages import evaluate


def run(this: Run, command: str) -> None:
    """Keeps the weights of the file as the model to purify; refuses a file that is not the one that was brought in before."""
    suspect, spent = this.brought
    for line in said(suspect.told):
        progress.say(f"import: {line}", show=parallel.is_lead())
    if is_done(this, "implant", command, called="import"):
        before = load_model(this, "implant")[2]["told"]
        if before["sha256"] != suspect.told["sha256"]:
            raise UserError(f"{suspect.told['file']} is not the file that {this.folder} began with; choose another --workdir")
        if "images" not in before:  # of an earlier version
            row = measured_so_far(this).get(evaluate.BEFORE.name)
            made = row and dataclasses.replace(row, extra=row.extra | {"images": suspect.told["images"]})
            update(this, command, metrics={evaluate.BEFORE.name: made} if made else {})
        return
    finish(this, "implant", {"variables": suspect.variables}, [], spent, command, told=suspect.told)
