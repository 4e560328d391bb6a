"""Tables from records: the closing table of one run in the terminal, and the results of many runs as Markdown and JSON.

python -m bibau_jax.report.tables RECORDS_DIR --out results/cifar10_cpu
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import words

RATES = ("ca", "asr", "robust_accuracy")
HEADINGS = {"ca": "CA", "asr": "ASR", "robust_accuracy": "Robust accuracy", "ca_loss": "CA loss", "seconds": "Seconds"}
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
    "ft": TRAINING,
    "ibu": (*TRAINING, "ibu"),
    "base_at": (*TRAINING, "pgd", "max_grad_norm"),
    "nc": (*TRAINING, "nc"),
    # The section of these holds all their settings.
    **{name: (name,) for name in ("bti_dbf", "anp", "ep", "bnp", "rnp", "clp", "i_bau", "sau", "pam", "nad")},
}  # of the defence's settings
COLUMNS = (*GROUP, "settings", "seed", *RATES, "ca_loss", *(f"{r}_{part}" for r in RATES for part in ("hits", "count")))
COLUMNS = (*COLUMNS, "seconds", *SETTINGS, "device", "record")  # every other number of a row is a further measurement
OPEN, CLOSE = "<!-- text -->", "<!-- /text -->"


def terminal(record) -> Table:
    """The closing table of one run: models by CA, ASR, robust accuracy, further numbers, seconds and peak memory."""
    config, more = record.config, words.further(record)
    title = f"{words.attack(config['attack']['name'])} on {words.dataset(config['data']['name'])}, seed {record.seed}"
    table = Table(title=title, caption=f"{words.verdict(record)}\n{words.reservation(record)}")
    table.add_column("model")
    for heading in ("CA %", "ASR %", "robust %", *map(words.measure, more), "seconds", "peak MB"):
        table.add_column(heading, justify="right")
    for measured in in_order(record.metrics.values()):
        rates = (words.number(words.rate(getattr(measured, name))) for name in RATES)
        spent = words.cost(record, measured)
        memory = words.number(spent.peak_memory_mb if spent else None, 0)
        extra = (words.further_value(name, measured.extra.get(name)) for name in more)
        table.add_row(words.defense(measured.defense), *rates, *extra, words.number(measured.seconds), memory)
    return table


def show(record) -> None:
    """Print the closing table of one run to the terminal."""
    Console().print(terminal(record))


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
    data = config["data"]
    row = {
        "dataset": data["name"],
        "model": words.model(config["model"]),
        "attack": config["attack"]["name"],
        "defense": measured.defense,
        "variant": 1,
        "settings": "",
        "seed": record.seed,
    }
    for key in RATES:
        counted = getattr(measured, key)
        row |= {key: words.rate(counted), f"{key}_hits": counted.hits, f"{key}_count": counted.count}
    row |= {"ca_loss": None, "seconds": measured.seconds, "record": name, "device": device_name(record.device)}
    row |= {key: data.get(key) for key in SETTINGS}
    further = {key: value for key, value in measured.extra.items() if words.is_number(value) and key not in COLUMNS}
    model = {key: measured.extra[key] for key in ("model_sha256",) if key in measured.extra}
    return {key: row[key] for key in COLUMNS} | model | dict(sorted(further.items()))


def _code_form(record) -> dict[str, float]:
    """BEC of the published code for the models of one record, from the similarities that it holds; {} without a twin."""
    means = {
        measured.defense: statistics.mean(measured.extra["bec_similarity"].values())
        for measured in record.metrics.values()
        if isinstance(measured.extra.get("bec_similarity"), dict) and measured.extra["bec_similarity"]
    }
    if "clean" not in means:
        return {}
    from bibau_jax.metrics import bec  # brings JAX with it, which most tables do not need

    defended = {name: value for name, value in means.items() if name not in ("none", "clean")}
    return bec.code_form(defended, means["clean"]) if defended else {}


def _sorting_key(row: dict) -> tuple:
    place = (words.order(words.ATTACKS, row["attack"]), words.order(words.DEFENSES, row["defense"]))
    return (row["dataset"], row["model"], *place, row["variant"], row["seed"], row["record"])


def relevant(config: dict, defense: str, reactivated: bool = True) -> dict:
    """The settings that a row's numbers depend on, flat: {"implant.epochs": 15, ...}; `reactivated`: of checks too."""
    base, attack = defense.partition(":")[0], config["attack"]["name"]
    kept = {}
    for name, value in records.flat(config).items():
        section, _, rest = name.partition(".")
        own = rest.partition(".")[0]
        if any(name == free or name.startswith(f"{free}.") for free in FREE):
            continue
        if section == "reactivate" and not reactivated:
            continue
        if section == "attack" and isinstance(config["attack"].get(own), dict) and own != attack:
            continue  # settings of other attacks, and below of other defences
        if section == "defense" and isinstance(config["defense"].get(own), dict) and own not in ("pgd", base):
            continue
        if section == "defense" and own not in (*USES.get(base, (own,)), "max_seconds"):
            continue
        kept[name] = value
    return kept


def _set_apart(made, configs) -> None:
    """Numbers the variants of a row whose runs had other settings, and says in "settings" how each differs from the first.

    The first is the one that most runs have, so that a single run with something changed never takes the place of a series.
    """
    groups: dict[tuple, list[tuple[dict, list[dict]]]] = {}
    for row in sorted(made, key=_sorting_key):
        reactivated = any(name in row for name in words.MEASURES)
        settings = relevant(configs[row["record"]], row["defense"], reactivated)
        variants = groups.setdefault(tuple(row[key] for key in GROUP[:-1]), [])
        # Settings that an older record does not name yet set nothing apart.
        same = (members for other, members in variants if not _unlike(settings, other))
        if (members := next(same, None)) is None:
            variants.append((settings, members := []))
        members.append(row)
    for variants in groups.values():
        variants.sort(key=lambda variant: -len(variant[1]))
        for number, (settings, members) in enumerate(variants, 1):
            names = _unlike(settings, variants[0][0])
            told = ", ".join(f"{name} {settings[name]} instead of {variants[0][0][name]}" for name in names)
            for row in members:
                row |= {"variant": number, "settings": told}


def _unlike(one: dict, other: dict) -> list[str]:
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def rows(found) -> list[dict]:
    """One row a measured model, in a fixed order, from records or a mapping of name -> Record.

    Rates in percent with their counts, `ca_loss` in points against `none` of the same record (None without one), seconds,
    settings, device; further numbers of a measurement under their own names.
    """
    named = dict(found if isinstance(found, dict) else ((f"{i:04d}", record) for i, record in enumerate(found)))
    made = []
    for name, record in named.items():
        before, code_form = words.backdoored(record), _code_form(record)
        for measured in record.metrics.values():
            row = _row(record, measured, name)
            row |= {"bec_code": code_form[measured.defense]} if measured.defense in code_form else {}
            if before is not None and row["ca"] is not None and words.rate(before.ca) is not None:
                row["ca_loss"] = words.rate(before.ca) - row["ca"]
            made.append(row)
    _set_apart(made, {name: record.config for name, record in named.items()})
    return sorted(made, key=_sorting_key)


def further_columns(made) -> list[str]:
    """The further measurements that any of the rows holds, in a fixed order; those that tables show come first."""
    names = {key for row in made for key in row if key not in (*COLUMNS, "model_sha256")}
    return sorted(names, key=lambda name: words.order(words.MEASURES, name))


def _shown(made) -> list[str]:
    return [name for name in words.MEASURES if any(row.get(name) is not None for row in made)]


def spread(values) -> dict:
    """Mean, sample standard deviation (None for one value) and number of the values that are there."""
    values = [value for value in values if words.is_number(value)]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values) if values else None, "std": deviation, "n": len(values)}


def _without_repeats(made) -> list[dict]:
    """The rows less those of a model that was measured before: several records may share a backdoored model or a twin."""
    told = {}
    for row in made:
        model = row.get("model_sha256")
        same = tuple((key, value) for key, value in row.items() if key not in ("record", "seconds", "device"))
        told.setdefault((row["seed"], model) if model else same, row)
    return list(told.values())


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


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _fixed(value, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if words.is_number(value) else words.NOTHING


def _plus_minus(spread_of: dict | None) -> str:
    if not spread_of or spread_of["mean"] is None:
        return words.NOTHING
    deviation = f" ± {_fixed(spread_of['std'])}" if spread_of["std"] is not None else ""
    return _fixed(spread_of["mean"]) + deviation


def _markdown_table(headings, left: int, lines) -> str:
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (headings, rule, *lines)) + "\n"


def _names(row: dict) -> tuple:
    defense = words.defense(row["defense"]) + (f" (settings {row['variant']})" if row["variant"] > 1 else "")
    return (words.dataset(row["dataset"]), row["model"], words.attack(row["attack"]), defense)


def _summary_table(lines) -> str:
    shown = ("ca", "ca_loss", "asr", *_shown(lines), "robust_accuracy", "seconds")
    headings = (
        "Data set",
        "Model",
        "Attack",
        "Defence",
        *(HEADINGS.get(n) or words.measure(n) for n in shown),
        "Seeds",
    )
    body = [(*_names(line), *(_plus_minus(line.get(n)) for n in shown), _seeds(line)) for line in lines]
    return _markdown_table(headings, 4, body)


def _seeds(line: dict) -> str:
    return f"{line['n']} †" if line["differs"] else str(line["n"])


def _rows_table(made) -> str:
    more = _shown(made)
    headings = ("Data set", "Model", "Attack", "Defence", "Seed", "CA", "CA loss", "ASR", *map(words.measure, more))
    headings += ("Robust accuracy", "Seconds", "Training images", "Clean images", "Machine", "Record")
    body = []
    for row in made:
        ca, asr, robust = (f"{_fixed(row[r])} ({row[f'{r}_hits']}/{row[f'{r}_count']})" for r in RATES)
        numbers = (row["seed"], ca, _fixed(row["ca_loss"]), asr, *(_fixed(row.get(n)) for n in more), robust)
        sizes = (words.NOTHING if row[key] is None else row[key] or "all" for key in SETTINGS)
        body.append((*_names(row), *numbers, _fixed(row["seconds"], 1), *sizes, row["device"], row["record"]))
    return _markdown_table(headings, 4, body)


def _machines(found: dict) -> str:
    made_on: dict[str, list] = {}
    for name in sorted(found):
        versions = ", ".join(f"{package} {v}" for package, v in sorted(found[name].versions.items()))
        made_on.setdefault(f"{device_name(found[name].device)}; {versions}", []).append(name)
    machines = [f"- {_cell(machine)}: {len(names)} of {len(found)} records" for machine, names in made_on.items()]
    commands = [f"# {name}\n{found[name].command}".replace("```", "") for name in sorted(found)]
    return "\n".join(machines) + "\n\n```sh\n" + "\n".join(commands) + "\n```\n"


def introduction(path: Path) -> str:
    """The hand-written text at the top of an existing Markdown file, with its markers; empty markers for a new file.

    Raises UserError where the file is there but has no markers, rather than writing over somebody's text.
    """
    if not path.exists():
        return f"{OPEN}\n{CLOSE}"
    text = path.read_text(encoding="utf-8")
    start, end = text.find(OPEN), text.find(CLOSE)
    if start < 0 or end < start:
        raise UserError(f"{path} has no text between {OPEN} and {CLOSE}: move it away, or add the two markers to it")
    return text[start : end + len(CLOSE)]


def markdown(found: dict, text: str = f"{OPEN}\n{CLOSE}") -> str:
    """The results page of the records (name -> Record) as Markdown under the hand-written `text`."""
    made = rows(found)
    lines = summary(made)
    note = (
        "Mean ± sample standard deviation over seeds; rates in percent, CA loss in points against the same run's backdoored "
        "model. The clean twin was trained without poison: its ASR is how often it gives the target class on the attack's "
        "triggered images by itself."
    )
    mixed = "† " + "; ".join(dict.fromkeys(f"{name} mixed" for line in lines for name in line["differs"]))
    if any(line["defense"] == "ibu" for line in lines):
        note += "\n\nIBU is no defence: it sees the trigger, and shows how far any defence could get."
    note += f"\n\n{mixed}: this spread is not over seeds alone." if any(line["differs"] for line in lines) else ""
    for line in lines:
        if line["variant"] > 1:
            note += f"\n\n{_names(line)[3]}, {words.attack(line['attack'])}: {_cell(line['settings'])}."
    head = f"{text}\n\n<!-- made from records by bibau_jax.report.tables; only the text above is written by hand -->\n"
    body = f"## Summary\n\n{_summary_table(lines)}\n{note}\n\n## Every run\n\n{_rows_table(made)}"
    return f"{head}\n{body}\n## Machines and commands\n\n{_machines(found)}"


def collect(folder: Path, leave_out: Path | None = None) -> tuple[dict, list[str]]:
    """Every record under `folder` (name -> Record) and, one line each, what could not be read."""
    found, broken = {}, []
    for path in sorted(folder.rglob("*.json")):
        if leave_out is not None and path.resolve() == leave_out.resolve():
            continue
        try:
            record = records.read(path)
            rows([record])  # a record that lacks what a row needs is as unreadable as a torn one
            found[path.relative_to(folder).as_posix()] = record
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            told = str(error) if isinstance(error, UserError) else f"{path} is no run's record: {error!r}"
            broken.append(" ".join(told.split()))
    return found, broken


def write(folder, out) -> tuple[list[Path], list[str]]:
    """Write `<out>.md` and `<out>.json` from the records under `folder`; returns both paths and what could not be read.

    The same records give the same bytes. Raises UserError where no record can be read or `<out>.md` holds text without markers.
    """
    folder, page, data = Path(folder), Path(f"{out}.md"), Path(f"{out}.json")
    found, broken = collect(folder, data)
    if not found:
        raise UserError("; ".join([f"no record could be read under {folder}", *broken]))
    text = markdown(found, introduction(page))
    made = rows(found)
    page.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(page, text)
    table = {"summary": summary(made), "rows": made}
    records.write_text(data, json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return [page, data], broken


def insert(readme, out) -> None:
    """Puts the summary of `<out>.json` between `<!-- results NAME -->` and `<!-- /results -->` of a Markdown file.

    NAME is the last part of `out`. Raises UserError where the markers are missing.
    """
    page, out = Path(readme), Path(out)
    text, opening = page.read_text(encoding="utf-8"), f"<!-- results {out.name} -->"
    start = text.find(opening)
    end = text.find("<!-- /results -->", start)
    if start < 0 or end < 0:
        raise UserError(f"{readme} has no text between {opening} and <!-- /results -->")
    table = _summary_table(json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))["summary"])
    records.write_text(page, f"{text[: start + len(opening)]}\n{table}{text[end:]}")


def main(arguments=None) -> int:
    """The command line: returns 0, or 1 where a record could not be read (each is named on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report.tables", description="Results from records.")
    parser.add_argument("records", help="folder with record files (*.json), searched recursively")
    parser.add_argument("--out", required=True, help="path of the results without suffix, e.g. results/cifar10_cpu")
    parser.add_argument("--readme", help="a Markdown file to put the summary into, between its result markers")
    flags = parser.parse_args(arguments)
    if flags.readme and not Path(flags.readme).is_file():
        print(f"error: there is no file {flags.readme}", file=sys.stderr)
        return 1
    try:
        written, broken = write(flags.records, flags.out)
        if flags.readme:
            insert(flags.readme, flags.out)
            written.append(Path(flags.readme))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    for line in broken:
        print(f"skipped {line}", file=sys.stderr)
    for path in written:
        print(path)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
