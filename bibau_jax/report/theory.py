"""Pictures of the theory's studies, from their records."""

from pathlib import Path

import numpy as np

from bibau_jax.report.pictures import plotting, save

INK, CLEAN, BACKDOOR, UNLEARNING = "#1c1d1f", "#00477a", "#c24e00", "#00785a"
UNLEARNINGS = {
    "clean": ("fine-tuning on clean inputs", "#8a4b86"),
    "orthogonal": ("inputs orthogonal to the clean task", "#00785a"),
    "parallel": ("inputs parallel to the backdoor", "#e0a100"),
    "orthogonal_and_clean": ("orthogonal inputs and clean ones", "#00477a"),
}


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
