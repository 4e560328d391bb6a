"""The stage that gives the purified model back, under the names, layouts and types that it came with, and a card beside it."""

import dataclasses
from pathlib import Path

from bibau_jax import checkpoint, parallel, progress, records
from bibau_jax.errors import UserError
from bibau_jax.importers import export, rules, torch_file
from bibau_jax.metrics import cost
from bibau_jax.report import card
from bibau_jax.run import Run, load_model, update

ENDINGS = (".pth", ".pt", ".tar", ".th", ".bin", ".ckpt", ".safetensors")  # of files of weights, one behind the other too


def target(this: Run) -> Path:
    """Where the purified weights go: `export.path`, or <workdir>/export/<name of the file>_purified.safetensors."""
    section = this.config["export"]
    if section["format"] not in export.SUFFIXES:
        raise UserError(f'export.format "{section["format"]}" is unknown; choose one of {", ".join(export.SUFFIXES)}')
    suffix = export.SUFFIXES[section["format"]]
    if section["path"]:
        path = Path(section["path"]).expanduser().absolute()
        if path.suffix != suffix:
            raise UserError(f"export.path={section['path']} must end in {suffix}, as export.format says")
        return path
    stem = Path(this.config["model"]["weights"]).name
    while (ending := Path(stem).suffix).lower() in ENDINGS:
        stem = stem.removesuffix(ending)
    return this.folder / "export" / f"{stem}_purified{suffix}"


def _card(path: Path) -> Path:
    return path.with_name(f"{path.name}.md")  # every file that is written has its own


def check(this: Run) -> None:
    """Raises `UserError` where weights or card would go over the file that they came from, or over anybody else's."""
    path, made = target(this), (this.folder / "purify" / this.config["defense"]["name"] / "model").exists()
    _refuse(this, path, _named(this) if made and path.exists() else {})


def _refuse(this: Run, path: Path, named: dict) -> None:
    """What is there already may be this run's own: weights that hold just these arrays, and the card of that file."""
    source = Path(this.config["model"]["weights"]).expanduser()
    own = _holds(path, named)
    if not own:
        export.refuse(path, source)
    # Of weights that were deleted the card may have stayed, and tells what they were made of.
    digest = torch_file.sha256(path) if own else this.suspect.told["sha256"]
    if not card.is_of(_card(path), path.name, digest):
        export.refuse(_card(path), source)


def _named(this: Run) -> dict:
    """The main defence's weights under the names of the file that they came from."""
    variables, suspect = load_model(this, f"purify/{this.config['defense']['name']}")[0], this.suspect
    arrays = rules.to_arrays(variables, suspect.arrays, suspect.places)
    return {suspect.told["prefix"] + name: array for name, array in arrays.items()}


def run(this: Run, command: str) -> None:
    """Writes the main defence's model and its card; a file that is there and holds it is left as it is."""
    row, path = this.config["defense"]["name"], target(this)
    info = checkpoint.info(this.model_folder(f"purify/{row}"))
    with cost.measure() as spent:
        named, told = _named(this), this.suspect.told
        metadata = {"purified_by": row, "model_sha256": info["sha256"], "source_sha256": told["sha256"]}
        if parallel.is_lead():
            _refuse(this, path, named)
            if not path.exists():
                export.write(path, named, source=told["file"], metadata=metadata)
    update(this, command, stages={"export": records.StageCost(**dataclasses.asdict(spent))})
    if parallel.is_lead():
        record = records.read(this.folder / "record.json")
        records.write_text(_card(path), card.markdown(record, path.name, torch_file.sha256(path)))
        progress.say(f"export: {path}")


def _holds(path: Path, arrays: dict) -> bool:
    """Whether the file is there and holds just these arrays; one that is damaged or another's does not."""
    if not arrays or not path.exists():
        return False
    try:
        there = torch_file.read(path)
    except UserError:
        return False
    held = {there.prefix + name: array for name, array in there.arrays.items()}
    return held.keys() == arrays.keys() and all(
        held[name].dtype == array.dtype and held[name].tobytes() == array.tobytes() for name, array in arrays.items()
    )
