"""A stranger's model from Python, step by step, as the command does it with configs/own_model.py.

from bibau_jax import own

model = own.bring_in("suspect.pth", "clean/", workdir="runs/mine")
model.scan()
model.purify()
model.verify()
model.export()
"""

import dataclasses
import importlib
from pathlib import Path

from bibau_jax import experiment, records
from bibau_jax.errors import UserError
from bibau_jax.report import html, own, tables
from bibau_jax.run import Run
from bibau_jax.stages import export


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A model in the making, in a folder of its own: every step leaves its work there and is skipped when it is done."""

    config: dict
    workdir: str
    made_by: str  # the call that began it

    def __repr__(self) -> str:
        return f"{self.made_by}: {self.verdict}"

    def scan(self) -> dict:
        """Looks for a class that a small patch leads to: flagged classes, suspected class, anomaly index, sizes."""
        return self._run("scan").metrics["backdoored"].extra["scan"]

    def purify(self) -> records.Record:
        """Purifies by `config["defense"]["name"]`, BI-BAU (U) unless set, and by the defences beside it."""
        return self._run("scan,purify")

    def verify(self) -> records.Record:
        """Measures every model: clean accuracy, the scan again, triggers as they are and called back; prints the table."""
        record = self._run("scan,verify")
        tables.show(record)
        return record

    def export(self) -> Path:
        """Writes the purified weights in the names, layouts and types that they came with; returns the file."""
        self._run("export")
        return export.target(Run(self.config, Path(self.workdir).expanduser().absolute()))

    def report(self) -> Path:
        """Writes the page and returns it."""
        return html.write(Path(self.workdir).expanduser())

    @property
    def verdict(self) -> str:
        """What was found so far, in sentences."""
        path = Path(self.workdir).expanduser() / "record.json"
        return own.verdict(records.read(path)) if path.exists() else "Nothing is done yet."

    def _run(self, stages: str) -> records.Record:
        return experiment.run(self.config | {"stages": stages}, self.workdir, self.made_by)


def bring_in(weights, images, *, workdir, **settings) -> Model:
    """The model in a file of weights, to be purified with labelled clean images: a folder a class, or an .npz file.

    `settings` override those of configs/own_model.py by their dotted names, e.g. `**{"model.file": "my_net.py"}`; UserError for
    a name that is not there, and where file or images cannot be used. Says how the file was read.
    """
    config = _defaults().lock()
    if unknown := sorted(settings.keys() - records.flat(config.to_dict()).keys()):
        raise UserError(f'unknown setting "{unknown[0]}"; configs/base.py lists them')
    try:
        config.update_from_flattened_dict(settings | {"model.weights": str(weights), "data.folder": str(images)})
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"a setting is of another type: {' '.join(str(error).split())[:200]}") from error
    given = [repr(str(weights)), repr(str(images)), f"workdir={str(workdir)!r}"] + ([f"**{settings!r}"] if settings else [])
    model = Model(config.to_dict(), str(workdir), f"bibau_jax.own.bring_in({', '.join(given)})")
    model._run("import")
    return model


def _defaults():
    try:
        return importlib.import_module("configs.own_model").get_config()
    except ModuleNotFoundError as error:
        raise UserError("configs/ is not on the path: start Python in the repository's root") from error
