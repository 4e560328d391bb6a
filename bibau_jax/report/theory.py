"""Pictures and tables of the theory's studies, from their records.

python -m bibau_jax.report.theory results/theory
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from bibau_jax import records
from bibau_jax.errors import UserError
from bibau_jax.report import unlearning, words
from bibau_jax.report.pictures import plotting, save

INK, CLEAN, BACKDOOR, UNLEARNING = "#1c1d1f", "#00477a", "#c24e00", "#00785a"
UNLEARNINGS = {
    "clean": ("fine-tuning on clean inputs", "#8a4b86"),
    "orthogonal": ("inputs orthogonal to the clean task", "#00785a"),
    "parallel": ("inputs parallel to the backdoor", "#e0a100"),
    "orthogonal_and_clean": ("orthogonal inputs and clean ones", "#00477a"),
}
FORGOTTEN = {"backdoor": "clean", "unlearning": "triggered"}  # by each task of `widths`, the images of the one before


def three_tasks(found: dict, path: Path) -> Path:
    """The weights' way through three tasks in the plane, and what each kind of unlearning leaves over the tilt."""
    plt = plotting()
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8.8), layout="constrained")
    for axis, tilt, title in zip(axes[0], (0.0, 35.0), ("Orthogonal tasks", "A backdoor tilted by 35°"), strict=True):
        _plane(axis, np.radians(tilt))
        axis.set_title(title, loc="left")
    for axis, kind, title in zip(
        axes[1], ("clean", "triggered"), ("What is left on clean inputs", "What is left on triggered inputs"), strict=True
    ):
        for size, (name, (label, tone)) in zip((110, 60, 30, 9), UNLEARNINGS.items(), strict=True):  # several lie on others
            values = found[name]
            axis.plot(values["tilt"], values[f"{kind}_predicted"], color=tone, linewidth=1.6)
            marks = {"color": tone, "s": size, "zorder": 3, "clip_on": False}
            axis.scatter(values["tilt"], values[f"{kind}_measured"], label=label, **marks)
        axis.plot(
            found["nothing"]["tilt"], found["nothing"][f"{kind}_predicted"], color=INK, linestyle=":", label="no unlearning"
        )
        axis.set(xlabel="tilt of the backdoor towards the clean task, degrees", xlim=(0, 90), ylim=(-0.03, 1.06))
        axis.set(ylabel="drift from the clean model / the backdoor’s drift", xticks=range(0, 91, 15))
        axis.set_title(title, loc="left")
        axis.grid(alpha=0.25)
    shape = {"frameon": False, "loc": "outside lower center", "ncol": 3}
    figure.legend(*axes[1][0].get_legend_handles_labels(), title="Unlearning by … (dots: closed form; lines: formula)", **shape)
    return save(figure, path)


def _plane(axis, tilt: float) -> None:
    """One backdoor in the plane of its clean feature (right) and the part of its trigger that is orthogonal to it (up)."""
    backdoor = np.array([np.sin(tilt), np.cos(tilt)])
    left = {"parallel": np.zeros(2), "orthogonal": np.array([np.sin(tilt), 0.0]), "clean": np.array([0.0, np.cos(tilt)])}

    def arrow(start, end, tone, width=2.0, style="-"):
        shape = {"arrowstyle": "-|>", "color": tone, "linewidth": width, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", xy=end, xytext=start, arrowprops=shape)

    arrow((-0.75, 0), (0, 0), CLEAN)
    axis.text(-0.72, 0.03, "clean task", color=CLEAN)
    arrow((0, 0), backdoor, BACKDOOR)
    axis.text(*(backdoor / 2 + (-0.06, 0.02)), "backdoor task", color=BACKDOOR, ha="right")
    for name, end in left.items():
        tone, shift = UNLEARNINGS[name][1], np.array([0.05, 0.0]) if name == "parallel" else np.zeros(2)
        if np.linalg.norm(end - backdoor) > 1e-9 and not (name == "orthogonal" and tilt == 0):
            arrow(backdoor + shift, end + shift, tone, 1.6, "--")
            axis.scatter(*end, s=70, color=tone, zorder=4)
    axis.scatter(0, 0, s=110, facecolors="none", edgecolors=CLEAN, linewidths=2, zorder=5)
    axis.annotate("clean model", (0, 0), xytext=(-6, -17), textcoords="offset points", color=CLEAN, ha="right")
    axis.annotate("backdoored", backdoor, xytext=(0, 8), textcoords="offset points", color=BACKDOOR, ha="center")
    if tilt:
        axis.annotate("orthogonal", left["orthogonal"], xytext=(6, -14), textcoords="offset points", color=UNLEARNING)
        axis.annotate(
            "fine-tuned", left["clean"], xytext=(-8, 2), textcoords="offset points", color=UNLEARNINGS["clean"][1], ha="right"
        )
        axis.text(0.28, 0.18, "parallel", color=UNLEARNINGS["parallel"][1])
    else:
        axis.text(0.09, 0.5, "parallel = orthogonal", color=UNLEARNINGS["parallel"][1])
        axis.text(0.06, 0.93, "fine-tuning stays here", color=UNLEARNINGS["clean"][1])
    axis.set(xlim=(-0.8, 1.0), ylim=(-0.22, 1.15), xticks=[], yticks=[], aspect="equal")
    axis.set(xlabel="weights: clean feature", ylabel="weights: trigger’s own direction")


def widths(found: dict, path: Path) -> Path:
    """How far networks are from their linearisation, by width, and their drifts and forgetting beside the predicted ones."""
    plt = plotting()
    runs = found["runs"]
    sizes = sorted({run["width"] for run in runs})
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for name, label, tone in (
        ("clean", "clean task", CLEAN),
        ("backdoor", "then the backdoor", BACKDOOR),
        ("unlearning", "then unlearning", UNLEARNING),
    ):
        for gap, style in (("gap_seen", "-"), ("gap_unseen", ":")):
            means = [np.mean([run["tasks"][name][gap] for run in runs if run["width"] == size]) for size in sizes]
            axes[0].plot(sizes, means, color=tone, linestyle=style, marker="o", label=label if style == "-" else None)
    axes[0].set(xscale="log", yscale="log", xlabel="width of the first stage", ylabel="|f − f_lin| / |f_lin − f₀|")
    axes[0].set_xticks(sizes, map(str, sizes))
    axes[0].minorticks_off()
    axes[0].set_yticks([0.03, 0.1, 0.3, 1.0], ["0.03", "0.1", "0.3", "1"])
    axes[0].set_title("Distance from the linearisation", loc="left", fontsize=10)
    axes[0].legend(frameon=False, title="after the … (dotted: unseen images)")
    unseen = (("backdoor", "unseen_clean", "clean, after the backdoor", CLEAN, "o"),)
    unseen += (("backdoor", "unseen_triggered", "triggered, after the backdoor", BACKDOOR, "o"),)
    unseen += (("unlearning", "unseen_clean", "clean, after unlearning", CLEAN, "^"),)
    unseen += (("unlearning", "unseen_triggered", "triggered, after unlearning", UNLEARNING, "^"),)
    _against_prediction(axes[1], runs, unseen, "drift")
    axes[1].set_title("Drift of unseen images (larger marks: wider networks)", loc="left", fontsize=10)
    labels = (("clean task, by the backdoor", CLEAN, "o"), ("backdoor, by unlearning", UNLEARNING, "^"))
    seen = tuple((*pair, *label) for pair, label in zip(FORGOTTEN.items(), labels, strict=True))
    _against_prediction(axes[2], runs, seen, "forgetting")
    axes[2].set_title("Forgetting: drift of the task before, on its own images", loc="left", fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.25)
    return save(figure, path)


def _against_prediction(axis, runs: list[dict], shown, what: str) -> None:
    """Measured over predicted drifts of every network; `shown` holds (task, kind of images, label, colour, mark)."""
    sizes = np.array([run["width"] for run in runs])
    areas = 12 + 90 * np.log2(sizes / min(sizes) + 1) / np.log2(max(sizes) / min(sizes) + 1)
    values = []
    for task, kind, label, tone, mark in shown:
        pairs = np.array([run["tasks"][task]["drift"][kind] for run in runs])
        axis.scatter(pairs[:, 1], pairs[:, 0], s=areas, color=tone, marker=mark, alpha=0.65, linewidths=0, label=label)
        values.append(pairs)
    ends = np.min(values) / 2, np.max(values) * 2
    axis.plot(ends, ends, color=INK, linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axis.set(xlabel=f"predicted mean squared {what}", ylabel=f"measured mean squared {what}")
    axis.legend(frameon=False, fontsize=9)


STREAMS = {
    "together": "Together",
    "backdoor_first": "Backdoor task, then clean task",
    "clean_first": "Clean task, then backdoor task",
}


def task_stream(found: dict, path: Path) -> Path:
    """Clean accuracy and ASR by epoch in the three orders of learning (Fig. 6), the change of task marked."""
    figure, axes = plotting().subplots(1, 3, figsize=(11.5, 3.8), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, STREAMS.items(), strict=True):
        entries = found[name]
        epochs = [entry["epoch"] for entry in entries]
        for metric, label, tone in (("ca", "clean accuracy", CLEAN), ("asr", "attack success rate", BACKDOOR)):
            axis.plot(epochs, [entry[metric] for entry in entries], color=tone, label=label, linewidth=1.8)
        pairs = zip(entries, entries[1:], strict=False)
        change = next((one["epoch"] + 0.5 for one, other in pairs if one["task"] != other["task"]), None)
        if change:
            axis.axvline(change, color=INK, linestyle=":", linewidth=1)
            where = {"transform": axis.get_xaxis_transform(), "color": INK, "fontsize": 8, "va": "top"}
            where["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axis.text((epochs[0] + change) / 2, 0.78, entries[0]["task"], ha="center", **where)
            axis.text((change + epochs[-1]) / 2, 0.78, entries[-1]["task"], ha="center", **where)
        axis.set(xlabel="epoch", ylim=(-3, 103), xlim=(epochs[0], epochs[-1]))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="%")
    axes[0].legend(frameon=False, loc="center right")
    return save(figure, path)


def widths_table(found: dict) -> str:
    """Markdown: by width and task, the distance from the linearisation, and drift and forgetting, measured over predicted.

    Drift is that of unseen images; forgetting that of the images of the task before (Eq. 6), mean over images.
    """
    head = "| Width | After | Distance, seen images | Distance, unseen | Drift of clean, measured / predicted | Of triggered |"
    lines = [f"{head} Forgetting of the task before, measured / predicted |", "| ---: | --- |" + " ---: |" * 5]
    for size in sorted({run["width"] for run in found["runs"]}):
        for name in ("clean", "backdoor", "unlearning"):
            told = [run["tasks"][name] for run in found["runs"] if run["width"] == size]
            gaps = [unlearning.spread((one[gap] for one in told), 3) for gap in ("gap_seen", "gap_unseen")]
            pairs = [[one["drift"][f"unseen_{kind}"] for one in told] for kind in ("clean", "triggered")]
            pairs.append([one["drift"][FORGOTTEN[name]] for one in told] if name in FORGOTTEN else [])
            ratios = [unlearning.spread((real / predicted for real, predicted in each), 2) for each in pairs]
            lines.append(f"| {size} | {name} | {' | '.join(gaps + ratios)} |")
    return "\n".join(lines) + "\n"


def stream_table(found: dict) -> str:
    """Markdown: clean accuracy and ASR at the end of every phase of the three orders of learning."""
    lines = ["| Order | Phase | Epochs | CA at its end | ASR at its end |", "| --- | --- | ---: | ---: | ---: |"]
    for name, title in STREAMS.items():
        for task in dict.fromkeys(entry["task"] for entry in found[name]):
            phase = [entry for entry in found[name] if entry["task"] == task]
            ends = (words.number(phase[-1][metric]) for metric in ("ca", "asr"))
            lines.append(f"| {title} | {task} | {len(phase)} | {' | '.join(ends)} |")
    return "\n".join(lines) + "\n"


TABLES = {"widths": widths_table, "task_stream": stream_table}
DRAWN = {"three_tasks": three_tasks, "widths": widths, "task_stream": task_stream}


def main(arguments=None) -> int:
    """The command line: draws every study that lies in a folder, beside its record, and writes the tables of some."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report.theory", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the records of studies")
    folder = parser.parse_args(arguments).folder
    try:
        told = {path: study for path in sorted(folder.glob("*.json")) if (study := records.read_study(path)).kind in DRAWN}
        if not told:
            raise UserError(f"{folder} holds no record of a study")
        for path, study in told.items():
            print(DRAWN[study.kind](study.found, path.with_suffix(".png")))
            if study.kind in TABLES:
                records.write_text(path.with_suffix(".md"), f"`{study.command}`\n\n{TABLES[study.kind](study.found)}")
    except (UserError, OSError, KeyError) as error:
        return unlearning.refused(error, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
