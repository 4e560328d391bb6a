"""How often the scan is right: scanned models with a backdoor and without one, counted by attack, as a page and a picture.

python -m bibau_jax.report.scans results/records/scan --out results/scan

With `--of=nc` the same of the verdicts of the defence NC.
"""

import argparse
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import pictures, series, tables, words

NAME = "scan_rates.json"  # in this package: what pages say of the scan's reliability; made with --rates
SMALL = 0.5  # of the median mask's size: what NC's verdicts are also counted with
OF = {"scan": "the scan", "nc": "NC"}  # whose verdicts are counted
# What a scan may end with.
ENDS = {"target": "The attack’s class", "other": "Only another class", "nothing": "Nothing", "unknown": "It could not tell"}


def _verdict(record, of: str) -> tuple[dict | None, float]:
    """What the scan, or NC, said of the model as it came, and its limit for the anomaly index."""
    if of == "scan":
        return words.backdoored(record).extra.get("scan"), record.config["scan"]["limit"]
    measured = next((m for m in record.metrics.values() if m.defense == of), None)
    return measured and measured.extra, record.config["defense"][of]["limit"] if measured else 0.0


def rows(found: dict, of: str = "scan") -> list[dict]:
    """One row a scanned model, from records by name: what it was, how the scan ended (ENDS), the largest anomaly index."""
    made, seen = [], set()
    for name, record in sorted(found.items()):
        before = words.backdoored(record)
        if before is None or before.extra.get("model_sha256") in seen:
            continue
        scan, limit = _verdict(record, of)
        if scan is None:
            continue
        seen.add(before.extra["model_sha256"])
        config = record.config
        clean, target = config["implant"].get("innocent", False), config["attack"]["target_label"]
        end = "unknown" if scan.get("undetermined") else "nothing"
        if scan["flagged"]:
            end = "target" if target in scan["flagged"] and not clean else "other"
        made.append(
            {
                "dataset": config["data"]["name"],
                "model": words.model(config["model"]),
                "attack": words.CLEAN if clean else config["attack"]["name"],
                "seed": record.seed,
                "end": end,
                "anomaly_index": scan["anomaly_index"],
                "suspected": scan["suspected"],
                "flagged": scan["flagged"],
                "limit": limit,
                "record": name,
            }
            | {key: scan[key] for key in ("relative_size",) if key in scan}
        )
    return sorted(made, key=_place)


def _place(row: dict) -> tuple:
    return row["dataset"], row["model"], row["attack"] != words.CLEAN, words.order(words.ATTACKS, row["attack"]), row["seed"]


def summary(made) -> list[dict]:
    """The rows counted: models of each data set, network and attack, and how many of their scans ended in which way."""
    lines: dict[tuple, dict] = {}
    for row in made:
        key = {name: row[name] for name in ("dataset", "model", "attack")}
        line = lines.setdefault(tuple(key.values()), key | {"models": 0} | dict.fromkeys(ENDS, 0))
        line["models"] += 1
        line[row["end"]] += 1
    return list(lines.values())


def reliability(lines) -> dict[str, dict]:
    """Of all clean models how many were flagged; of all backdoored ones, by which attacks, in how many the attack's class."""
    kinds = {"clean": [line for line in lines if line["attack"] == words.CLEAN]}
    kinds["backdoored"] = [line for line in lines if line["attack"] != words.CLEAN]
    hits = {"clean": "other", "backdoored": "target"}
    made = {
        kind: {"models": sum(line["models"] for line in some), "flagged": sum(line[hits[kind]] for line in some)}
        for kind, some in kinds.items()
    }
    made["backdoored"]["attacks"] = list(dict.fromkeys(line["attack"] for line in kinds["backdoored"]))
    return made | {"datasets": list(dict.fromkeys(line["dataset"] for line in lines))}


def known() -> dict[str, dict]:
    """The `reliability` that this version of the scan was measured to have."""
    return json.loads(resources.files("bibau_jax.report").joinpath(NAME).read_text(encoding="utf-8"))


def _share(hits: int, count: int) -> str:
    rate = records.Rate(hits, count)
    low, high = rate.interval
    return f"{hits} of {count} ({rate.percent:.0f} %; {low:.0f} to {high:.0f} %)"


def markdown(made, text: str, of: str = "scan", drawn: str = "scan.png") -> str:
    """The page: what was counted, then every model; `text` is what was written by hand above, with its markers."""
    lines = summary(made)
    headings = ("Data set", "Model", "Attack", "Models", *ENDS.values())
    body = [
        (
            words.dataset(line["dataset"]),
            line["model"],
            words.attack(line["attack"]),
            line["models"],
            *(line[end] for end in ENDS),
        )
        for line in lines
    ]
    told = reliability(lines)
    said = [f"False alarms: {_share(told['clean']['flagged'], told['clean']['models'])} of the clean models were flagged."]
    if told["backdoored"]["models"]:
        found = _share(told["backdoored"]["flagged"], told["backdoored"]["models"])
        said.append(f"The attack’s class was flagged in {found} of the backdoored ones.")
    if of == "scan":
        said.append(
            "An index above the limit (dashed) is flagged only where the patch is much smaller than the other classes’."
        )
    if sized := [row for row in made if "relative_size" in row]:
        small = [row for row in sized if row["flagged"] and row["relative_size"] <= SMALL]
        clean = [row for row in sized if row["attack"] == words.CLEAN]
        struck = [row for row in small if row["end"] == "target" and row["suspected"] in row["flagged"]]
        said.append(
            f"Only masks of at most {SMALL:g} of the median’s size flagged (`defense.nc.at_most={SMALL:g}`): "
            f"{_share(sum(row in clean for row in small), len(clean))} of the clean models"
            + (f", {_share(len(struck), len(sized) - len(clean))} of the backdoored ones." if len(sized) > len(clean) else ".")
        )
    said.append("Wilson’s 95 % intervals. A model that several runs share is counted once.")
    each = [
        (
            words.dataset(row["dataset"]),
            words.attack(row["attack"]),
            row["seed"],
            words.number(row["anomaly_index"], 2),
            row["suspected"],
        )
        + (", ".join(map(str, row["flagged"])) or words.NOTHING, ENDS[row["end"]], row["record"])
        for row in made
    ]
    columns = ("Data set", "Attack", "Seed", "Largest anomaly index", "Of class", "Flagged", "Which is", "Record")
    if sized:
        columns += ("Its size, of the median",)
        each = [(*line, words.number(row.get("relative_size"), 2)) for line, row in zip(each, made, strict=True)]
    return (
        f"{text}\n\n<!-- made from records by bibau_jax.report.scans; only the text above is written by hand -->\n\n"
        f"## What {OF[of]} flagged\n\n{tables.markdown_table(headings, 3, body)}\n{' '.join(said)}\n\n"
        f"![The largest anomaly index of every model]({drawn})\n\n"
        f"## Every model\n\n{tables.markdown_table(columns, 2, each)}"
    )


def picture(made, path: Path, of: str = "scan") -> Path:
    """Every model's largest anomaly index, a line an attack: filled where the attack's class was flagged, red where another."""
    kinds = list(dict.fromkeys((row["dataset"], row["attack"]) for row in made))
    figure, axis = pictures.plotting().subplots(figsize=(7.2, 1.2 + 0.3 * len(kinds)))
    styles = {"target": {"color": "#00477a"}, "other": {"color": "#c24e00"}}
    styles |= {"nothing": {"facecolors": "none", "edgecolors": "#6b6f76"}, "unknown": {"color": "#6b6f76", "marker": "x"}}
    for end, label in ENDS.items():
        if not (mine := [row for row in made if row["end"] == end]):
            continue
        heights = [kinds.index((row["dataset"], row["attack"])) for row in mine]
        shift = 0.3 * (np.random.default_rng(0).random(len(mine)) - 0.5)
        told = label if end == "unknown" else f"{label} flagged"
        axis.scatter(
            [row["anomaly_index"] or 0.0 for row in mine], np.array(heights) + shift, s=28, alpha=0.8, label=told, **styles[end]
        )
    for limit in {row["limit"] for row in made}:
        axis.axvline(limit, color="#1c1d1f", linewidth=1, linestyle="--")
    names = [f"{words.attack(attack)}, {words.dataset(dataset)}" for dataset, attack in kinds]
    axis.set(
        yticks=range(len(kinds)), yticklabels=names, ylim=(len(kinds) - 0.5, -0.5), xlabel="Largest anomaly index of a class"
    )
    axis.set_title(f"What {OF[of]} sees", loc="left")
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return pictures.save(figure, path)


def main(arguments=None) -> int:
    """The command line: 0, or 1 where a record could not be read (each is named on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report.scans", description="What the scan found, from records.")
    parser.add_argument("records", help="folder with record files (*.json), searched recursively")
    parser.add_argument("--out", required=True, help="path of the results without suffix, e.g. results/scan")
    parser.add_argument("--rates", help="also write what pages say of the scan's reliability to this file")
    parser.add_argument(
        "--of", choices=OF, default="scan", help="whose verdicts: the scan's (default) or those of the defence nc"
    )
    flags = parser.parse_args(arguments)
    return tables.told(lambda: write(flags.records, flags.out, flags.rates, flags.of))


def write(folder, out, rates=None, of: str = "scan") -> tuple[list[Path], list[str]]:
    """Writes `<out>.md`, `.json` and `.png`, and to `rates` what pages say; returns the files and what could not be read."""
    page, data = Path(f"{out}.md"), Path(f"{out}.json")
    found, broken = series.collect(Path(folder), data)
    made = rows(found, of)
    if not made:
        raise UserError("; ".join([f"no verdict of {OF[of]} is recorded under {folder}", *broken]))
    text, lines = markdown(made, tables.introduction(page), of, f"{page.stem}.png"), summary(made)
    page.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(page, text)
    records.write_text(data, json.dumps({"summary": lines, "rows": made}, indent=1) + "\n")
    written = [page, data, picture(made, page.with_suffix(".png"), of)]
    if rates:
        records.write_text(Path(rates), json.dumps(reliability(lines), indent=1) + "\n")
        written.append(Path(rates))
    return written, broken


if __name__ == "__main__":
    sys.exit(main())
