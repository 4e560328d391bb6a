"""Tables from records: the closing table of one run in the terminal, and the results of many runs as Markdown and JSON.

python -m bibau_jax.report.tables RECORDS_DIR --out results/cifar10_cpu
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bibau_jax import records
from bibau_jax.errors import UserError, say
from bibau_jax.report import own, series, words

HEADINGS = {"ca": "CA", "asr": "ASR", "robust_accuracy": "Robust accuracy", "ca_loss": "CA loss", "seconds": "Seconds"}
FEW = 3  # settings that a table at a glance spells out
OPEN, CLOSE = "<!-- text -->", "<!-- /text -->"


def terminal(record) -> Table:
    """The closing table of one run: models by CA, ASR, robust accuracy, further numbers, seconds and peak memory."""
    if own.is_own(record):
        return own.terminal(record)
    config, more = record.config, words.further(record)
    title = f"{words.attack(config['attack']['name'])} on {words.dataset(config['data']['name'])}, seed {record.seed}"
    caption = f"{words.verdict(record)}\n{words.reservation(record)}"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits 80 columns with every check
    table.add_column("model", min_width=11)
    for heading in ("CA %", "ASR %", "robust %", *map(words.measure, more), "seconds", "peak MB"):
        table.add_column(heading, justify="right")
    for measured in series.in_order(record.metrics.values()):
        rates = (words.number(words.rate(getattr(measured, name))) for name in series.RATES)
        spent = words.cost(record, measured)
        memory = words.number(spent.peak_memory_mb if spent else None, 0)
        extra = (words.further_value(name, measured.extra.get(name)) for name in more)
        table.add_row(words.defense(measured.defense), *rates, *extra, words.number(measured.seconds), memory)
    return table


def show(record) -> None:
    """Print the closing table of one run to the terminal."""
    Console().print(terminal(record))


def _shown(made) -> list[str]:
    return [name for name in words.MEASURES if any(row.get(name) is not None for row in made)]


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _fixed(value, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if words.is_number(value) else words.NOTHING


def _plus_minus(spread_of: dict | None) -> str:
    if not spread_of or spread_of["mean"] is None:
        return words.NOTHING
    deviation = f" ± {_fixed(spread_of['std'])}" if spread_of["std"] is not None else ""
    return _fixed(spread_of["mean"]) + deviation


def markdown_table(headings, left: int, lines) -> str:
    """A table in Markdown: the first `left` columns of words, the others of numbers."""
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
    return markdown_table(headings, 4, body)


def _is_alone(line: dict) -> bool:
    """Whether a line is of a variant that differs in one setting."""
    return line["variant"] > 1 and "," not in line["settings"]


def _in_short(line: dict) -> str:
    """What a variant's settings are; what a single one was instead of, too."""
    told = line["settings"].replace("defense.", "")
    return told if _is_alone(line) else ", ".join(one.partition(" instead of ")[0] for one in told.split(", "))


def glance(lines) -> str:
    """R-ASR by defence and attack, with averages of CA loss, ASR, R-ASR, Q-ASR, from a summary; "" where that says little.

    An average is over all of the table's attacks, each counting once whatever its seeds; a defence that lacks one has none.
    """
    lines = [line for line in lines if (line.get("r_asr") or {}).get("mean") is not None]
    places = sorted({(line["dataset"], line["model"]) for line in lines})
    attacks = sorted({line["attack"] for line in lines}, key=lambda name: words.order(words.ATTACKS, name))
    if len(places) != 1 or len(attacks) < 2:
        return ""
    by_defense: dict[str, dict[str, dict]] = {}
    for line in lines:
        name = _names(line)[3]
        if line["variant"] > 1 and line["settings"].count(",") < FEW:  # which say more than a number
            name = f"{words.defense(line['defense'])} ({_in_short(line)})"
        by_defense.setdefault(name, {})[line["attack"]] = line
    averaged = ("ca_loss", "asr", *words.REACTIVATION)
    body = []
    for name, found in by_defense.items():
        means = {n: [found[a][n]["mean"] for a in attacks if a in found and found[a].get(n)] for n in averaged}
        complete = {n: statistics.mean(m) if len(m) == len(attacks) and None not in m else None for n, m in means.items()}
        of_attacks = (_fixed(found[a]["r_asr"]["mean"], 1) if a in found else words.NOTHING for a in attacks)
        body.append((name, *(_fixed(complete[n], 1) for n in averaged), *of_attacks))
    headings = ("Defence", *(f"{HEADINGS.get(n) or words.measure(n)}, average" for n in averaged), *map(words.attack, attacks))
    return markdown_table(headings, 1, body)


def _seeds(line: dict) -> str:
    return f"{line['n']} †" if line["differs"] else str(line["n"])


def _rows_table(made) -> str:
    more = _shown(made)
    headings = ("Data set", "Model", "Attack", "Defence", "Seed", "CA", "CA loss", "ASR", *map(words.measure, more))
    headings += ("Robust accuracy", "Seconds", "Training images", "Clean images", "Machine", "Record")
    body = []
    for row in made:
        ca, asr, robust = (_fixed(row[r]) + _counts(row, r) for r in series.RATES)
        numbers = (row["seed"], ca, _fixed(row["ca_loss"]), asr, *(_fixed(row.get(n)) for n in more), robust)
        sizes = (words.NOTHING if row[key] is None else row[key] or "all" for key in series.SETTINGS)
        body.append((*_names(row), *numbers, _fixed(row["seconds"], 1), *sizes, row["device"], row["record"]))
    return markdown_table(headings, 4, body)


def _counts(row: dict, rate: str) -> str:
    return "" if row[rate] is None else f" ({row[f'{rate}_hits']}/{row[f'{rate}_count']})"


def _machines(found: dict) -> str:
    made_on: dict[str, list] = {}
    for name in sorted(found):
        versions = ", ".join(f"{package} {v}" for package, v in sorted(found[name].versions.items()))
        made_on.setdefault(f"{series.device_name(found[name].device)}; {versions}", []).append(name)
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
    made = series.rows(found)
    lines = series.summary(made)
    note = (
        "Mean ± sample standard deviation over seeds; rates in percent, CA loss in points against the same run's backdoored "
        "model. The clean twin was trained without poison: its ASR is how often it gives the target class on the attack's "
        "triggered images by itself."
    )
    mixed = "† " + "; ".join(dict.fromkeys(f"{name} mixed" for line in lines for name in line["differs"]))
    if any(line["defense"] == "ibu" for line in lines):
        note += "\n\nIBU is no defence: it sees the trigger, and shows how far any defence could get."
    note += f"\n\n{mixed}: this spread is not over seeds alone." if any(line["differs"] for line in lines) else ""
    several = len({line["model"] for line in lines}) > 1  # each has variants of its own
    for line in lines:
        if line["variant"] > 1:
            model = f"{_cell(line['model'])}, " if several else ""
            note += f"\n\n{model}{_names(line)[3]}, {words.attack(line['attack'])}: {_cell(line['settings'])}."
    for kind in ("not_applicable", "diverged"):
        for name in sorted(found):
            for defense, reason in (_left_out(found[name]).get(kind) or {}).items():
                note += f"\n\n{words.defense(defense)} {kind.replace('_', ' ')} in {_cell(name)}: {_cell(reason)}"
    head = f"{text}\n\n<!-- made from records by bibau_jax.report.tables; only the text above is written by hand -->\n"
    first = glance(lines)
    first = f"## At a glance\n\nR-ASR by attack, percent, after the averages over all of them.\n\n{first}\n" if first else ""
    body = f"{first}## Summary\n\n{_summary_table(lines)}\n{note}\n\n## Every run\n\n{_rows_table(series.once(made))}"
    return f"{head}\n{body}\n## Machines and commands\n\n{_machines(found)}"


def _left_out(record) -> dict:
    """The defences of a record that gave no model, and why, by kind."""
    before = words.backdoored(record)
    return before.extra if before is not None else {}


def write(folder, out) -> tuple[list[Path], list[str]]:
    """Write `<out>.md` and `<out>.json` from the records under `folder`; returns both paths and what could not be read.

    The same records give the same bytes. Raises UserError where no record can be read or `<out>.md` holds text without markers.
    """
    folder, page, data = Path(folder), Path(f"{out}.md"), Path(f"{out}.json")
    found, broken = series.collect(folder, data)
    if not found:
        raise UserError("; ".join([f"no record could be read under {folder}", *broken]))
    text = markdown(found, introduction(page))
    made = series.rows(found)
    page.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(page, text)
    table = {"summary": series.summary(made), "rows": made}
    records.write_text(data, json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return [page, data], broken


def insert(readme, out) -> None:
    """Puts the summary of `<out>.json` between `<!-- results NAME -->` and `<!-- /results -->` of a Markdown file.

    NAME is the last part of `out`; behind `<!-- glance NAME -->` it is the table at a glance, without variants that differ in
    more than one setting. Raises UserError where the markers are missing.
    """
    page, out = Path(readme), Path(out)
    text, lines = page.read_text(encoding="utf-8"), json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))["summary"]
    opening, made = f"<!-- results {out.name} -->", _summary_table
    if opening not in text and f"<!-- glance {out.name} -->" in text:
        opening, made = f"<!-- glance {out.name} -->", glance
        lines = [line for line in lines if line["variant"] == 1 or _is_alone(line)]
    start = text.find(opening)
    end = text.find("<!-- /results -->", start)
    if start < 0 or end < 0:
        raise UserError(f"{readme} has no text between {opening} and <!-- /results -->")
    table = made(lines)
    records.write_text(page, f"{text[: start + len(opening)]}\n{table}{text[end:]}")


def main(arguments=None) -> int:
    """The command line: returns 0, or 1 where a record could not be read (each is named on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report.tables", description="Results from records.")
    parser.add_argument("records", help="folder with record files (*.json), searched recursively")
    parser.add_argument("--out", required=True, help="path of the results without suffix, e.g. results/cifar10_cpu")
    parser.add_argument("--readme", help="a Markdown file to put the summary into, between its result markers")
    flags = parser.parse_args(arguments)
    if flags.readme and not Path(flags.readme).is_file():
        say(f"there is no file {flags.readme}")
        return 1

    def work():
        written, broken = write(flags.records, flags.out)
        if flags.readme:
            insert(flags.readme, flags.out)
            written.append(Path(flags.readme))
        return written, broken

    return told(work)


def told(work) -> int:
    """The exit status after `work() -> (files written, records that could not be read)`: 0, or 1; says what was done."""
    try:
        written, broken = work()
    except UserError as error:
        say(error)
        return 1
    except OSError as error:
        say(f"cannot write {error.filename}: {error.strerror}")
        return 1
    for line in broken:
        say(f"left out: {line}")
    for path in written:
        print(path)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
