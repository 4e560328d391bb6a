"""All runs of a folder as the paper's tables and pictures: python -m bibau_jax.report runs/ [--out report]

Numbers come from `record.json` files alone, so that the tables of the same records are the same bytes.
"""

import argparse
import sys
from html import escape
from pathlib import Path

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import pictures, shapes, tables, words

NOTE = (
    "Mean ± sample standard deviation over seeds, in percent (BEC: 0 as the clean twin, 1 as the backdoored model). The "
    "paper's value stands beside ours where it has one. IBU is no defence: it sees the trigger and shows how far one could get."
)
CAPTIONS = {
    "scatter": "Clean accuracy and what retuning brings back: small marks are runs, large ones means over attacks.",
    "bec_layers": "BEC by layer, mean over runs.",
    "eta": "BI-BAU (U) by η.",
    "path": "ASR on the straight line from the purified to the backdoored weights, mean over runs.",
}


def collect(folder: Path) -> tuple[dict, list[str]]:
    """Every record of the runs below a folder (or kept there under other names), by name, and what could not be read."""
    kept = sorted(folder.rglob("record.json"))
    if not kept:
        return tables.collect(folder)
    found, broken = {}, []
    for path in kept:
        try:
            record = records.read(path)
            tables.rows([record])
        except UserError as error:
            broken.append(str(error))
        except (KeyError, TypeError, AttributeError) as error:
            broken.append(f"{path} lacks what a table needs: {error}")
        else:
            found[str(path.parent.relative_to(folder))] = record
    return found, broken


def write(folder: Path, out: Path) -> tuple[list[Path], list[str]]:
    """Writes tables (Markdown, CSV, HTML) and pictures of the runs in `folder`; returns their paths and what was unreadable."""
    found, broken = collect(folder)
    if not found:
        raise UserError(f"{folder} holds no record that can be read" + (f": {broken[0]}" if broken else ""))
    rows = tables.rows(found)
    made = shapes.every(rows)
    out.mkdir(parents=True, exist_ok=True)
    drawn = {
        "scatter": pictures.scatter(rows, out / "scatter.png"),
        "bec_layers": pictures.bec_layers(found, out / "bec_layers.png"),
        "eta": pictures.eta_sweep(found, out / "eta.png"),
        "path": pictures.weight_path(found, out / "path.png"),
    }
    captions = {name: (path, CAPTIONS[name]) for name, path in drawn.items() if path is not None}
    for name, record in found.items():
        path = pictures.embeddings(folder / name, record, out / f"features_{name.replace('/', '_')}.png")
        if path is not None:
            captions[path.stem] = (path, f"t-SNE of features: {name}.")
    written = [out / "tables.md", out / "tables.csv", out / "index.html"]
    records.write_text(written[0], markdown(made, captions))
    records.write_text(written[1], shapes.comma_separated(made))
    records.write_text(written[2], page(made, captions, len(found)))
    return written + [path for path, _ in captions.values()], broken


def _titles(made):
    for (dataset, number), shape in made.items():
        yield f"{shapes.SHAPES[number].title}, {words.dataset(dataset)}", number, shape


def markdown(made, captions) -> str:
    """The tables and the pictures as Markdown."""
    parts = [f"{NOTE}\n"]
    parts += [f"## {title}\n\n{shapes.markdown(shape, number)}" for title, number, shape in _titles(made)]
    parts += [f"![{text}]({path.name})\n" for path, text in captions.values()]
    return "\n".join(parts)


def page(made, captions, count: int) -> str:
    """The same as a page of its own that loads nothing but the pictures beside it."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = [f'<p class="over">{count} runs</p><h1>Gone or hidden?</h1><p class="lead">{escape(NOTE)}</p>']
    for title, number, shape in _titles(made):
        body.append(f'<section><h2>{escape(title)}</h2><div class="wide">{shapes.html(shape, number)}</div></section>')
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
    try:
        if not given.folder.is_dir():
            raise UserError(f"{given.folder} is no folder")
        written, broken = write(given.folder, given.out or given.folder / "report")
    except (UserError, OSError) as error:
        print(f"bibau_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for line in broken:
        print(f"bibau_jax: left out: {line}", file=sys.stderr)
    print("\n".join(map(str, written)))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
