"""The part of a run's page that tells a backdoor that is gone from one that is hidden."""

from html import escape

from bibau_jax.report import figures, words

ATTACKS = {  # number: heading, what it is
    "r_asr": ("R-ASR", "after fine-tuning with a few poisoned images"),
    "q_asr": ("Q-ASR", "with perturbations learned to wake the backdoor and to spare a clean model"),
    "u_asr": ("U-ASR", "with one perturbation on top of the trigger, made with gradients"),
    "s_asr": ("S-ASR", "with one perturbation on top of the trigger, made from outputs alone"),
}
BESIDE = {  # what stands beside the attacks in the table
    "r_ca": "CA after retuning",
    "q_queries": "Images asked for Q",
    "s_queries": "Images asked for S",
    "q_clean": "Q on clean images",
    "q_twin": "Q on the clean model",
    "q_twin_clean": "Q on both clean",
    "u_clean": "U on clean images",
    "s_clean": "S on clean images",
    "bec": "BEC",
    "bec_squashed": "BEC, sigmoid",
    "orthogonality": "Angle of |gradients|",
    "orthogonality_signed": "Angle of gradients",
    "linearity": "Linearity",
    "linearity_random": "Linearity, random channels",
}


def body(measured, before: float | None) -> str:
    """Bars of every re-activation attack, the numbers beside them, and BEC by layer; "" where nothing was tried.

    `measured` are the record's measurements in the order of tables, `before` the ASR of the backdoored model in percent.
    """
    tried = [name for name in ATTACKS if any(words.is_number(m.extra.get(name)) for m in measured)]
    beside = [name for name in BESIDE if any(words.is_number(m.extra.get(name)) for m in measured)]
    if not tried and not beside:
        return ""
    charts = "".join(_chart(name, measured, before) for name in tried)
    return f'<div class="pair">{charts}</div>{_table(measured, [*tried, *beside])}{_layers(measured)}'


def _chart(name: str, measured, before: float | None) -> str:
    heading, text = ATTACKS[name]
    rows = [
        (words.defense(m.defense), m.extra[name], words.percent(m.extra[name]))
        for m in measured
        if words.is_number(m.extra.get(name))
    ]
    return (
        f"<figure><figcaption>{heading} <span>{text}</span></figcaption>{figures.bars(heading, rows, 'asr', before)}</figure>"
    )


def _table(measured, names) -> str:
    heads = "".join(f'<th scope="col">{escape(ATTACKS[n][0] if n in ATTACKS else BESIDE[n])}</th>' for n in names)
    lines = []
    for m in measured:
        if any(name in m.extra for name in names):
            cells = "".join(f"<td>{_number(name, m.extra.get(name))}</td>" for name in names)
            lines.append(f'<tr><th scope="row">{escape(words.defense(m.defense))}</th>{cells}</tr>')
    inside = f'<thead><tr><th scope="col">Model</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody>'
    label = 'role="region" tabindex="0" aria-label="Re-activation, counted"'
    return f'<div class="wide" {label}><table class="numbers">{inside}</table></div>'


def _number(name: str, value) -> str:
    if name.startswith(("bec", "linearity")):
        return words.number(value, 2)
    if name.endswith("queries"):
        return words.number(value, 0)
    return words.number(value) + ("°" if name.startswith("orth") and words.is_number(value) else "")


def _layers(measured) -> str:
    """BEC of every layer as a shaded table: the darker, the more of the backdoored model's answer to the trigger is left."""
    told = [m for m in measured if isinstance(m.extra.get("bec_layers"), dict) and m.defense not in ("none", "clean")]
    if not told:
        return ""
    names = list(dict.fromkeys(name for m in told for name in m.extra["bec_layers"]))
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for m in told:
        values = [m.extra["bec_layers"].get(name) for name in names]
        cells = "".join(_shade(value) for value in values)
        lines.append(f'<tr><th scope="row">{escape(words.defense(m.defense))}</th>{cells}</tr>')
    inside = f'<thead><tr><th scope="col">Layer</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody>'
    text = (
        "BEC by layer, from the first to the last: 1 is the backdoored model's own answer to the trigger, 0 that of its clean "
        "twin. Layers in which the twin answers like the backdoored model are left out."
    )
    label = 'role="region" tabindex="0" aria-label="BEC by layer"'
    return f'<div class="wide" {label}><table class="numbers shaded">{inside}</table></div><p class="note">{text}</p>'


def _shade(value) -> str:
    depth = min(max(value, 0.0), 1.0) if words.is_number(value) else 0.0
    return f'<td style="--depth:{100 * depth:.0f}%">{words.number(value, 2)}</td>'
