"""The paper's tables from ours: defences by attacks, mean and spread over seeds, the paper's value beside where it has one."""

import csv
import io
import json
import statistics
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

from bibau_jax.report import series, words

HEADINGS = {"ca": "CA", "asr": "ASR", "r_asr": "R-ASR", "q_asr": "Q-ASR"}
HEADINGS |= {"bec": "BEC", "bec_squashed": "sigmoid", "bec_code": "code form"}
HEADINGS |= {"r_ca": "CA after R", "q_clean": "Q, clean images", "q_twin": "Q, clean model", "q_twin_clean": "Q, both clean"}
AVERAGE = "average"


class Shape(NamedTuple):
    """A table of the paper: its heading, what cells hold, which attacks are columns, and whether it is the ablation's."""

    title: str
    metrics: tuple[str, ...]
    attacks: tuple[str, ...]
    ablation: bool = False


TEN = ("badnets", "blended", "wanet", "refool", "iad", "issba", "sig", "narcissus", "adap_blend", "adap_patch")
SHAPES = {
    "1": Shape("Clean accuracy and attack success by defence and attack", ("ca", "asr"), TEN[:8]),
    "2": Shape("Robustness to re-activation", ("ca", "asr", "r_asr", "q_asr"), TEN),
    "4": Shape(
        "Backdoor existence coefficient", ("bec", "bec_squashed", "bec_code"), tuple(name for name in TEN[:8] if name != "sig")
    ),
    "5": Shape("Enhanced adaptive attacks", ("ca", "asr", "r_asr", "q_asr"), ("enhanced_adap_blend", "enhanced_adap_patch")),
    "controls": Shape("What the re-activation attacks do besides", ("r_ca", "q_clean", "q_twin", "q_twin_clean"), TEN),
    "6": Shape("Ablation", ("ca", "asr", "r_asr", "q_asr"), ("badnets", "refool", "iad", "issba"), ablation=True),
}
NO_DEFENCES = ("none", "clean", "ibu")
IN_ABLATION = ("none", "base_at", "bibau_u:+A", "bibau_u:+B", "bibau_u")
# The same metric of the same data set stands in several of the paper's tables; each of ours is compared with its own.
PAPER = {"cifar10": {"1": "1", "2": "2", "4": "4", "5": "5", "6": "6"}, "tiny_imagenet": {"1": "9", "2": "10"}}
PAPER |= {"gtsrb": {"1": "11", "2": "12"}}


# What the paper prints as BEC is the sigmoid; its raw value and the code's form stand nowhere.
PRINTED = {"bec_squashed": "bec", "bec": "", "bec_code": ""}


class Cell(NamedTuple):
    """One number of a table: ours over seeds (None where nothing was measured) and the paper's."""

    mean: float | None
    std: float | None
    n: int
    paper: float | None


@cache
def paper() -> dict:
    """The paper's tables by number: {"2": {"dataset", "model", "metrics", "rows": [{"defense", "attack", "ca", ...}]}}."""
    return json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))["tables"]


def papers_value(number: str, dataset: str, defense: str, attack: str, metric: str) -> float | None:
    """What the paper prints in the cell of its table that is shaped like ours; None where it has none."""
    table = paper().get(PAPER.get(dataset, {}).get(number, ""), {"rows": []})
    found = (row for row in table["rows"] if row["defense"] == defense and row["attack"] == attack)
    return next((row.get(metric) for row in found), None)


def cells(lines, number: str, dataset: str) -> dict[str, dict[str, dict[str, Cell]]]:
    """{defense: {attack: {metric: Cell}}} of one shape, with the average over attacks, from lines of `series.summary`.

    `lines` are of one data set and network. Defences and attacks without any number are left out, and so are runs with other
    settings (`left_out`). A row has an average where it has every attack that any row has, and those are several.
    """
    shape, made = SHAPES[number], {}
    for line in lines:
        wanted = line["defense"] in IN_ABLATION if shape.ablation else ":" not in line["defense"]
        if line["attack"] not in shape.attacks or not wanted or line["variant"] > 1:
            continue
        row = made.setdefault(line["defense"], {}).setdefault(line["attack"], {})
        for metric in shape.metrics:
            told = line.get(metric) or {"mean": None, "std": None, "n": 0}
            theirs = papers_value(number, dataset, line["defense"], line["attack"], PRINTED.get(metric, metric))
            row[metric] = Cell(told["mean"], told["std"], told["n"], theirs)
    measured = {d: row for d, row in made.items() if any(c.mean is not None for cell in row.values() for c in cell.values())}
    every = {attack for row in measured.values() for attack in row}
    for defense, row in measured.items():
        averages = {metric: _average(row, metric, shape, number, dataset, defense) for metric in shape.metrics}
        row |= {AVERAGE: averages} if set(row) == every and len(every) > 1 else {}
    return dict(sorted(measured.items(), key=lambda item: words.order(words.DEFENSES, item[0])))


def left_out(lines) -> list[str]:
    """What no shape shows, because its runs had other settings than most: one line each."""
    told = {}
    for line in lines:
        if line["variant"] > 1:
            told.setdefault((line["defense"], line["settings"]), []).append(f"{words.attack(line['attack'])} ({line['n']})")
    return [f"{words.defense(defense)}: {', '.join(found)}, with {settings}" for (defense, settings), found in told.items()]


def _average(row, metric: str, shape: Shape, number: str, dataset: str, defense: str) -> Cell:
    means = [cell[metric].mean for cell in row.values() if cell[metric].mean is not None]
    means = means if len(means) == len(row) else []
    whole = len(means) == len(shape.attacks)
    theirs = papers_value(number, dataset, defense, AVERAGE, PRINTED.get(metric, metric)) if whole else None
    return Cell(statistics.mean(means) if means else None, None, len(means), theirs)


def columns(made, number: str) -> list[str]:
    """The attacks of a shape that any row has, in the paper's order, and the average where there are several."""
    found = [attack for attack in SHAPES[number].attacks if any(attack in row for row in made.values())]
    return found + ([AVERAGE] if len(found) > 1 else [])


def heading(attack: str, made, number: str) -> str:
    """A column's heading; an average over fewer attacks than the paper's says so."""
    if attack != AVERAGE:
        return words.attack(attack)
    count = len(columns(made, number)) - 1
    return "Average" if count == len(SHAPES[number].attacks) else f"Average of {count}"


def _text(cell: Cell | None, metric: str) -> str:
    digits = 2 if metric.startswith("bec") else 1
    if cell is None or cell.mean is None:
        return words.NOTHING
    return words.number(cell.mean, digits) + (f" ± {words.number(cell.std, digits)}" if cell.std is not None else "")


def markdown(made, number: str) -> str:
    """A shape as a Markdown table; every metric has a line in its cell, the paper's value in parentheses."""
    shape, names = SHAPES[number], columns(made, number)
    heads = ["Defence", "", *(heading(name, made, number) for name in names)]
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * len(names)]
    for defense, row in made.items():
        for place, metric in enumerate(shape.metrics):
            told = []
            for name in names:
                cell = row.get(name, {}).get(metric)
                theirs = f" ({words.further_value(metric, cell.paper)})" if cell is not None and cell.paper is not None else ""
                told.append(_text(cell, metric) + theirs)
            lines.append("| " + " | ".join([words.defense(defense) if not place else "", HEADINGS[metric], *told]) + " |")
    return "\n".join(lines) + "\n"


def html(made, number: str) -> str:
    """A shape as an HTML table of the page's style."""
    shape, names = SHAPES[number], columns(made, number)
    heads = "".join(f'<th scope="col">{escape(heading(name, made, number))}</th>' for name in names)
    body = []
    for defense, row in made.items():
        for place, metric in enumerate(shape.metrics):
            first = f'<th scope="row" rowspan="{len(shape.metrics)}">{escape(words.defense(defense))}</th>' if not place else ""
            inside = "".join(_html_cell(row.get(name, {}).get(metric), metric) for name in names)
            body.append(
                f'<tr class="{"" if place else "is-first"}">{first}<td class="metric">{HEADINGS[metric]}</td>{inside}</tr>'
            )
    head = f'<thead><tr><th scope="col">Defence</th><td></td>{heads}</tr></thead>'
    return f'<table class="numbers shape">{head}<tbody>{"".join(body)}</tbody></table>'


def _html_cell(cell: Cell | None, metric: str) -> str:
    theirs = f" <small>{words.further_value(metric, cell.paper)}</small>" if cell is not None and cell.paper is not None else ""
    return f"<td>{_text(cell, metric)}{theirs}</td>"


def comma_separated(made: dict[tuple[str, str, str], dict]) -> str:
    """All shapes, {(dataset, model, number): cells}, as one CSV with a line a number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("dataset", "model", "table", "defense", "is_defense", "attack", "metric", "mean", "std", "n", "paper"))
    for (dataset, model, number), shape in made.items():
        for defense, row in shape.items():
            for attack, cell in row.items():
                for metric, value in cell.items():
                    if value.mean is not None:
                        ours = (dataset, model, number, defense, defense not in NO_DEFENCES, attack, metric)
                        writer.writerow((*ours, *map(_exact, value)))
    return out.getvalue()


def _exact(value) -> str:
    return "" if value is None else f"{value:.6g}"


def every(rows) -> dict[tuple[str, str, str], dict]:
    """{(dataset, model, number): cells} of every shape that the rows (of `series.rows`) have numbers for."""
    groups: dict[tuple[str, str], list] = {}
    for row in rows:
        groups.setdefault((row["dataset"], row["model"]), []).append(row)
    made = {}
    for place, members in groups.items():
        lines, of_ablation = series.summary(members), series.summary(_of_ablations(members))
        for number, shape in SHAPES.items():
            made[*place, number] = cells(of_ablation if shape.ablation else lines, number, place[0])
    return {key: shape for key, shape in made.items() if _is_worth_showing(key[2], shape)}


def _of_ablations(rows) -> list[dict]:
    """The rows of those attacks and seeds that the ablation was made on, so that its lines are of the same models."""
    made = {(row["attack"], row["seed"]) for row in rows if ":" in row["defense"] and row["variant"] == 1}
    return [row for row in rows if (row["attack"], row["seed"]) in made]


def _is_worth_showing(number: str, made) -> bool:
    """Whether the shape has a number of its own kind: R-ASR for the second, say; the ablation needs one of its rows."""
    own = {"2": "r_asr", "5": "asr", "6": "asr", "controls": "r_ca"}.get(number)
    if number == "6" and not any(":" in defense for defense in made):
        return False
    return any(
        c.mean is not None for row in made.values() for cell in row.values() for m, c in cell.items() if own in (None, m)
    )
