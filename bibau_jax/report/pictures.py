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


def _plt():
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


def _save(figure, path: Path) -> Path:
    plt = _plt()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def scatter(rows, path: Path) -> Path | None:
    """Clean accuracy against R-ASR: small marks are runs, large ones the mean over attacks. None without R-ASR."""
    told = [row for row in rows if words.is_number(row.get("r_asr")) and words.is_number(row["ca"])]
    if not told:
        return None
    figure, axis = _plt().subplots(figsize=(7.2, 5))
    names = sorted({row["defense"] for row in told}, key=lambda name: words.order(words.DEFENSES, name))
    for name in names:
        mine, tone = [row for row in told if row["defense"] == name], colour(name, _unknown(names))
        axis.scatter([r["ca"] for r in mine], [r["r_asr"] for r in mine], s=16, color=tone, alpha=0.4, linewidths=0)
        mean = [np.mean([r[key] for r in mine]) for key in ("ca", "r_asr")]
        axis.scatter(*mean, s=130, color=tone, edgecolors="white", linewidths=1.5, zorder=3, label=words.defense(name))
    axis.set(xlabel="Clean accuracy, %", ylabel="ASR after retuning (R-ASR), %", ylim=(-3, 103))
    axis.set_title("Is it gone? Low is gone, right is useful", loc="left")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return _save(figure, path)


def bec_layers(found: dict, path: Path) -> Path | None:
    """BEC of every layer as bars, one panel a defence, mean over runs. None where no record has it."""
    told: dict[str, list[dict]] = {}
    every: dict[str, None] = {}
    for record in found.values():
        for measured in record.metrics.values():
            layers = measured.extra.get("bec_layers")
            if isinstance(layers, dict) and measured.defense not in ("none", "clean"):
                told.setdefault(measured.defense, []).append(layers)
                every |= dict.fromkeys([*measured.extra.get("bec_similarity", {}), *layers])  # in the network's order
    if not told:
        return None
    names = sorted(told, key=lambda name: words.order(words.DEFENSES, name))
    layers = [name for name in every if any(name in one for found in told.values() for one in found)]
    plt = _plt()
    shape = {"figsize": (2.3 * len(names) + 1.2, 0.3 * len(layers) + 1.3), "sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(names), layout="constrained", **shape)
    for axis, name in zip(axes[0], names, strict=True):
        means = [np.mean([one[layer] for one in told[name] if layer in one] or [np.nan]) for layer in layers]
        axis.barh(range(len(layers)), means, color=colour(name, _unknown(names)), height=0.65)
        axis.axvline(1, color="#1c1d1f", linewidth=0.8, linestyle=":")
        axis.set(title=words.defense(name), xlim=(-1, 1.1))  # adversarial training may go far below: unlike both ends
        axis.set_yticks(range(len(layers)), layers)
    axes[0][0].invert_yaxis()
    figure.supxlabel("BEC: 0 as the clean twin, 1 as the backdoored model", fontsize=9)
    return _save(figure, path)


def eta_sweep(found: dict, path: Path) -> Path | None:
    """CA, ASR and R-ASR of BI-BAU by eta (Fig. 7), mean over runs. None unless records have two values of eta."""
    points: dict[float, list] = {}
    for record in found.values():
        for measured in record.metrics.values():
            if measured.defense == "bibau_u":
                values = (measured.ca.percent, measured.asr.percent, measured.extra.get("r_asr", np.nan))
                points.setdefault(record.config["defense"]["eta"], []).append(values)
    if len(points) < 2:
        return None
    figure, axis = _plt().subplots(figsize=(6, 4))
    etas = sorted(points)
    for place, (name, tone) in enumerate((("CA", "#00477a"), ("ASR", "#c24e00"), ("R-ASR", "#8a4b86"))):
        values = [np.nanmean([one[place] for one in points[eta]]) for eta in etas]
        if not np.isnan(values).all():
            axis.plot(etas, values, marker="o", color=tone)
            axis.annotate(name, (etas[-1], values[-1]), xytext=(6, 0), textcoords="offset points", color=tone, va="center")
    axis.set(xlabel="η: share of the clean feature that the prior takes off", ylabel="%", ylim=(-3, 103))
    axis.grid(alpha=0.25)
    return _save(figure, path)


def weight_path(found: dict, path: Path) -> Path | None:
    """ASR on the straight line from each purified model to the backdoored one, mean over runs. None without it."""
    told: dict[str, list] = {}
    for record in found.values():
        for measured in record.metrics.values():
            if "path_asr" in measured.extra:
                told.setdefault(measured.defense, []).append(measured.extra)
    if not told:
        return None
    figure, axis = _plt().subplots(figsize=(6.6, 4.4))
    for name in sorted(told, key=lambda name: words.order(words.DEFENSES, name)):
        shares, tone = told[name][0]["path"], colour(name, _unknown(told))
        same = [one for one in told[name] if one["path"] == shares]
        axis.plot(shares, np.mean([one["path_asr_recalibrated"] for one in same], 0), color=tone, label=words.defense(name))
        axis.plot(shares, np.mean([one["path_asr"] for one in same], 0), color=tone, linestyle=":", linewidth=1)
    axis.set(xlabel="from the purified model (0) to the backdoored one (1)", ylabel="ASR, %", ylim=(-3, 103))
    axis.set_title("How far away the backdoor is (dotted: statistics not renewed)", loc="left", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return _save(figure, path)


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
    plt = _plt()
    figure, axes = plt.subplots(1, len(rows), figsize=(2.9 * len(rows), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], rows, strict=True):
        with np.load(folder / "reactivate" / name / "features.npz") as saved:
            parts = {kind: saved[kind] for kind in KINDS}
        together = np.concatenate(list(parts.values()))
        placed = TSNE(perplexity=min(30, len(together) // 4), init="pca", random_state=0).fit_transform(together)
        begin = 0
        for kind, (label, tone, mark) in KINDS.items():
            part = placed[begin : begin + len(parts[kind])]
            axis.scatter(part[:, 0], part[:, 1], s=11, c=tone, marker=mark, linewidths=0.8, alpha=0.8, label=label)
            begin += len(part)
        axis.set(title="Before: backdoored" if name == "none" else words.defense(name), xticks=[], yticks=[])
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncol=3, fontsize=9)
    attack = words.attack(record.config["attack"]["name"])
    figure.suptitle(f"{attack}: features of clean and triggered images (t-SNE, each model by itself)", fontsize=11)
    return _save(figure, path)
