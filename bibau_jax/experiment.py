"""The stages in order: implant, purify, evaluate, reactivate, report; of a stranger's model import, scan, ..., verify, export.

A stage takes what the one before it left in the run's folder and leaves its own work there. It is skipped when that is done,
and goes on from its last checkpoint when it was cut off.
"""

from pathlib import Path

from bibau_jax import models, parallel, preflight, progress, records, workdir
from bibau_jax.errors import UserError
from bibau_jax.report import html, tables
from bibau_jax.run import Run, attack_as_trained, load_model
from bibau_jax.stages import bring, evaluate, export, implant, purify, reactivate, scan, verify
from bibau_jax.stages.implant import poisoned_split

__all__ = ["Run", "attack_as_trained", "load_model", "poisoned_split", "run", "settled"]


def run(config: dict, folder: str, command: str = "") -> records.Record | None:
    """Runs the stages that `config["stages"]` names, in a folder that is claimed for this config; returns the record.

    `config` is a plain nested dict with every field of configs/base.py. What a user can put right raises `UserError`.
    """
    wanted = preflight.stages(config["stages"], tuple(STAGES))
    if config["model"]["weights"] and set(wanted) - {"report"}:
        wanted = ["import", *(stage for stage in wanted if stage not in ("import", "implant"))]
    distributed = config["distributed"]
    parallel.connect(distributed["coordinator"], distributed["processes"], distributed["process"])
    config = settled(config)
    this = Run(config, Path(folder).expanduser().absolute())
    preflight.check(this, wanted)
    workdir.claim(folder, config)
    for stage in wanted:
        STAGES[stage](this, command)
    path = this.folder / "record.json"
    return records.read(path) if path.exists() else None


def settled(config: dict) -> dict:
    """The config with what it leaves open, so that folder and record tell it.

    That is the network's own width and stages (for a file of one's own, its name) and the attack's own poison ratio.
    """
    return _with_ratio(config | {"model": _with_sizes(config["model"])})


def _with_sizes(section: dict) -> dict:
    if section["file"]:
        return section | {"name": Path(section["file"]).stem}
    if section["weights"]:
        return section  # it is the file that tells
    if section["name"] == "auto":
        raise UserError("which model? set --config.model.weights to its file (.pth, .pt, .tar, .th or .safetensors)")
    own = models.options(section["name"])
    return section | {name: own[name] for name in ("width", "stages") if section[name] is None}


def _with_ratio(config: dict) -> dict:
    section = config["attack"]
    own = section.get(section["name"], {})
    if section["poison_ratio"] != 0 or own.get("class_share", 0.0):
        return config
    return config | {"attack": section | {"poison_ratio": own.get("poison_ratio", 0.0)}}


def status(config: dict, record: records.Record | None) -> int:
    """The program's exit status: where nothing follows the scan 1 if it found something and 2 if it could not tell, else 0."""
    if set(preflight.stages(config["stages"], tuple(STAGES))) - {"import", "report"} != {"scan"}:
        return 0
    found = record.metrics["backdoored"].extra["scan"]
    return 2 if found.get("undetermined") else int(bool(found["flagged"]))


def write_report(this: Run, command: str) -> None:
    """The page <workdir>/report.html and the closing table on the terminal, from the record alone."""
    path = this.folder / "record.json"
    if not path.exists() or not records.read(path).metrics:
        stage = "verify" if this.is_own else "evaluate"
        raise UserError(f'{this.folder} has no measurements yet; run the stage "{stage}" first')
    if parallel.is_lead():
        page = html.write(this.folder)
        tables.show(records.read(path))
        progress.say(f"report: {page}")


STAGES = {
    "import": bring.run,
    "implant": implant.run,
    "scan": scan.run,
    "purify": purify.run,
    "evaluate": evaluate.run,
    "reactivate": reactivate.run,
    "verify": verify.run,
    "export": export.run,
    "report": write_report,
}
