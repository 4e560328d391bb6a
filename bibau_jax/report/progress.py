"""The curves of a run: which logged numbers share a panel, and the lines of `metrics.jsonl` as series."""

import math
from dataclasses import dataclass
from html import escape

from bibau_jax.report import figures, words


@dataclass(frozen=True)
class Panel:
    """One chart of a stage: title, the fields it draws with their names in the legend, its scale."""

    title: str
    fields: dict
    scale: str = "linear"


PANELS = (
    Panel("Objective", {"loss": "whole loss"}),
    Panel("Cross-entropy", {"clean_loss": "clean images", "adversarial_loss": "adversarial images"}),
    Panel(
        "Shares",
        {
            "accuracy": "accuracy in training",
            "held_out_accuracy": "held-out clean accuracy",
            "validation_accuracy": "validation accuracy",
            "fooled": "x′ fooling the backdoored model",
            "kept": "x′ still classified right",
            "iewc_awake": "inverse EWC awake",
        },
        "percent",
    ),
    Panel("Terms of the inner step", {"kd": "knowledge distillation", "prior": "prior"}),
    Panel("Penalties of the outer step", {"ewc": "EWC", "iewc": "inverse EWC"}),
    Panel(
        "Quadratic forms of EWC",
        {"ewc_quadratic": "on clean data", "iewc_quadratic": "on the unlearning set"},
        "log",
    ),
    Panel("Learning rate", {"learning_rate": "learning rate"}),
)
NOT_DRAWN = {"stage", "epoch", "step", "seconds"}


def by_stage(lines) -> dict[str, list[dict]]:
    """The lines of a run's log, grouped by stage in order of appearance."""
    stages: dict[str, list[dict]] = {}
    for line in lines:
        stages.setdefault(str(line.get("stage", "run")), []).append(line)
    return stages


def abscissa(lines) -> str:
    """What the curves run over: `epoch` where every epoch wrote one line, else `step`, else the line's `index`."""
    for field in ("epoch", "step"):
        if all(words.is_number(line.get(field)) for line in lines):
            if field == "step" or len({line[field] for line in lines}) == len(lines):
                return field
    return "index"


def _value(line, field) -> float | None:
    """The number under `field`; NaN where it was logged but is not finite, None where the line has none."""
    value = line.get(field)
    if isinstance(value, str):
        return math.nan if value.lower().lstrip("+-") in ("nan", "inf", "infinity") else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def series(lines, field: str, name: str, scale: str) -> figures.Series | None:
    """One field of a stage's lines as a curve, None where nothing was logged that can be drawn.

    Where a resumed run logged a place twice the later line counts. Values that are not finite, and those up to 0 on a
    logarithmic scale, are counted in `left_out`.
    """
    over = abscissa(lines)
    logged = {}
    for index, line in enumerate(lines):
        value = _value(line, field)
        if value is not None:
            logged[line[over] if over != "index" else index] = 100.0 * value if scale == "percent" else value
    kept = {x: y for x, y in logged.items() if math.isfinite(y) and (scale != "log" or y > 0)}
    points = tuple(sorted(kept.items()))
    return figures.Series(name, points, len(logged) - len(kept)) if points else None


def _further(lines) -> list[Panel]:
    """A panel for every logged number that no panel above knows."""
    known = NOT_DRAWN.union(*(panel.fields for panel in PANELS))
    names = dict.fromkeys(key for line in lines for key in line if key not in known and _value(line, key) is not None)
    return [Panel(words.measure(name).capitalize(), {name: words.measure(name)}) for name in names]


def waking_threshold(config) -> tuple[float, str] | None:
    """Where the clipped inverse EWC wakes: at 1/c of the quadratic form, with c the config's `defense.iewc_cap`."""
    defense = config.get("defense")
    if not isinstance(defense, dict) or defense.get("iewc_form", "clip") != "clip":
        return None  # the other forms have a gradient from the start, or a threshold of their own
    cap = defense.get("iewc_cap")
    return (1.0 / cap, "inverse EWC wakes, 1/c") if words.is_number(cap) and cap > 0 else None


def _panel(panel: Panel, lines, threshold) -> str:
    drawn = [series(lines, field, name, panel.scale) for field, name in panel.fields.items()]
    drawn = [s for s in drawn if s is not None]
    if not drawn:
        return ""
    at = threshold if "iewc_quadratic" in panel.fields else None
    notes = [f"{s.name}, {s.left_out} of {s.left_out + len(s.points)}" for s in drawn if s.left_out]
    why = "not finite, or not above 0" if panel.scale == "log" else "not finite"
    foot = f'<p class="note">Values not drawn, as {why}: {escape("; ".join(notes))}.</p>' if notes else ""
    chart = figures.curves(panel.title, drawn, panel.scale, at)
    head = f"<figcaption>{escape(panel.title)}</figcaption>{figures.legend(drawn, panel.scale, at)}"
    return f'<figure class="panel">{head}{chart}<p class="axis">{abscissa(lines)}</p>{foot}</figure>'


def panels(lines, config) -> str:
    """All charts of one stage as HTML, empty where its lines hold no number to draw."""
    return "".join(_panel(panel, lines, waking_threshold(config)) for panel in (*PANELS, *_further(lines)))
