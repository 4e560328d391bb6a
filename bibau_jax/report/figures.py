"""Charts as inline SVG strings: bars of rates, and curves on a linear, percent or logarithmic scale.

A chart takes the width of its place and keeps its text at one size: positions are percentages, and only the curves
lie in a stretched inner picture. Colours come from the page's style sheet, by class, so that they follow light and dark.
"""

import math
from dataclasses import dataclass
from html import escape

from bibau_jax.report import words

MOST_POINTS = 500
BAR_ROW = 44  # pixels a row of bars takes: a line of text and the bar under it


@dataclass(frozen=True)
class Series:
    """One curve: its name in the legend, points (x, y) in order of x, and how many values could not be drawn."""

    name: str
    points: tuple
    left_out: int = 0


def bars(title: str, rows, tone: str, reference: float | None = None) -> str:
    """Horizontal bars of (name, value in percent, text at the right), on 0..100, with a dashed line at `reference`.

    `tone` is the style class of the bars; a row whose value is None is drawn without a bar.
    """
    height = BAR_ROW * len(rows) + 20
    told = "; ".join(f"{name} {text}" for name, _, text in rows)
    out = [f'<svg class="bars {tone}" role="img" height="{height}" aria-label="{escape(f"{title}: {told}")}">']
    foot = BAR_ROW * len(rows)
    out += [f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{foot}"/>' for x in (0, 25, 50, 75, 100)]
    for index, (name, value, text) in enumerate(rows):
        top = BAR_ROW * index
        out.append(f'<text class="ground" x="0" y="{top + 18}">{escape(name)}</text>')
        out.append(f'<text class="ground value" x="100%" y="{top + 18}" text-anchor="end">{escape(text)}</text>')
        out.append(f'<rect class="track" x="0" y="{top + 25}" width="100%" height="10" rx="1"/>')
        if value is not None:
            out.append(f'<rect class="bar" x="0" y="{top + 25}" width="{value:.3f}%" height="10" rx="1"/>')
    if reference is not None:
        x = f'x1="{reference:.3f}%" x2="{reference:.3f}%"'
        out += [f'<line class="reference" {x} y1="{BAR_ROW * i + 23}" y2="{BAR_ROW * i + 37}"/>' for i in range(len(rows))]
    for x, anchor in ((0, "start"), (50, "middle"), (100, "end")):
        out.append(f'<text class="tick" x="{x}%" y="{height - 4}" text-anchor="{anchor}">{x}\u202f%</text>')
    return "".join(out) + "</svg>"


def linear_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high], both positive; at most about six of them."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    stride = math.ceil((last - first) / 5)
    return [10.0**exponent for exponent in range(first, last + stride, stride)]


def _tick_text(value: float, scale: str) -> str:
    if scale == "percent":
        return f"{value:.0f}\u202f%"
    if scale == "log" and not 1e-3 <= value < 1e4:
        exponent = str(round(math.log10(value))).replace("-", "−")
        return f'10<tspan dy="-5" font-size="9">{exponent}</tspan>'
    if abs(value) >= 1e4 or 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e−").replace("e+0", "e")
    return f"{value:g}".replace("-", "−")


def _along_x(points, low: float, high: float) -> list[float]:
    return [100.0 * (x - low) / (high - low) if high > low else 50.0 for x in points]


def _whole_steps(low: float, high: float) -> list[float]:
    """Round whole numbers inside [low, high]: the epochs or steps that the axis names."""
    if high <= low:
        return [low]
    inside = [tick for tick in linear_ticks(low, high, 5) if low <= tick <= high and float(tick).is_integer()]
    return inside or [low, high]


def thin(points) -> list:
    """At most about MOST_POINTS of the points, evenly chosen, the last one always among them."""
    stride = math.ceil(len(points) / MOST_POINTS)
    return list(points) if stride <= 1 else [*points[:-1:stride], points[-1]]


def _curve(index: int, series: Series, place_x, place_y) -> tuple[str, str]:
    points = thin(series.points)
    xs, ys = place_x([x for x, _ in points]), [place_y(y) for _, y in points]
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in zip(xs, ys, strict=True))
    curve = f'<polyline class="s{index}" points="{line}"/>'
    return curve, f'<circle class="s{index}" cx="{xs[-1]:.2f}%" cy="{ys[-1]:.2f}%" r="3.2"/>'


def _axes(ticks, place_y, scale: str, x_ticks, place_x) -> str:
    out = []
    for tick in ticks:
        y = place_y(tick)
        out.append(f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        text = _tick_text(tick, scale)
        out.append(f'<text class="tick" x="-8" y="{y:.2f}%" dy="4" text-anchor="end">{text}</text>')
    for tick, x in zip(x_ticks, place_x(x_ticks), strict=True):
        out.append(f'<text class="tick" x="{x:.2f}%" y="100%" dy="19" text-anchor="middle">{tick:,.0f}</text>')
    return "".join(out)


def _description(title: str, series, scale: str) -> str:
    unit = "\u202f%" if scale == "percent" else ""
    ends = (f"{s.name} from {words.short(s.points[0][1])}{unit} to {words.short(s.points[-1][1])}{unit}" for s in series)
    return escape(f"{title}: {'; '.join(ends)}")


def curves(title: str, series, scale: str = "linear", threshold: tuple[float, str] | None = None) -> str:
    """Curves over epochs or steps; `scale` is linear, percent (0..100) or log (positive values only).

    Every Series needs one point at least. `threshold` is (value, text) of a dashed horizontal line.
    """
    values = [y for s in series for _, y in s.points] + ([threshold[0]] if threshold else [])
    low, high = min(values), max(values)
    ticks = log_ticks(low, high) if scale == "log" else linear_ticks(low, high)
    ticks = [0, 25, 50, 75, 100] if scale == "percent" and 0 <= low and high <= 100 else ticks
    bend = math.log10 if scale == "log" else float

    def place_y(value):
        return 100.0 * (bend(ticks[-1]) - bend(value)) / (bend(ticks[-1]) - bend(ticks[0]))

    all_x = [x for s in series for x, _ in s.points]

    def place_x(xs):
        return _along_x(xs, min(all_x), max(all_x))

    drawn = [_curve(index, s, place_x, place_y) for index, s in enumerate(series)]
    out = [f'<svg class="curves" role="img" height="170" aria-label="{_description(title, series, scale)}">']
    out.append(_axes(ticks, place_y, scale, _whole_steps(min(all_x), max(all_x)), place_x))
    if threshold:
        y = place_y(threshold[0])
        out.append(f'<line class="threshold" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
    inner = 'viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" overflow="visible"'
    out.append(f"<svg {inner}>" + "".join(curve for curve, _ in drawn) + "</svg>")
    return "".join(out) + "".join(dot for _, dot in drawn) + "</svg>"


def _sample(tone: str) -> str:
    line = f'<line class="{tone}" x1="0" x2="22" y1="4" y2="4"/>'
    return f'<svg width="22" height="8" aria-hidden="true">{line}</svg>'


def legend(series, scale: str = "linear", threshold: tuple[float, str] | None = None) -> str:
    """The names of the curves, and of the threshold, beside a sample of each line, with the last value."""
    unit = "\u202f%" if scale == "percent" else ""
    items = []
    for index, s in enumerate(series):
        last = words.number(s.points[-1][1]) if scale == "percent" else words.short(s.points[-1][1])
        items.append(f"<li>{_sample(f's{index}')}{escape(s.name)} <b>{last}{unit}</b></li>")
    if threshold:
        items.append(f"<li>{_sample('threshold')}{escape(threshold[1])} <b>{words.short(threshold[0])}</b></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'
