"""All runs of a folder as the paper's tables and pictures: python -m bibau_jax.report runs/ [--out report]

Numbers come from `record.json` files alone, so that the tables of the same records are the same bytes.
"""

import argparse
import sys
import zipfile
from functools import partial
from html import escape
from pathlib import Path

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import pictures, series, shapes, tables, words

NOTE = (
    "Mean ± sample standard deviation over seeds, in percent (BEC: 0 as the clean twin, 1 as the backdoored model). The "
    "paper's value stands beside ours where it has one; the constants of its sigmoid of BEC are lost, and ours are others. "
    "What comes of re-activation is counted on fewer test images than CA and ASR where reactivate.test_size says so. IBU is no "
    "defence: it sees the trigger and shows how far one could get."
)
CAPTIONS = {
    "scatter": "Clean accuracy and what retuning brings back: small marks are attacks, large ones the mean of those "
    "that all have.",
    "bec_layers": "BEC by layer, mean over attacks.",
    "eta": "BI-BAU (U) by η.",
    "path": "ASR on the straight line from the purified to the backdoored weights, mean over attacks.",
}


def collect(folder: Path) -> tuple[dict, list[str]]:
    """Every record of the runs below a folder (or kept there under other names), by name, and what could not be read."""
    kept = sorted(folder.rglob("record.json"))
    if not kept:
        return series.collect(folder)
    found, broken = {}, []
    for path in kept:
        try:
            record = records.read(path)
            if not series.rows([record]):
                raise UserError(f"{path} holds no measurement yet")
        except UserError as error:
            broken.append(str(error))
        except (KeyError, TypeError, AttributeError) as error:
            broken.append(f"{path} lacks what a table needs: {error}")
        else:
            found[str(path.parent.relative_to(folder))] = record
    return found, broken


def write(folder: Path, out: Path) -> tuple[list[Path], list[str]]:
    """Writes tables (Markdown, CSV, HTML) and pictures of the runs in `folder`; returns their paths and what was unreadable."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    found, broken = collect(folder)
    if not found:
        raise UserError(f"{folder} holds no record that can be read" + (f": {broken[0]}" if broken else ""))
    rows = series.rows(found)
    made, lines = shapes.every(rows), series.summary(rows)
    out.mkdir(parents=True, exist_ok=True)
    pages = [out / "tables.csv", out / "tables.md", out / "index.html"]
    records.write_text(pages[0], shapes.comma_separated(made))
    captions = {}
    for name, caption, draw in _drawings(folder, found, rows, lines):
        try:
            path = draw(out / f"{name}.png")
        except (KeyError, TypeError, ValueError, AttributeError, OSError, zipfile.BadZipFile) as error:
            broken.append(f"{name}.png cannot be drawn: {type(error).__name__}: {error}")
        else:
            captions |= {name: (path, caption)} if path is not None else {}
    without = shapes.left_out(lines)
    records.write_text(pages[1], markdown(made, captions, without))
    records.write_text(pages[2], page(made, captions, without, len(found)))
    return pages + [path for path, _ in captions.values()], broken


def _drawings(folder: Path, found: dict, rows, lines):
    """(file name, caption, what draws it) of every picture; of several data sets or networks each has its own."""
    groups: dict[tuple, dict] = {}
    for name, record in found.items():
        groups.setdefault((record.config["data"]["name"], words.model(record.config["model"])), {})[name] = record
    for number, (place, members) in enumerate(groups.items()):
        suffix, where = (f"_{number + 1}", f" {words.dataset(place[0])}, {place[1]}.") if len(groups) > 1 else ("", "")
        mine = [line for line in lines if (line["dataset"], line["model"]) == place]
        yield f"scatter{suffix}", CAPTIONS["scatter"] + where, partial(pictures.scatter, mine)
        alike, by_eta = series.shown(members, rows), series.shown(members, rows, changed="defense.eta")
        yield f"bec_layers{suffix}", CAPTIONS["bec_layers"] + where, partial(pictures.bec_layers, alike)
        yield f"eta{suffix}", CAPTIONS["eta"] + where, partial(pictures.eta_sweep, by_eta)
        yield f"path{suffix}", CAPTIONS["path"] + where, partial(pictures.weight_path, alike)
    for name, record in found.items():
        yield f"features_{name.replace('/', '_')}", f"Features: {name}.", partial(pictures.embeddings, folder / name, record)


def _titles(made):
    for (dataset, model, number), shape in made.items():
        theirs = shapes.paper().get(shapes.PAPER.get(dataset, {}).get(number, ""), {}).get("model")
        paper = f"; the paper's: {words.NETWORKS.get(theirs, theirs)}" if theirs else ""
        yield f"{shapes.SHAPES[number].title}, {words.dataset(dataset)}", f"Ours: {model}{paper}.", number, shape


def markdown(made, captions, without) -> str:
    """The tables and the pictures as Markdown."""
    parts = [f"{NOTE}\n"]
    parts += [f"## {title}\n\n{text}\n\n{shapes.markdown(shape, number)}" for title, text, number, shape in _titles(made)]
    parts += ["Left out, because other runs had other settings: " + "; ".join(without) + ".\n"] if without else []
    parts += [f"![{text}]({path.name})\n" for path, text in captions.values()]
    return "\n".join(parts)


def page(made, captions, without, count: int) -> str:
    """The same as a page of its own that loads nothing but the pictures beside it."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = [f'<p class="over">{count} runs</p><h1>Gone or hidden?</h1><p class="lead">{escape(NOTE)}</p>']
    for title, text, number, shape in _titles(made):
        table = f'<div class="wide">{shapes.html(shape, number)}</div>'
        body.append(f'<section><h2>{escape(title)}</h2><p class="lead">{escape(text)}</p>{table}</section>')
    if without:
        told = "".join(f"<li>{escape(line)}</li>" for line in without)
        body.append(f'<section><p class="lead">Left out, because other runs had other settings:</p><ul>{told}</ul></section>')
    for path, text in captions.values():
        picture = f'<img src="{escape(path.name)}" alt="{escape(text)}">'
        body.append(f"<section><figure>{picture}<figcaption><span>{escape(text)}</span></figcaption></figure></section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta name="color-scheme" content="light dark"><title>Gone or hidden?</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main class="broad">{"".join(body)}</main></body></html>\n'


def main(arguments=None) -> int:
    """The command line: 0, or 1 after one line for every record that could not be read."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report", description="Tables and pictures of many runs.")
    parser.add_argument("folder", type=Path, help="folder with runs, or with their records")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to; default: report in the folder of the runs")
    given = parser.parse_args(arguments)
    return tables.told(lambda: write(given.folder, given.out or given.folder / "report"))


if __name__ == "__main__":
    sys.exit(main())
