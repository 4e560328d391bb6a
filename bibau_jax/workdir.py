"""A run's folder: claimed for one config, so that nobody's results are overwritten by another's."""

import json
import pathlib

from bibau_jax import parallel
from bibau_jax.errors import UserError
from bibau_jax.records import as_before, flat, read, write_text

# What may change between two starts of the same run: where things lie and what else is asked for, never what was computed.
FREE = ("stages", "tensorboard", "checkpoint_every", "distributed", "export")
FREE += ("data.data_dir", "data.manual_dir", "data.download")
ADDABLE = ("defense.beside", "implant.reuse", "implant.clean_twin", "reactivate.checks")

# Sections of the config, and the folders that settle them.
SHARED = {"pgd"}  # the section of `defense` that is not a single defence's
# What a check of `reactivate` leaves in <run>/reactivate/<row> while it is made; the others leave a number at the end.
IN_PROGRESS = {"retuning": "retuned_*", "query": "query", "universal": "universal"}
LATER = {"defense": ("purify",), "reactivate": ("reactivate", "verify"), "scan": ("scan",), "verify": ("verify",)}


def told_apart_by(config: dict) -> dict:
    """The config without the sections of attacks and data sets that it does not use: their settings change nothing here."""
    return config | {part: _without_others(config.get(part, {})) for part in ("attack", "data")}


def _without_others(section: dict) -> dict:
    return {name: value for name, value in section.items() if not isinstance(value, dict) or name == section.get("name")}


def differences(old: dict, new: dict, ignore=(*FREE, *ADDABLE)) -> list[str]:
    """What differs between two nested configs, as "name: old -> new", apart from the names (and sections) to ignore.

    Sections of defences that neither of them runs do not count, nor those of other attacks and data sets.
    The old one may be of an earlier version of this program, which lacked some of the settings.
    """
    idle = _sections(old, new) - {f"defense.{name}" for name in _rows(old) | _rows(new)}
    before, after = flat(told_apart_by(old)), flat(told_apart_by(new))
    before |= {name: value for name, value in after.items() if name not in before and as_before(name, value, before)}
    names = sorted(before.keys() | after.keys())
    changed = [name for name in names if before.get(name) != after.get(name)]
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in changed
        if not any(name == free or name.startswith(f"{free}.") for free in (*ignore, *idle))
    ]


def _rows(config: dict) -> set[str]:
    """The defences that a config names, in one word or several."""
    section = config.get("defense", {})
    return {section.get("name", ""), *(name.strip() for name in str(section.get("beside") or "").split(","))}


def _sections(*configs: dict) -> set[str]:
    """The sections of single defences, e.g. "defense.nc"."""
    found = {name for config in configs for name, value in config.get("defense", {}).items() if isinstance(value, dict)}
    return {f"defense.{name}" for name in found - SHARED}


def claim(workdir, config: dict) -> pathlib.Path:
    """The folder as an absolute path, made and marked with this config; a folder of another config or of no run is refused.

    The settings of the defences are free until the first of them has begun, a single one's own until that one has, and so are
    those of the checks that follow, each until it has begun: one may implant now and decide later. A trigger that becomes
    known after all, or was not the right one, may be given to the stage `verify` at any time, which measures anew.
    """
    folder = pathlib.Path(workdir).expanduser().absolute()
    marker = folder / "config.json"
    if marker.exists():
        undecided = [section for section, begun in LATER.items() if not any((folder / one).exists() for one in begun)]
        before = read_config(folder)
        undecided += [part for part in _sections(before, config) if not (folder / part.replace("defense.", "purify/")).exists()]
        undecided += _checks_to_come(folder, before, config)
        known = before.get("verify", {}).get("trigger")
        if config.get("verify", {}).get("trigger") and (not known or "verify" in config["stages"]):
            undecided.append("verify")
        changed = differences(before, config, (*FREE, *ADDABLE, *undecided))
        if changed:
            raise UserError(f"{workdir} holds a run of another config ({'; '.join(changed)}); choose another --workdir")
    elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {marker.name + ".part"}):
        raise UserError(f"{workdir} exists and is not a run of this program; choose another --workdir")
    parallel.wait("claim")  # nobody writes before everybody has looked
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if parallel.is_lead() and not (marker.exists() and marker.read_text() == text):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(marker, text)
        except OSError as error:
            raise UserError(f"cannot make {workdir}: {error.strerror}") from error
    parallel.wait("claimed")
    return folder


def _checks_to_come(folder: pathlib.Path, *configs: dict) -> list[str]:
    """The sections of those checks that no model of a run was given yet, e.g. "reactivate.universal"."""
    sections = {name for config in configs for name, value in config.get("reactivate", {}).items() if isinstance(value, dict)}
    if (folder / "verify").exists():  # which makes some of them too
        return []
    record = folder / "record.json"
    told = {name for one in read(record).metrics.values() for name in one.extra} if record.exists() else set()
    found = [name for name in sections if f"{name}_seconds" not in told]
    return [f"reactivate.{name}" for name in found if not any(folder.glob(f"reactivate/*/{IN_PROGRESS.get(name, name)}"))]


def read_config(folder: pathlib.Path) -> dict:
    """The config that a run's folder is marked with; `UserError` where there is none or it is damaged."""
    marker = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(marker.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{marker} cannot be read as a run's config: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{marker} cannot be read as a run's config: it is no JSON object")
    return config
