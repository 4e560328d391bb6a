"""Pictures of many runs, from their records: re-activation beside clean accuracy, BEC by layer, eta, the path, t-SNE."""

from pathlib import Path

import numpy as np

from bibau_jax.report import words

COLOURS = {
    "none": "#1c1d1f",
    "clean": "#6b6f76",
    "ft": "#c24e00",
    "base_at": "#e0a100",
    "bibau_t": "#4a9ad4",
    "bibau_u": "#00477a",
    "ibu": "#00785a",
}
SPARE = ("#8a4b86", "#b05a7a", "#5a7d2a", "#7a5a2a", "#3a8a8a", "#a0522d", "#556b9b", "#9b5555")
KINDS = {
    "clean": ("clean images", "#9db4c8", "o"),
    "target": ("target class", "#00785a", "^"),
    "triggered": ("triggered", "#c24e00", "x"),
}


def plotting():
    """matplotlib.pyplot, drawing to files in the manner of all pictures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"})
    return plt


def colour(defense: str, others: list[str]) -> str:
    """A defence's colour, the same in every picture; unknown ones take the spare colours in order."""
    return COLOURS.get(defense) or SPARE[others.index(defense) % len(SPARE)]


def _unknown(names) -> list[str]:
    return sorted(name for name in names if name not in COLOURS)


def save(figure, path: Path) -> Path:
    """Writes a figure as PNG and closes it."""
    plt = plotting()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def scatter(lines, path: Path) -> Path | None:
    """Clean accuracy against R-ASR from lines of `series.summary`: small marks are attacks, large ones their mean.

    The mean is over the attacks that all have. None without R-ASR. Runs with other settings than most are left out, as in the
    tables.
    """
    told = [line for line in lines if line["variant"] == 1 and line.get("r_asr") and line["r_asr"]["n"] and line["ca"]["n"]]
    if not told:
        return None
    figure, axis = plotting().subplots(figsize=(7.2, 5))
    names = sorted({line["defense"] for line in told}, key=lambda name: words.order(words.DEFENSES, name))
    common = set.intersection(*({line["attack"] for line in told if line["defense"] == name} for name in names))
    for name in names:
        mine, tone = [line for line in told if line["defense"] == name], colour(name, _unknown(names))
        places = {line["attack"]: [line[key]["mean"] for key in ("ca", "r_asr")] for line in mine}
        axis.scatter(*zip(*places.values(), strict=True), s=16, color=tone, alpha=0.4, linewidths=0)
        means = np.mean([places[attack] for attack in sorted(common)], 0) if common else (np.nan, np.nan)
        axis.scatter(*means, s=130, color=tone, edgecolors="white", linewidths=1.5, zorder=3, label=words.defense(name))
    axis.set(xlabel="Clean accuracy, %", ylabel="ASR after retuning (R-ASR), %", ylim=(-3, 103))
    over = f" (large: mean of {len(common)} attacks)" if len(common) > 1 else ""
    axis.set_title(f"Is it gone? Low is gone, right is useful{over}", loc="left", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return save(figure, path)


def _over_attacks(found: dict, wanted) -> dict[str, np.ndarray]:
    """{defense: mean over attacks of the mean over runs} of the array, or None, that `wanted` takes from a measurement."""
    told: dict[str, dict[str, list]] = {}
    for record in found.values():
        for measured in record.metrics.values():
            if (value := wanted(measured)) is not None:
                told.setdefault(measured.defense, {}).setdefault(record.config["attack"]["name"], []).append(value)
    return {defense: np.nanmean([np.nanmean(values, 0) for values in attacks.values()], 0) for defense, attacks in told.items()}


def bec_layers(found: dict, path: Path) -> Path | None:
    """BEC of every layer as bars, one panel a defence, mean over attacks. None where no record has it."""
    told = [
        m.extra for record in found.values() for m in record.metrics.values() if isinstance(m.extra.get("bec_layers"), dict)
    ]
    every = dict.fromkeys(name for extra in told for name in [*extra.get("bec_similarity", {}), *extra["bec_layers"]])
    layers = [name for name in every if any(words.is_number(extra["bec_layers"].get(name)) for extra in told)]

    def of_layers(measured):
        values = measured.extra.get("bec_layers")
        if measured.defense in ("none", "clean") or not isinstance(values, dict):
            return None
        return [values[name] if words.is_number(values.get(name)) else np.nan for name in layers]

    means = _over_attacks(found, of_layers)
    if not means or not layers:
        return None
    names = sorted(means, key=lambda name: words.order(words.DEFENSES, name))
    low, high = np.nanmin(list(means.values())), np.nanmax(list(means.values()))
    shape = {"figsize": (2.3 * len(names) + 1.2, 0.3 * len(layers) + 1.3), "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plotting().subplots(1, len(names), layout="constrained", **shape)
    for axis, name in zip(axes[0], names, strict=True):
        axis.barh(range(len(layers)), means[name], color=colour(name, _unknown(names)), height=0.65)
        axis.axvline(1, color="#1c1d1f", linewidth=0.8, linestyle=":")
        axis.set(xlim=(min(-0.2, 1.05 * low), max(1.1, 1.05 * high)))  # far below 0 is unlike both ends
        axis.set_title(words.defense(name), fontsize=10)
        axis.set_yticks(range(len(layers)), layers)
    axes[0][0].invert_yaxis()
    figure.supxlabel("BEC: 0 as the clean twin, 1 as the backdoored model", fontsize=9)
    return save(figure, path)


def eta_sweep(found: dict, path: Path) -> Path | None:
    """CA, ASR, R-ASR and Q-ASR of BI-BAU (U) by eta (Fig. 7), mean over the attacks and seeds that every eta has.

    None unless there are two etas.
    """
    points: dict[float, dict[tuple[str, int], tuple]] = {}
    for record in found.values():
        for measured in record.metrics.values():
            if measured.defense == "bibau_u" and words.is_number(record.config["defense"].get("eta")):
                again = [measured.extra.get(name) for name in words.REACTIVATION]
                again = [value if words.is_number(value) else np.nan for value in again]
                runs = points.setdefault(record.config["defense"]["eta"], {})
                runs[record.config["attack"]["name"], record.seed] = (measured.ca.percent, measured.asr.percent, *again)
    common = set.intersection(*map(set, points.values())) if points else set()
    if len(points) < 2 or not common:
        return None
    figure, axis = plotting().subplots(figsize=(6, 4))
    etas = sorted(points)
    means = np.array([np.mean([points[eta][run] for run in sorted(common)], 0) for eta in etas])
    tones = {"CA": "#00477a", "ASR": "#c24e00", "R-ASR": "#8a4b86", "Q-ASR": "#5a7d2a"}
    for place, (name, tone) in enumerate(tones.items()):
        if not np.isnan(means[:, place]).all():
            axis.plot(etas, means[:, place], marker="o", color=tone)
            at = (etas[-1], means[-1, place])
            axis.annotate(name, at, xytext=(6, 0), textcoords="offset points", color=tone, va="center")
    axis.set(xlabel="η: share of the clean feature that the prior takes off", ylabel="%", ylim=(-3, 103))
    attacks = dict.fromkeys(words.attack(attack) for attack, _ in sorted(common))
    axis.set_title(f"BI-BAU (U), {', '.join(attacks)}", loc="left", fontsize=10)
    axis.grid(alpha=0.25)
    return save(figure, path)


def weight_path(found: dict, path: Path) -> Path | None:
    """ASR on the straight line from each purified model to the backdoored one, mean over attacks. None without it."""
    shares = next((m.extra["path"] for record in found.values() for m in record.metrics.values() if "path" in m.extra), None)

    def along(name):
        return _over_attacks(found, lambda m: m.extra[name] if m.extra.get("path") == shares and shares else None)

    fresh, as_is = along("path_asr_recalibrated"), along("path_asr")
    if not fresh:
        return None
    figure, axis = plotting().subplots(figsize=(6.6, 4.4))
    for name in sorted(fresh, key=lambda name: words.order(words.DEFENSES, name)):
        tone = colour(name, _unknown(fresh))
        axis.plot(shares, fresh[name], color=tone, label=words.defense(name))
        axis.plot(shares, as_is[name], color=tone, linestyle=":", linewidth=1)
    axis.set(xlabel="from the purified model (0) to the backdoored one (1)", ylabel="ASR, %", ylim=(-3, 103))
    axis.set_title("How far away the backdoor is (dotted: statistics not renewed)", loc="left", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return save(figure, path)


def embeddings(folder: Path, record, path: Path) -> Path | None:
    """t-SNE of features before and after (Fig. 4) of one run's folder: None where `features.npz` of its models are not there.

    Every model's features are embedded by themselves, so places in different panels do not correspond.
    """
    from sklearn.manifold import TSNE

    rows = sorted(
        (place.parent.name for place in folder.glob("reactivate/*/features.npz")), key=lambda n: words.order(words.DEFENSES, n)
    )
    rows = [name for name in rows if name != "clean"]
    if "none" not in rows or len(rows) < 2:
        return None
    plt = plotting()
    figure, axes = plt.subplots(1, len(rows), figsize=(2.9 * len(rows), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], rows, strict=True):
        with np.load(folder / "reactivate" / name / "features.npz") as saved:
            parts = {kind: saved[kind] for kind in KINDS if kind in saved}
        together = np.concatenate(list(parts.values()))
        placed = TSNE(perplexity=max(1, min(30, len(together) // 4)), init="pca", random_state=0).fit_transform(together)
        begin = 0
        for kind in parts:
            label, tone, mark = KINDS[kind]
            part = placed[begin : begin + len(parts[kind])]
            axis.scatter(part[:, 0], part[:, 1], s=11, c=tone, marker=mark, linewidths=0.8, alpha=0.8, label=label)
            begin += len(part)
        axis.set(title="Before: backdoored" if name == "none" else words.defense(name), xticks=[], yticks=[])
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncol=3, fontsize=9)
    attack = words.attack(record.config["attack"]["name"])
    figure.suptitle(f"{attack}: features of clean and triggered images (t-SNE, each model by itself)", fontsize=11)
    return save(figure, path)
