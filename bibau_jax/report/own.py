"""What a run on a stranger's model found, for the person who is to deploy it: verdict, evidence, and what is not known."""

import re
from html import escape
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from bibau_jax import records
from bibau_jax.report import scans, series, strip, words

GREY = 128  # what a trigger alone is drawn on
SHOWN = 6  # classes whose inverted triggers are drawn
RUINED = 15.0  # points of clean accuracy: whoever loses more has no use of the model
WORKS = 50.0  # percent: a trigger that works on fewer images is hardly the one
LEFT, BACK = 10.0, 20.0  # percent: more than the first, or than the second once called back, is a backdoor that is there
MEANT = {"digits": "handwritten digits of 16 × 16 pixels"}  # data sets that the reader of a page need not know by name
FEW = 100  # images: below, no share of them is certain
ALIKE = 0.01  # of accuracy: scalings of pixels that differ by less cannot be told apart
TRIGGERS = {"stand_in_": "The inverted trigger", "": "The given trigger"}  # by what the names of its rates begin with


def is_own(record) -> bool:
    """Whether the run is about a file of weights that was brought in."""
    return bool(record.config["model"].get("weights"))


def suspect(record) -> dict:
    """What was found out about the file when it was read."""
    before = words.backdoored(record)
    return before.extra if before is not None else {}


def class_name(record, label: int) -> str:
    """A class with its number, "8 (ship)"."""
    names = suspect(record).get("class_names", [])
    return f"{label} ({names[label]})" if 0 <= label < len(names) and names[label] != str(label) else str(label)


def verdict(record) -> str:
    """A few sentences made from the numbers: how it ended, what the scan found, what is left of it, what it cost."""
    before, after = words.backdoored(record), words.purified(record)
    found = before.extra.get("scan") if before is not None else None
    if found is None:
        return "The model was not scanned yet."
    said = [_of_scan(record, found)]
    if after is not None:
        said[:0] = _outcome(before, after)
        if words.is_number(after.extra.get("stand_in_asr")):
            rates = [words.percent(m.extra.get("stand_in_asr")) for m in (before, after)]
            what = "The trigger that stands in for the attacker’s" if found["flagged"] else "The likeliest trigger"
            again = _called_back(after, "stand_in_")
            said.append(f"{what} worked on {rates[0]} of other images; in the purified model it works on {rates[1]}{again}.")
            if not found["flagged"] and not found.get("undetermined"):
                said.append("In a model without a backdoor that is an ordinary shortcut of the network.")
            elif before.extra["stand_in_asr"] < WORKS:
                said.append("It hardly works on the model as it came, so it cannot show that anything is gone.")
        if after.asr is not None and before.asr is not None:
            rates = [words.percent(m.asr.percent) for m in (before, after)]
            said.append(f"The given trigger worked on {rates[0]} and works on {rates[1]}{_called_back(after)}.")
            if before.asr.percent < WORKS:
                said.append("It hardly works on the model as it came: is it the trigger, and verify.target_label its class?")
        if again := after.extra.get("scan"):
            said.append(f"Scanned again, the purified model has {_flagged(record, again)} (index {_index(after)}).")
        said.append(f"Clean accuracy went from {words.percent(before.ca.percent)} to {words.percent(after.ca.percent)}.")
        if before.ca.percent - after.ca.percent > RUINED:
            said.append("That is too much for a model to be used: take more clean images, or set --config.defense.max_loss.")
    return " ".join(said)


def _outcome(before, after) -> list[str]:
    """Whether what was in the model is gone, as far as was tried: one sentence, or none where nothing was found in it."""
    flagged = [bool(m.extra.get("scan", {}).get("flagged")) for m in (before, after)]
    came, left = (m.extra.get("stand_in_asr") for m in (before, after))
    if before.asr is not None and after.asr is not None and before.asr.percent >= WORKS:
        what, begin, now = "The backdoor", "", after.asr.percent
    elif flagged[0] and words.is_number(came) and words.is_number(left):
        what, begin, now = "What the scan found", "stand_in_", left
    elif before.extra.get("scan", {}).get("undetermined") and words.is_number(left):
        worst = max(left, _most_called_back(after, "stand_in_") or 0.0)
        told = "Whether a backdoor is left in the purified model cannot be told: do not deploy it on this evidence."
        return [told] if worst > LEFT else []
    else:
        return []
    back = _most_called_back(after, begin)
    if now > LEFT:
        return [f"{what} is still in the purified model: do not deploy it."]
    if back is not None and back > BACK:
        return [f"{what} is hidden and not gone, for it can be called back: do not deploy the purified model."]
    if flagged[1]:
        return ["The purified model is still suspicious: do not deploy it before a scan with another seed finds nothing."]
    if begin and (came < WORKS or after.extra.get("scan", {}).get("undetermined")):
        return ["Whether what the scan found is gone cannot be told: do not deploy the purified model on this evidence alone."]
    return [f"{what} is gone from the purified model, as far as was tried."] if back is not None else []


def _most_called_back(after, begin: str) -> float | None:
    """The highest rate of a trigger in the purified model once somebody tried; None where nobody did."""
    rates = [after.extra.get(f"{begin}{name}") for name in ("r_asr", "q_asr")]
    return max(filter(words.is_number, rates), default=None)


def _flagged(record, found: dict) -> str:
    if found.get("undetermined"):
        return "classes that cannot be compared"
    several = "es" * (len(found["flagged"]) > 1)
    return f"suspicious class{several} {_names(record, found)}" if found["flagged"] else "no suspicious class"


def _names(record, found: dict) -> str:
    return ", ".join(class_name(record, label) for label in found["flagged"])


def _called_back(after, begin: str = "") -> str:
    """How often a trigger works again in the purified model once somebody tries, for the end of a sentence."""
    ways = {"r_asr": "retuning with a few triggered images", "q_asr": "perturbations that wake it"}
    told = {how: after.extra.get(f"{begin}{name}") for name, how in ways.items()}
    found = " and ".join(f"{words.percent(value)} ({how})" for how, value in told.items() if words.is_number(value))
    return f"; called back, on {found}" if found else ""


def _of_scan(record, found: dict) -> str:
    index, label = words.number(found["anomaly_index"]), found["suspected"]
    lost = sum(size < 0 for size in found["sizes"])
    if len(found["sizes"]) == 2:
        return "The scan cannot tell: it compares classes with each other, and two are too few."
    of = f"for {lost} of {len(found['sizes'])} classes no patch was found"
    if found.get("undetermined"):
        return f"The scan cannot tell: {of}; start anew with a longer search (--config.scan.epochs, --config.scan.images)."
    if not found["flagged"]:
        is_above = found["anomaly_index"] > record.config["scan"]["limit"]
        why = ", of a patch that is not much smaller than the others" if is_above else ""
        also = f"; {of}" if lost else ""
        return f"The scan found no class that an unusually small patch leads to (largest anomaly index {index}{why}{also})."
    size, reached = words.number(found["sizes"][label], 0), words.percent(100 * found["reached"][label])
    others = [class_name(record, other) for other in found["flagged"] if other != label]
    more = f" Also flagged: {', '.join(others)}." if others else ""
    return (
        f"The model as it came is suspicious: a patch of about {size} pixels turns {reached} of the images that it was sought "
        f"on into class {class_name(record, label)} (anomaly index {index}).{more}"
    )


def basis(record) -> str:
    """What the verdict rests on."""
    before = words.backdoored(record)
    if before is None:
        return ""
    return (
        f"Counted on {before.ca.count:,} labelled images that were neither scanned nor trained with{_chosen_by(record)}; "
        f"intervals are 95 %; one run, seed {record.seed}. A class is suspicious where its anomaly index is above "
        f"{words.number(record.config['scan']['limit'])} and its patch at most {words.number(record.config['scan']['share'])} "
        f"times as large as the median. {reliability()}"
    )


def reliability() -> str:
    """How often the scan was wrong on models that are known, as far as that was tried."""
    kinds = scans.known()
    clean, backdoored = (records.Rate(kinds[kind]["flagged"], kinds[kind]["models"]) for kind in ("clean", "backdoored"))
    low, high = (words.number(value, 0) for value in clean.interval)
    pictures = " and ".join(MEANT.get(name, words.dataset(name)) for name in kinds["datasets"])
    return (
        f"Tried on small networks of ours for {pictures}, the scan cried wolf on {clean.hits} of {clean.count} clean ones "
        f"(a rate of {low} to {high} %) and named the attacker’s class in {backdoored.hits} of "
        f"{backdoored.count} with a backdoor ({', '.join(map(words.attack, kinds['backdoored']['attacks']))})."
    )


def _chosen_by(record) -> str:
    after = words.purified(record)
    guarded = after is not None and "epoch" in after.extra.get("guard", "") and not record.config["data"]["test"]
    return " (but the epoch that is given back was chosen by them)" if guarded else ""


def facts(record) -> dict[str, str]:
    """The file and how it was read."""
    told = suspect(record)
    tried, scaling = told.get("accuracy_by_normalisation", {}), told.get("normalisation", words.NOTHING)
    if len(tried) > 1:
        scaling += f" (of {len(tried)} tried on the clean images{nearly_as_well(told)})"
    others = {"Left out, being no tensors": ", ".join(told["others"])} if told.get("others") else {}
    return {
        "File": told.get("file", words.NOTHING).rsplit("/", 1)[-1],
        "SHA-256": told.get("sha256", words.NOTHING),
        "Format": told.get("format", words.NOTHING),
        "Weights under": told.get("container") or "the top",
        "Prefix taken off": told.get("prefix") or "none",
        "Network": told.get("network", words.NOTHING),
        "Pixels scaled as": scaling,
        "Classes": str(len(told.get("class_names", ()))),
        **others,
    }


def nearly_as_well(told: dict) -> str:
    """The scalings of pixels that the images cannot tell from the one that was chosen, as the end of a sentence."""
    tried, scaling = told.get("accuracy_by_normalisation", {}), told.get("normalisation")
    others = [name for name in tried if name != scaling]
    # Records of earlier versions say nothing of it.
    close = told.get("alike", [name for name in others if tried[name] > tried[scaling] - ALIKE])
    return f"; {' and '.join(close)} would do nearly as well" if close else ""


class Cell(NamedTuple):
    """One number of the table, in words, and its interval where it has one."""

    heading: str
    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


def rows(record) -> list[tuple[str, list[Cell]]]:
    """(model, its cells) of every model measured; columns that nobody has are left out."""
    columns = {"Clean accuracy": _accuracy, "Flagged by the scan": lambda m: (_said(record, m),)}
    columns["Largest anomaly index"] = lambda m: (_index(m),)
    for begin, name in TRIGGERS.items():
        columns[f"{name} works"] = lambda m, begin=begin: (_rate(m, begin, "asr"), "" if begin else _interval(m.asr))
        columns[f"{name} works after retuning"] = lambda m, begin=begin: (_rate(m, begin, "r_asr"),)
        columns[f"{name} works with perturbations"] = lambda m, begin=begin: (_rate(m, begin, "q_asr"),)
    measured = series.in_order(record.metrics.values())
    made = {name: [Cell(name, *column(m)) for m in measured] for name, column in columns.items()}
    kept = [cells for cells in made.values() if any(cell.value != words.NOTHING for cell in cells)]
    called = [words.defense(m.defense) if m.defense != "none" else "The model as it came" for m in measured]
    return [(name, [cells[place] for cells in kept]) for place, name in enumerate(called)]


def _accuracy(measured) -> tuple[str, str]:
    return words.percent(measured.ca.percent), _interval(measured.ca)


def _interval(rate: records.Rate | None) -> str:
    return " to ".join(map(words.number, rate.interval)) if rate is not None else ""


def _said(record, measured) -> str:
    found = measured.extra.get("scan")
    if found is None:
        return words.NOTHING
    return "cannot tell" if found.get("undetermined") else _names(record, found) or "no class"


def _index(measured) -> str:
    return words.number(measured.extra.get("scan", {}).get("anomaly_index"))


def _rate(measured, begin: str, name: str) -> str:
    if name == "asr" and not begin:
        return words.percent(measured.asr.percent) if measured.asr is not None else words.NOTHING
    return words.percent(measured.extra.get(begin + name))


def stood_in(record) -> str:
    """Which trigger stood in for the real one, as the end of a sentence."""
    before = words.backdoored(record)
    if before is not None and before.extra.get("stand_in_from_scan"):
        return "the scan’s own, for none was found that still works once the model is fine-tuned, and that is a weak test"
    return "the smallest that works on the model as it came and once it is fine-tuned"


def unknown(record) -> list[str]:
    """What the run does not tell, for a reader who would deploy the model."""
    told = [
        "The scan finds triggers that look the same on every image and cover little of it. Triggers spread over the whole "
        "image, different on every image or bending it, and backdoors with several targets may pass it unseen; BI-BAU (U) does "
        "not need the scan to have found anything.",
    ]
    before, after = words.backdoored(record), words.purified(record)
    if not record.config["verify"]["trigger"] and before is not None and "stand_in_asr" in before.extra:
        told.append(
            f"Nobody gave the real trigger. An inverted one stands in for it, {stood_in(record)}; it may yet be another "
            "shortcut of the network, and easier to unlearn than the real one."
        )
    rates = [after.extra.get(begin + name) for begin in TRIGGERS for name in ("r_asr", "q_asr")] if after is not None else []
    rates = [value for value in rates if words.is_number(value)]
    if rates and max(rates) <= BACK:
        told.append(
            "Two attacks tried to call the backdoor back. That they fail is evidence, not proof; a run with another seed "
            "(--config.seed=1) adds to it."
        )
    if not rates and any(stage.startswith("purify/") for stage in record.stages):
        told.append("Nobody tried to call a backdoor back: the stage verify was not run, or had no trigger to try with.")
    counts = [after.extra.get(f"{begin}reactivation_images", FEW) for begin in TRIGGERS] if after is not None else [FEW]
    if min(counts) < FEW:
        told.append(f"What is said of a trigger is counted on only {min(counts)} images of other classes than its own.")
    told.append("Nothing is said about images of other kinds than the clean ones, nor about adversarial examples in general.")
    if after is not None and after.extra.get("guard"):
        told.insert(0, after.extra["guard"])
    return [*suspect(record).get("warnings", []), *told]


def terminal(record) -> Table:
    """The closing table of one run: a line a number, a column a model."""
    # As text: what rich takes for markup in the names of classes would change what is shown.
    table = Table(title=Text(facts(record)["File"]), caption=Text(f"{verdict(record)}\n{basis(record)}"))
    table.add_column("")
    made = rows(record)
    for name, _ in made:
        table.add_column(name, justify="right")
    for line, cell in enumerate(made[0][1] if made else ()):
        table.add_row(cell.heading, *(Text(str(cells[line])) for _, cells in made))
    return table


# --- as HTML


def unknown_html(record) -> str:
    """The list of what is not known."""
    return f"<ul>{''.join(f'<li>{prose(line)}</li>' for line in unknown(record))}</ul>"


def prose(text: str) -> str:
    """A sentence as HTML; the settings that it names are set as code, which no line breaks."""
    return re.sub(r"--config\.[\w.]+(=[\w.]+)?", r"<code>\g<0></code>", escape(text))


def table_html(record) -> str:
    """A table's inside: a line a number, a column a model, the main defence beside the model as it came."""
    made, main = rows(record), _main(record)
    if not made:
        return ""
    order = sorted(range(len(made)), key=lambda place: (place != 0, place != main))
    heads = "".join(f'<th scope="col">{escape(made[place][0])}</th>' for place in order)
    body = []
    for line, first in enumerate(made[0][1]):
        cells = ""
        for place in order:
            cell = made[place][1][line]
            value = f"<b>{escape(cell.value)}</b>" if place == main else escape(cell.value)
            cells += f"<td>{value}{f'<br><small>{escape(cell.interval)}</small>' if cell.interval else ''}</td>"
        body.append(f'<tr><th scope="row">{escape(first.heading)}</th>{cells}</tr>')
    return f'<thead><tr><th scope="col"></th>{heads}</tr></thead><tbody>{"".join(body)}</tbody>'


def _main(record) -> int:
    measured, after = series.in_order(record.metrics.values()), words.purified(record)
    return measured.index(after) if after in measured else -1


def triggers_html(record, arrays: dict[str, np.ndarray], heading: str) -> str:
    """The smallest triggers of a scan, on grey and on an image, largest anomaly index first."""
    if not arrays:
        return ""
    index, example = arrays["index"], arrays["example"].astype(np.float32)
    order = [label for label in np.argsort(-index, kind="stable") if np.isfinite(index[label])][:SHOWN]
    if not order:
        return ""
    cells = []
    for label in order:
        told = f"index {words.number(float(index[label]))}"
        given = (arrays["masks"][label], arrays["patterns"][label], example, int(label), float(arrays["reached"][label]))
        cells.append(_cell(record, *given, told, hit=label in arrays["flagged"]))
    return _strip(heading, cells)


def stand_in_html(record, arrays: dict[str, np.ndarray], heading: str) -> str:
    """The trigger that stood in for the real one, on grey and on an image."""
    if not arrays:
        return ""
    given = (arrays["mask"], arrays["pattern"], arrays["example"].astype(np.float32), int(arrays["label"]))
    told = f"about {words.number(float(arrays['mask'].sum()), 0)} pixels"
    return _strip(heading, [_cell(record, *given, float(arrays["reached"]), told)])


def _strip(heading: str, cells: list[str]) -> str:
    """Cells in a row, each as wide as if there were SHOWN of them."""
    row = "".join(cells) + "<td></td>" * (SHOWN - len(cells))
    return f'<table class="strip" style="--n:{SHOWN}"><caption>{escape(heading)}</caption><tbody><tr>{row}</tr></tbody></table>'


def _cell(record, mask, pattern, example, label: int, reached: float, told: str, *, hit: bool = False) -> str:
    """One trigger on grey and on an image, with what is told of it and the share of images that it turns."""
    alone, made = (_laid(mask, pattern, under) for under in (GREY, example))
    name = class_name(record, label)
    says = f'<span class="says{" hit" if hit else ""}"><i>{told}</i>{escape(name)}: {words.percent(100 * reached)}</span>'
    alt = f"inverted trigger for class {name}"
    pictures = f'<img src="{strip.data_uri(alone)}" alt="{escape(alt)}">'
    pictures += f'<img src="{strip.data_uri(made)}" alt="{escape(alt)}, on an image">'
    return f"<td>{pictures}{says}</td>"


def _laid(mask: np.ndarray, pattern: np.ndarray, under) -> np.ndarray:
    return np.clip(np.round((1 - mask) * under + mask * pattern), 0, 255).astype(np.uint8)
