"""What records hold as rows: one a measured model, mean and spread over seeds, runs of other settings set apart."""

import dataclasses
import statistics
from collections import Counter
from pathlib import Path

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import words

RATES = ("ca", "asr", "robust_accuracy")
GROUP = ("dataset", "model", "attack", "defense", "variant")
SETTINGS = ("train_size", "clean_size")
# What a run's numbers do not depend on, so that it does not set two runs apart.
FREE = ("seed", "stages", "tensorboard", "checkpoint_every", "distributed", "data.data_dir", "data.manual_dir", "data.download")
FREE += (
    *(f"data.{name}" for name in SETTINGS),
    "defense.name",
    "defense.beside",
    "implant.reuse",
    "implant.clean_twin",
    "reactivate.checks",
)
TRAINING = ("epochs", "batch_size", "learning_rate", "schedule", "momentum", "weight_decay")
USES = {
    "none": (),
    "clean": (),
    "ft": (*TRAINING, "cutout"),
    "ibu": (*TRAINING, "ibu"),
    "base_at": (*TRAINING, "pgd", "max_grad_norm", "softened", "temperature"),
    "nc": (*TRAINING, "nc"),
    # The section of these holds all their settings.
    **{name: (name,) for name in ("bti_dbf", "anp", "ep", "bnp", "rnp", "clp", "i_bau", "sau", "pam", "nad")},
}  # of the defence's settings
COLUMNS = (*GROUP, "settings", "seed", *RATES, "ca_loss", *(f"{r}_{part}" for r in RATES for part in ("hits", "count")))
COLUMNS = (*COLUMNS, "seconds", *SETTINGS, "device", "record")  # every other number of a row is a further measurement


def in_order(measurements) -> list:
    """Measurements with the undefended model first, then the defences in the order of `words.DEFENSES`."""
    return sorted(measurements, key=lambda measured: words.order(words.DEFENSES, measured.defense))


def device_name(device: dict) -> str:
    """The machine in words, e.g. `NVIDIA H200`, `8 × TPU v4` or, with its cores, the processor's own name."""
    kind, count = device.get("kind") or device.get("platform", "unknown"), device.get("count") or 1
    if device.get("platform") == "cpu":
        cores = device.get("host_cores")
        return f"{device.get('host_cpu') or kind}{f', {cores} cores' if cores else ''}"
    return f"{count} × {kind}" if count > 1 else str(kind)


def _row(record, measured, name: str) -> dict:
    config = record.config
    data, weights = config["data"], config["model"].get("weights")
    row = {
        "dataset": data["name"],
        "model": Path(weights).name.partition(".")[0] if weights else words.model(config["model"]),
        "attack": _attack(config),
        "defense": measured.defense,
        "variant": 1,
        "settings": "",
        "seed": record.seed,
    }
    for key in RATES:
        counted = getattr(measured, key)
        row |= {key: words.rate(counted), f"{key}_hits": counted and counted.hits, f"{key}_count": counted and counted.count}
    row |= {"ca_loss": None, "seconds": measured.seconds, "record": name, "device": device_name(record.device)}
    row |= {key: data.get(key) for key in SETTINGS} | (_images(record) if weights else {})
    further = {key: value for key, value in measured.extra.items() if words.is_number(value) and key not in COLUMNS}
    model = {key: measured.extra[key] for key in ("model_sha256",) if key in measured.extra}
    return {key: row[key] for key in COLUMNS} | model | dict(sorted(further.items()))


def _attack(config: dict) -> str:
    """The attack of a row, "clean" where there is none; nobody knows a stranger's, but where its trigger is given."""
    if not config["model"].get("weights"):
        return words.CLEAN if config.get("implant", {}).get("innocent") else config["attack"]["name"]
    return "patch" if config.get("verify", {}).get("trigger") else "unknown"


def _images(record) -> dict:
    """As SETTINGS, of a stranger's model: nobody knows what it was trained on, and the clean images are those of the folder."""
    before = words.backdoored(record)
    told = before.extra.get("images", {}) if before is not None else {}
    return {"train_size": None, "clean_size": told.get("clean")}


def _add_code_form(made, named) -> None:
    """BEC of the published code, which is scaled by the models that are compared: all of a backdoored model, in any record.

    Runs with other settings than most are left out of it, and so are backdoored models without a twin.
    """
    before, similar = {name: words.backdoored(record) for name, record in named.items()}, {}
    for name, record in named.items():
        for measured in record.metrics.values():
            layers = measured.extra.get("bec_similarity")
            if before[name] is not None and isinstance(layers, dict) and layers:
                similar[name, measured.defense] = statistics.mean(layers.values())
    compared = [row for row in made if row["variant"] == 1 and (row["record"], row["defense"]) in similar]
    for _, rows_of_one in _grouped(compared, lambda row: before[row["record"]].extra.get("model_sha256", row["record"])):
        values = {place: similar[row["record"], row["defense"]] for place, row in enumerate(rows_of_one)}
        twin = next((values[place] for place, row in enumerate(rows_of_one) if row["defense"] == "clean"), None)
        defended = {place: values[place] for place, row in enumerate(rows_of_one) if row["defense"] not in ("none", "clean")}
        if twin is None or not defended:
            continue
        from bibau_jax.metrics import bec  # brings JAX with it, which most tables do not need

        for place, value in bec.code_form(defended, twin).items():
            rows_of_one[place]["bec_code"] = value


def _sorting_key(row: dict) -> tuple:
    place = (words.order(words.ATTACKS, row["attack"]), words.order(words.DEFENSES, row["defense"]))
    return (row["dataset"], row["model"], *place, row["variant"], row["seed"], row["record"])


def relevant(config: dict, defense: str, reactivated: bool = True) -> dict:
    """The settings that a row's numbers depend on, flat: {"implant.epochs": 15, ...}; `reactivated`: of checks too."""
    base = defense.partition(":")[0]
    kept = {}
    for name, value in records.flat(config).items():
        section, _, rest = name.partition(".")
        own = rest.partition(".")[0]
        if any(name == free or name.startswith(f"{free}.") for free in FREE):
            continue
        if section == "reactivate" and not reactivated:
            continue
        if section in ("attack", "data") and isinstance(config[section].get(own), dict) and own != config[section]["name"]:
            continue  # settings of other attacks and data sets, and below of other defences
        if section == "defense" and isinstance(config["defense"].get(own), dict) and own not in ("pgd", base):
            continue
        if section == "defense" and own not in (*USES.get(base, (own,)), "max_seconds"):
            continue
        kept[name] = value
    return kept


def _set_apart(made, configs) -> None:
    """Numbers the variants of a row whose runs had other settings, and says in "settings" how each differs from the first.

    The first is the one that most runs have, so that a single run with something changed never takes the place of a series. It
    is the same one for all attacks, whose own settings aside, so that a mean over attacks is one of like runs.
    """
    shared, own = {}, {}  # by row: the settings besides the attack's, and the attack's
    for row in made:
        settings = relevant(configs[row["record"]], row["defense"], any(n in row for n in words.MEASURES))
        own[id(row)] = {name: value for name, value in settings.items() if name.startswith("attack.")}
        shared[id(row)] = {name: value for name, value in settings.items() if name not in own[id(row)]}
    for _, members in _grouped(sorted(made, key=_sorting_key), _beside_attack):
        parts, further = _alike(members, shared), Counter()
        for number, part in enumerate(parts, 1):
            for attack, of_attack in _grouped(part, lambda row: row["attack"]):
                main, *others = _alike(of_attack, own)
                for alike in (main, *others):
                    variant = number
                    if alike is not main:  # numbered after all that differ for every attack
                        further[attack] += 1
                        variant = len(parts) + further[attack]
                    told = [_difference(shared, alike[0], parts[0][0]), _difference(own, alike[0], main[0])]
                    for row in alike:
                        row |= {"variant": variant, "settings": ", ".join(filter(None, told))}


def _beside_attack(row: dict) -> tuple:
    return tuple(row[key] for key in GROUP if key not in ("attack", "variant"))


def _grouped(rows, key) -> list[tuple]:
    """(key, rows) in the order in which keys first come."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _alike(rows, settings: dict[int, dict]) -> list[list[dict]]:
    """The rows in parts with the same `settings`, which are by the row's id; the largest part first."""
    parts: list[tuple[dict, list[dict]]] = []
    for row in rows:
        mine = settings[id(row)]
        if (members := next((part for other, part in parts if not _unlike(mine, other)), None)) is None:
            parts.append((mine, members := []))
        members.append(row)
    return sorted((part for _, part in parts), key=len, reverse=True)


def _difference(settings: dict[int, dict], row: dict, first: dict) -> str:
    ours, theirs = settings[id(row)], settings[id(first)]
    return ", ".join(f"{name} {_said(ours, name)} instead of {_said(theirs, name)}" for name in _unlike(ours, theirs))


def _unlike(one: dict, other: dict) -> list[str]:
    """The settings in which two runs differ; what an older one does not name yet is what was done then."""
    differ = [name for name in one.keys() & other.keys() if one[name] != other[name]]
    for newer, older in ((one, other), (other, one)):
        added = newer.keys() - older.keys()
        differ += [name for name in added if not records.as_before(name, newer[name], older)]
    return sorted(differ)


def _said(settings: dict, name: str):
    return settings.get(name, records.DONE_BEFORE.get(name, "none"))


def rows(found) -> list[dict]:
    """One row a measured model, in a fixed order, from records or a mapping of name -> Record.

    Rates in percent with their counts, `ca_loss` in points against `none` of the same record (None without one), seconds,
    settings, device; further numbers of a measurement under their own names.
    """
    named = dict(found if isinstance(found, dict) else ((f"{i:04d}", record) for i, record in enumerate(found)))
    made = []
    for name, record in named.items():
        before = words.backdoored(record)
        for measured in record.metrics.values():
            row = _row(record, measured, name)
            if before is not None and row["ca"] is not None and words.rate(before.ca) is not None:
                row["ca_loss"] = words.rate(before.ca) - row["ca"]
            made.append(row)
    _set_apart(made, {name: record.config for name, record in named.items()})
    _add_code_form(made, named)
    return sorted(made, key=_sorting_key)


def shown(found: dict, made, changed: str = "") -> dict:
    """The records with those of their models that pictures show: of the variant that most runs have, and each of them once.

    `changed` names a setting that may be another one all the same.
    """
    kept, seen = {}, set()
    for row in made:
        alone = row["settings"].startswith(f"{changed} ") and "," not in row["settings"]
        model = (row["attack"], row["seed"], row["defense"], row.get("model_sha256", row["record"]))
        if (row["variant"] == 1 or (changed and alone)) and model not in seen:
            seen.add(model)
            kept.setdefault(row["record"], set()).add(row["defense"])
    parts = {
        name: {key: m for key, m in found[name].metrics.items() if m.defense in kept[name]} for name in found if name in kept
    }
    return {name: dataclasses.replace(found[name], metrics=metrics) for name, metrics in parts.items()}


def further_columns(made) -> list[str]:
    """The further measurements that any of the rows holds, in a fixed order; those that tables show come first."""
    names = {key for row in made for key in row if key not in (*COLUMNS, "model_sha256")}
    return sorted(names, key=lambda name: words.order(words.MEASURES, name))


def spread(values) -> dict:
    """Mean, sample standard deviation (None for one value) and number of the values that are there."""
    values = [value for value in values if words.is_number(value)]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values) if values else None, "std": deviation, "n": len(values)}


def _without_repeats(made) -> list[dict]:
    """The rows less those of a model that others tell too, the fullest kept: records may share a backdoored model or a twin."""
    told: dict[tuple, dict] = {}
    for row in made:
        model = row.get("model_sha256")
        same = tuple((key, value) for key, value in row.items() if key not in ("record", "seconds", "device"))
        place = (row["seed"], model) if model else same
        if place not in told or _told(row) > _told(told[place]):
            told[place] = row
    return list(told.values())


def _told(row: dict) -> int:
    return sum(value is not None for value in row.values())


def once(made) -> list[dict]:
    """The rows with every model once in each line of the summary, in the same order."""
    groups = _grouped(made, lambda row: tuple(row[key] for key in GROUP))
    kept = {id(row) for _, members in groups for row in _without_repeats(members)}
    return [row for row in made if id(row) in kept]


def summary(made) -> list[dict]:
    """Mean and sample standard deviation over seeds per (dataset, model, attack, defense, variant), in the rows' order.

    `differs` names what is not the same (or, for `seed`, is not different) among the runs of a line, so that nobody takes its
    spread for one over seeds.
    """
    groups: dict[tuple, list] = {}
    for row in sorted(made, key=_sorting_key):
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    lines = []
    for key, members in groups.items():
        members = _without_repeats(members)
        seeds = [row["seed"] for row in members]
        differs = [name for name in SETTINGS if len({row[name] for row in members}) > 1]
        differs += ["seed"] if len(set(seeds)) < len(seeds) else []
        line = dict(zip(GROUP, key, strict=True)) | {"settings": members[0]["settings"]}
        line |= {"n": len(members), "seeds": sorted(set(seeds)), "differs": differs}
        measured = (*RATES, "ca_loss", "seconds", *further_columns(members))
        lines.append(line | {name: spread(row.get(name) for row in members) for name in measured})
    return lines


def collect(folder: Path, leave_out: Path | None = None) -> tuple[dict, list[str]]:
    """Every record under `folder` (name -> Record) and, one line each, what could not be read."""
    found, broken = {}, []
    for path in sorted(folder.rglob("*.json")):
        if leave_out is not None and path.resolve() == leave_out.resolve():
            continue
        try:
            record = records.read(path)
            if not rows([record]):  # a record that lacks what a row needs is as unreadable as a torn one
                raise UserError(f"{path} holds no measurement yet")
            found[path.relative_to(folder).as_posix()] = record
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            told = str(error) if isinstance(error, UserError) else f"{path} is no run's record: {error!r}"
            broken.append(" ".join(told.split()))
    return found, broken
