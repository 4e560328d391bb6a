"""The report of one run: a self-contained page made from what lies in the run's folder.

python -m bibau_jax.report.html WORKDIR
"""

import argparse
import json
import os
import sys
from html import escape
from pathlib import Path

from bibau_jax import npz, records
from bibau_jax.errors import UserError, say
from bibau_jax.report import figures, gone, own, progress, series, strip, words

STAGES = {"implant": "Implanting the backdoor", "clean": "Training the clean twin", "evaluate": "Evaluation"}
OWN_STAGES = {
    "implant": "Reading the file",
    "scan": "Scan of the model as it came",
    "verify/scan": "Scan of the purified model",
    "verify/stand_in/tuned": "Fine-tuning, to invert the trigger that stands in",
    "verify/stand_in/inverted": "Inverting the trigger that stands in",
    "export": "Writing the purified model",
}
# What is drawn of a run, by file
SHOWN_ARRAYS = ("strip", "scan/triggers", "verify/scan/triggers", "verify/stand_in/trigger")
TRIED = {"real": "the given trigger", "stand_in": "the inverted trigger"}  # what a purified model is tried with
UNCLASSED = {"none": "is-before", "clean": "is-clean"}


def write(workdir) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Reads `record.json`, and `metrics.jsonl` and `strip.npz` where they are there. The page loads nothing from elsewhere.
    Raises UserError where the record or the strip cannot be read.
    """
    workdir = Path(workdir)
    record = records.read(workdir / "record.json")
    log = workdir / "metrics.jsonl"
    lines = list(records.read_lines(log)) if log.exists() else []
    path, unfinished = workdir / "report.html", workdir / "report.html.part"
    files = {name: workdir / f"{name}.npz" for name in SHOWN_ARRAYS}
    arrays = {name: npz.left(path) for name, path in files.items() if path.exists()}
    unfinished.write_text(page(record, lines, arrays), encoding="utf-8")
    os.replace(unfinished, path)  # a reader never meets half a page
    return path


def page(record, lines=(), arrays=None) -> str:
    """The whole page as text, from a Record, the lines of its log and the arrays in its folder, by file."""
    arrays = arrays or {}
    if own.is_own(record):
        title, parts = _own(record, arrays)
    else:
        title = f"{words.attack(record.config['attack']['name'])} on {words.dataset(record.config['data']['name'])}"
        strip_of = _strip(arrays.get("strip", {}), target(record.config))
        parts = (_head(record, title), _outcome(record), _table(record), _gone(record), strip_of)
    parts = (*parts, _progress(record, lines), _costs(record), _provenance(record))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<meta name="color-scheme" content="light dark">'
    head += f"<title>{escape(title)}: before and after purification</title><style>{style}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _own(record, arrays: dict) -> tuple[str, tuple[str, ...]]:
    """(title, sections) of the page about a stranger's model."""
    title = f"{own.facts(record)['File']}: is there a backdoor in it?"
    after = words.purified(record)
    over = [words.defense(after.defense)] if after is not None else []
    over += [f"seed {record.seed}", series.device_name(record.device)]
    head = f'<header><p class="over">{" · ".join(map(escape, over))}</p><h1>{escape(title)}</h1>'
    head += f'<p class="verdict">{own.prose(own.verdict(record))}</p>'
    head += f'<p class="basis">{own.prose(own.basis(record))}</p></header>'
    scans = {"scan": "In the model as it came", "verify/scan": "In the purified model"}
    stood = "What stood in for the trigger"
    tables = {name: own.triggers_html(record, arrays.get(f"{room}/triggers", {}), name) for room, name in scans.items()}
    tables |= {stood: own.stand_in_html(record, arrays.get("verify/stand_in/trigger", {}), stood)}
    drawn = "".join(_framed(table, name) for name, table in tables.items() if table)
    text = (
        "For every class, the smallest patch that the scan could find to turn other images into it: the patch on grey, and "
        "laid over an image. A class that a much smaller patch reaches than the others is suspicious. The shares are of "
        "the images that the patches were sought on."
    )
    if tables[stood]:
        text += f" What stands in for the trigger in the tests above is {own.stood_in(record)}."
    return title, (
        head,
        _section("numbers", "Before and after", _wide(own.table_html(record), "numbers", "Models")),
        _section("triggers", "What the scan found", drawn, text),
        _section("unknown", "What is not known", own.unknown_html(record)),
        _section("file", "The file", _facts(own.facts(record))),
    )


def target(config: dict) -> int | None:
    """The attack's one target label, None where the config names none or every class has its own."""
    attack = config["attack"]
    label = attack.get("target_label") if attack.get("mode", "all_to_one") == "all_to_one" else None
    return label if isinstance(label, int) and not isinstance(label, bool) and label >= 0 else None


def _section(name: str, heading: str, body: str, text: str = "") -> str:
    lead = f'<p class="lead">{text}</p>' if text else ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{lead}{body}</section>' if body else ""


def _head(record, title: str) -> str:
    facts = [words.model(record.config["model"]), f"seed {record.seed}", series.device_name(record.device)]
    after = words.purified(record)
    facts[:0] = [words.defense(after.defense)] if after is not None else []
    over = " · ".join(escape(str(fact)) for fact in facts)
    return (
        f'<header><p class="over">{over}</p><h1>{escape(title)}</h1>'
        f'<p class="verdict">{escape(words.verdict(record))}</p>'
        f'<p class="basis">{escape(words.reservation(record))}</p>{_change(record)}</header>'
    )


def _change(record) -> str:
    """Four figures at a glance: the three rates before and after, and what the purification took."""
    before, after = words.backdoored(record), words.purified(record)
    if before is None or after is None:
        return ""
    shown = (
        ("Attack success", "asr", "asr"),
        ("Clean accuracy", "ca", "ca"),
        ("Robust accuracy", "robust_accuracy", ""),
    )
    items = []
    for name, key, tone in shown:
        old, new = (words.percent(words.rate(getattr(m, key))) for m in (before, after))
        value = f'<span class="was">{old}</span> <span aria-label="to">→</span> <b class="{tone}">{new}</b>'
        items.append(f"<div><dt>{name}</dt><dd>{value}</dd></div>")
    items.append(f"<div><dt>Purified in</dt><dd><b>{words.duration(after.seconds)}</b></dd></div>")
    return f'<dl class="change">{"".join(items)}</dl>'


def _outcome(record) -> str:
    measured, before = series.in_order(record.metrics.values()), words.backdoored(record)
    charts = []
    for name, key, text in (
        ("Attack success rate", "asr", "triggered images that get the target class; lower is better"),
        ("Clean accuracy", "ca", "unseen clean images classified right; higher is better"),
    ):
        rows = [
            (words.defense(m.defense), words.rate(getattr(m, key)), words.percent(words.rate(getattr(m, key))))
            for m in measured
        ]
        reference = words.rate(getattr(before, key)) if before is not None else None
        caption = f"<figcaption>{name} <span>{text}</span></figcaption>"
        charts.append(f"<figure>{caption}{figures.bars(name, rows, key, reference)}</figure>")
    note = '<p class="note">The dashed mark is the backdoored model before any defence.</p>' if before is not None else ""
    return _section("outcome", "Before and after", f'<div class="pair">{"".join(charts)}</div>{note}' if measured else "")


def _counted(rate) -> str:
    if rate is None or not rate.count:
        return f"<td>{words.NOTHING}</td>"
    return f"<td>{words.number(words.rate(rate))} <small>{rate.hits:,}\u202f/\u202f{rate.count:,}</small></td>"


def _table(record) -> str:
    more = words.further(record)
    heads = ("CA, %", "ASR, %", "Robust accuracy, %", *map(words.measure, more), "Time", "Peak memory, MB")
    head = '<th scope="col">Model</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = []
    for measured in series.in_order(record.metrics.values()):
        spent, main = words.cost(record, measured), measured is words.purified(record)
        cells = "".join(map(_counted, (measured.ca, measured.asr, measured.robust_accuracy)))
        cells += "".join(f"<td>{words.further_value(name, measured.extra.get(name))}</td>" for name in more)
        cells += f"<td>{words.duration(measured.seconds)}</td>"
        cells += f"<td>{words.number(spent.peak_memory_mb if spent else None, 0)}</td>"
        tone = "is-main" if main else UNCLASSED.get(measured.defense, "")
        body.append(f'<tr class="{tone}"><th scope="row">{escape(words.defense(measured.defense))}</th>{cells}</tr>')
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    text = (
        "CA: clean accuracy. ASR: share of triggered images, target class left out, that get the target class. Robust "
        "accuracy: share of triggered images that get their true class. Small figures are the counts."
    )
    if any(measured.defense == "clean" for measured in record.metrics.values()):
        text += " Clean twin: the same training without poison."
    return _section("numbers", "Every model, counted", _wide(inside, "numbers", "Every model, counted"), text) if body else ""


def _gone(record) -> str:
    before = words.backdoored(record)
    body = gone.body(series.in_order(record.metrics.values()), words.rate(before.asr) if before is not None else None)
    text = (
        "A low ASR may mean that the backdoor is gone or that it sleeps. Here it is called back; the dashed mark is the ASR of "
        "the backdoored model. The clean twin shows what each attack does where there never was a backdoor, IBU what is left "
        "when the trigger is known and unlearned: it sees the trigger and is no defence."
    )
    return _section("gone", "Gone or hidden?", body, text) if body else ""


def _wide(inside: str, tone: str, label: str) -> str:
    return _framed(f'<table class="{tone}">{inside}</table>', label) if inside else ""


def _framed(table: str, label: str) -> str:
    return f'<div class="wide" role="region" tabindex="0" aria-label="{label}">{table}</div>'


def _strip(arrays: dict, label: int | None) -> str:
    table = strip.table(arrays, label)
    mark = (
        f" {strip.TARGET_MARK}\u00a0marks a prediction of the attack’s target." if label is not None or "aims" in arrays else ""
    )
    text = f"The same images three times, enlarged, with what each model takes them for.{mark}"
    return _section("images", "What the models see", _framed(table, "Images") if table else "", text)


def stage_name(stage: str, own: bool = False) -> str:
    """A stage as a heading, e.g. `Purifying: BI-BAU (U)` for `purify/bibau_u`; one not known is shown as it is.

    own: of a run on a stranger's model.
    """
    kind, _, rest = stage.partition("/")
    if own and stage in OWN_STAGES:
        return OWN_STAGES[stage]
    if kind == "verify" and (trigger := TRIED.get(rest.partition("/")[0])):
        row, _, part = rest.partition("/")[2].partition("/")
        if row == "ibu":
            return f"Unlearning {trigger}, for comparison"
        of = "the model as it came" if row == "none" else words.defense(row)
        return f"Trying {trigger}: {of}" + (f", {part.replace('_', ' ')}" if part else "")
    if kind in ("purify", "reactivate") and rest:
        row, _, part = rest.partition("/")
        return f"{'Purifying' if kind == 'purify' else 'Calling back'}: {words.defense(row)}" + (part and f", {part}")
    return STAGES.get(stage, stage)


def _progress(record, lines) -> str:
    out, main = [], words.purified(record)
    stages = progress.by_stage(lines)
    strange = own.is_own(record)
    opened = {"implant", f"purify/{main.defense}" if main is not None else ""} if not strange else set()
    for stage, logged in sorted(stages.items(), key=lambda item: item[0] not in opened):  # comparisons last
        charts = progress.panels(logged, record.config)
        if charts:
            state = " open" if stage in opened or (len(stages) == 1 and not strange) else ""
            head = f"<summary><h3>{escape(stage_name(stage, strange))}</h3></summary>"
            out.append(f'<details class="stage"{state}>{head}<div class="panels">{charts}</div></details>')
    text = "As logged while it ran; the figure beside each name is its last value. Values are means over an epoch or a step."
    return _section("curves", "How it went", "".join(out), text)


def _costs(record) -> str:
    if not record.stages:
        return ""
    longest = max((s.seconds for s in record.stages.values() if words.is_number(s.seconds)), default=0.0)
    body = []
    for name, spent in record.stages.items():
        share = 100.0 * spent.seconds / longest if longest and words.is_number(spent.seconds) else 0.0
        bar = f'<td class="share" aria-hidden="true"><span style="width:{share:.1f}%"></span></td>'
        memory = (words.number(value, 0) for value in (spent.peak_memory_mb, spent.device_peak_memory_mb))
        cells = f"<td>{words.duration(spent.seconds)}</td>" + bar + "".join(f"<td>{text}</td>" for text in memory)
        body.append(f'<tr><th scope="row">{escape(stage_name(name, own.is_own(record)))}</th>{cells}</tr>')
    heads = ("Stage", "Time", "", "Peak memory, MB", "Device peak, MB")
    head = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in heads)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return _section("costs", "What it cost", _wide(inside, "numbers costs", "Cost of the stages"))


def _settings(record) -> str:
    """The config as rows: what the command line set first, marked, then the rest in the record's order."""
    settings = records.flat(record.config)
    given = [name for name in settings if f"--config.{name}=" in record.command or f"--config.{name} " in record.command]
    rows = []
    for name in (*given, *(name for name in settings if name not in given)):
        mark = ' <small class="given">set on the command line</small>' if name in given else ""
        value = escape(json.dumps(settings[name], ensure_ascii=False, default=str))
        rows.append(f'<tr><th scope="row"><code>{escape(name)}</code>{mark}</th><td><code>{value}</code></td></tr>')
    return f'<table class="pairs"><tbody>{"".join(rows)}</tbody></table>'


def _facts(facts: dict) -> str:
    shown = {key: words.NOTHING if value is None else value for key, value in facts.items()}
    pairs = (f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in shown.items())
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _provenance(record) -> str:
    # a line may break between the options of the command, not inside one
    options = " ".join(f"<span>{escape(option)}</span>" for option in record.command.split(" "))
    command = f'<pre class="command" tabindex="0"><code>{options}</code></pre>'
    body = f"<h3>The command</h3>{command}"
    body += f"<h3>Device</h3>{_facts(record.device)}<h3>Versions</h3>{_facts(record.versions)}"
    body += f"<details><summary><h3>All settings</h3></summary>{_settings(record)}</details>"
    return _section("provenance", "To run it again", body)


def main(arguments=None) -> int:
    """The command line: writes the page of one run's folder; returns 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report.html", description="The report of one run.")
    parser.add_argument("workdir", help="the run's folder, with record.json in it")
    try:
        print(write(parser.parse_args(arguments).workdir))
    except (UserError, OSError) as error:
        say(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
