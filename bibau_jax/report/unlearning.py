"""What `theory.measure` found on many runs: tables, the angles along purifications, and the answer to Proposition 4.2.

python -m bibau_jax.report.unlearning results/theory/runs --out=results/theory
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from bibau_jax import records
from bibau_jax.errors import UserError, say
from bibau_jax.report import words
from bibau_jax.report.pictures import COLOURS, colour, plotting, save

ASKED = {"to_backdoor": 180.0, "to_clean": 90.0, "to_implanted": 180.0}
HEADS = {
    "to_backdoor": "to learning the backdoor",
    "to_clean": "to learning the clean task",
    "to_implanted": "to θ_b − θ_clean",
}
NOTES = {
    "tasks": "Gradient angle: of the kernels' gradients on clean and on triggered test images, signed and of the magnitudes. "
    "Installed: the angle of θ_b − θ_clean, the difference of two trained models, to the gradient direction of learning it. "
    "Tangent overlap: the share of clean images' squared gradients that lies in the tangent space of other images, percent: "
    "triggered ones, the same ones with the trigger, other clean ones (the ceiling), images with shuffled pixels (the floor); "
    "and triggered ones at the clean twin. Frobenius: |O|² over the rank, triggered (ceiling, floor).",
    "angles": "Asked: 180 to learning the backdoor and to θ_b − θ_clean, 90 to learning the clean task. Below 90 to it "
    "helps the clean task. CA and ASR are over the images that the run's re-activation is counted on.",
    "modules": "The same angle to learning the backdoor, module by module.",
    "layers": "Share of the backdoored model's squared distance from the clean twin that is left, of the features behind the "
    "first and the last convolution and one halfway; 1 is as before. On clean images that distance is small to begin with.",
    "drifts": "Of logits. On triggered images: share |f_u − f_clean|² over |f_b − f_clean|², 0 is complete, 1 as before; how "
    "much of the backdoor's drift is taken back, and the cosine of unlearning's drift to the way back (Eq. 10: 1 and "
    "1); linear gap, |f − f_lin| over |f − f_b| for the purified parameters under θ_b's running statistics (older records "
    "compare under the purified ones and are left out); by statistics, the share of |f_u − f_b| that these make up. On clean "
    "images, over the triggered ones' |f_b − f_clean|²: moved |f_u − f_b|² (Eq. 10: 0), left |f_u − f_clean|² (Eq. 9: 0), and "
    "|f_b − f_clean|² before: two trainings differ by more than the poison.",
    "images": "x′ made by the defence at its start and at its end. Fooled: the backdoored model does not say the true class; "
    "target: it says the attack's target; kept: the clean twin sees the true class; both: fooled and kept.",
}


def collect(folder: Path) -> list[dict]:
    """What was found on every run that has a record in a folder, by attack and seed; UserError where there is none."""
    studies = [records.read_study(path) for path in sorted(Path(folder).glob("*.json"))]
    found = [study.found | {"settings": study.settings} for study in studies if study.kind == "unlearning"]
    if not found:
        raise UserError(f"{folder} holds no record of theory.measure")
    return sorted(found, key=lambda run: (words.order(words.ATTACKS, run["attack"]), run["seed"]))


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """Mean and sample standard deviation, `12.3 ± 0.4`; without the latter where there is one value. None is left out."""
    values = [value for value in values if value is not None]
    if not values:
        return words.NOTHING
    deviation = f" ± {words.number(statistics.stdev(values), digits)}" if len(values) > 1 else ""
    return words.number(statistics.mean(values), digits) + deviation


def tables(runs: list[dict]) -> str:
    """All tables as Markdown, a row an attack and a defence, mean ± standard deviation over seeds."""
    parts = [
        ("Clean and backdoor task at the backdoored model", "tasks", _tasks(runs)),
        ("Proposition 4.2: angles of the way from θ_b to the purified model, degrees", "angles", _angles(runs)),
        ("The same by module", "modules", _modules(runs)),
        ("Complete unlearning (Eq. 8-10)", "drifts", _drifts(runs)),
        ("The same by layer", "layers", _layers(runs)),
        ("Proposition 4.3: shares of adversarial images, percent", "images", _images(runs)),
    ]
    return "\n".join(f"## {title}\n\n{NOTES[name]}\n\n{table}" for title, name, table in parts)


def _groups(runs: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in runs:
        found.setdefault(run["attack"], []).append(run)
    return found


def _table(heads: list[str], left: int, lines: list[list[str]]) -> str:
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *lines)) + "\n"


def _tasks(runs: list[dict]) -> str:
    kinds = {"triggered": "Triggered", "same_triggered": "Same, triggered", "ceiling": "Ceiling", "floor": "Floor"}
    lines = []
    for attack, group in _groups(runs).items():
        overlaps = [[100 * run["tangent_overlap"]["none"][kind]["energy"] for run in group] for kind in kinds]
        overlaps.append([100 * run["tangent_overlap"]["clean"]["triggered"]["energy"] for run in group])
        angles = [[run[name] for run in group] for name in ("orthogonality_signed", "orthogonality")]
        angles.append([run["directions"]["implanted_to_backdoor"] for run in group])
        told = [group[0]["tangent_overlap"]["none"][kind]["frobenius"] for kind in ("triggered", "ceiling", "floor")]
        frobenius = "{:.2f} ({:.2f}, {:.2f})".format(*told)
        sizes = sorted({run["settings"]["tangents"] for run in group})
        lines.append(
            [words.attack(attack), *map(spread, angles + overlaps), frobenius, ", ".join(map(str, sizes)), str(len(group))]
        )
    heads = ["Attack", "Angle, signed", "Angle of magnitudes", "Installed", *kinds.values(), "Triggered, at the twin"]
    return _table([*heads, "Frobenius, first seed", "Images a kind", "Seeds"], 1, lines)


def _rows(runs: list[dict], heads: list[str], cells: Callable[[list[dict]], list[str]]) -> str:
    """A table with a line for every attack and defence; `cells` makes its numbers from what was found of that defence."""
    lines = []
    for attack, group in _groups(runs).items():
        for row in sorted({row for run in group for row in run["defenses"]}, key=lambda n: words.order(words.DEFENSES, n)):
            told = [run["defenses"][row] | {"run": run} for run in group if row in run["defenses"]]
            lines.append([words.attack(attack), words.defense(row), *cells(told), str(len(told))])
    return _table(["Attack", "Defence", *heads, "Seeds"], 2, lines)


def _angles(runs: list[dict]) -> str:
    def cells(told):
        angles = (spread(one["trajectory"][f"whole_{name}"][-1] for one in told) for name in ASKED)
        return [*(spread(one[rate] for one in told) for rate in ("ca", "asr")), *angles]

    heads = list(HEADS.values())
    return _rows(runs, ["CA", "ASR", *heads], cells)


def _modules(runs: list[dict]) -> str:
    names = list(dict.fromkeys(name for run in runs for told in run["defenses"].values() for name in told["angles_by_module"]))

    def cells(told):
        found = [[one["angles_by_module"].get(name) for one in told] for name in names]
        return [spread(one["to_backdoor"] for one in each if one) for each in found]

    return _rows(runs, names, cells)


def _layers(runs: list[dict]) -> str:
    def cells(told):
        layers = [[list(one["completeness"][kind]["layers"].values()) for one in told] for kind in ("triggered", "clean")]
        places = (lambda size: 0, lambda size: size // 2, lambda size: size - 1)
        return [spread((one[place(len(one))]["share"] for one in kind if one), 2) for kind in layers for place in places]

    heads = [f"{kind}: {place}" for kind in ("Triggered", "Clean") for place in ("first", "halfway", "last")]
    return _rows(runs, heads, cells)


def _drifts(runs: list[dict]) -> str:
    def cells(told):
        names = ("share", "compensation", "cosine")
        values = [spread((one["completeness"]["triggered"][name] for one in told), 2) for name in names]
        comparable = [one["completeness"]["triggered"] for one in told if "by_statistics" in one["completeness"]["triggered"]]
        values += [spread((one[name] for one in comparable), 2) for name in ("linear_gap", "by_statistics")]
        for name in ("moved", "left", "implanted"):
            pairs = [(one["completeness"]["clean"][name], one["completeness"]["triggered"]["implanted"]) for one in told]
            values.append(spread((part / whole for part, whole in pairs), 2))
        return values

    heads = ["Share", "Taken back", "Cosine", "Linear gap", "By statistics", "Clean: moved", "Clean: left", "Clean: before"]
    return _rows(runs, heads, cells)


def _images(runs: list[dict]) -> str:
    names = ("fooled", "target", "kept", "both")
    having = [run | {"defenses": {r: d for r, d in run["defenses"].items() if "adversarial" in d}} for run in runs]

    def cells(told):
        ends = [(when, name) for name in names for when in ("start", "end")]
        return [spread(100 * one["adversarial"][when][name] for one in told) for when, name in ends]

    return _rows(having, [f"{name}, {when}" for name in names for when in ("start", "end")], cells)


def verdict(runs: list[dict], row: str = "bibau_u", other: str = "ft") -> str:
    """Whether a defence meets Proposition 4.2's two conditions better than another, over all runs that have both; in words."""
    groups = {
        attack: [(run["defenses"][row], run["defenses"][other]) for run in group if {row, other} <= run["defenses"].keys()]
        for attack, group in _groups(runs).items()
    }
    pairs = {attack: group for attack, group in groups.items() if group}
    if not pairs:
        return f"No run has both {words.defense(row)} and {words.defense(other)}."
    lines = []
    for name, what in (("to_backdoor", "antagonistic to the backdoor"), ("to_clean", "orthogonal to the clean task")):
        told, nearer = [], []
        for attack, group in pairs.items():
            off = [[abs(one["trajectory"][f"whole_{name}"][-1] - ASKED[name]) for one in pair] for pair in group]
            nearer += [mine < theirs for mine, theirs in off]
            told.append(f"{words.attack(attack)} " + " and ".join(f"{spread(each)}°" for each in zip(*off, strict=True)))
        lines.append(
            f"- **{what}** (asked: {ASKED[name]:.0f}°): {words.defense(row)} ends nearer than {words.defense(other)} in "
            f"{sum(nearer)} of {len(nearer)} runs. So far off end the one and the other: {'; '.join(told)}."
        )
    return "\n".join(lines) + "\n"


def _states(run: dict) -> int:
    return min(len(told["trajectory"]["step"]) for told in run["defenses"].values())


def picture(runs: list[dict], path: Path) -> Path | None:
    """Angles along the purifications of one run an attack, and what is left of the drift on triggered images by layer.

    None where no run was measured with the states on the way.
    """
    from matplotlib.ticker import LogLocator

    groups = {attack: max(group, key=_states) for attack, group in _groups(runs).items() if max(map(_states, group)) > 1}
    if not groups:
        return None
    figure, axes = plotting().subplots(
        3, len(groups), figsize=(1.6 + 3.4 * len(groups), 9.4), squeeze=False, sharey="row", layout="constrained"
    )
    for column, (attack, run) in enumerate(groups.items()):
        for name, told in sorted(run["defenses"].items(), key=lambda item: words.order(words.DEFENSES, item[0])):
            tone = colour(name, sorted(set(run["defenses"]) - set(COLOURS)))
            line = {"color": tone, "label": words.defense(name), "linewidth": 1.7}
            for place, angle in enumerate(("to_backdoor", "to_clean")):
                axes[place][column].plot(told["trajectory"]["step"], told["trajectory"][f"whole_{angle}"], **line)
            layers = told["completeness"]["triggered"]["layers"]
            axes[2][column].plot(range(len(layers)), [layer["share"] for layer in layers.values()], marker="o", **line)
        for place, angle in enumerate(("to_backdoor", "to_clean")):
            axes[place][column].axhline(ASKED[angle], color="#1c1d1f", linestyle=":", linewidth=1)
            axes[place][column].set(xlabel="step of the purification")
            axes[place][0].set(ylabel=f"degrees {HEADS[angle]}\n(dotted: asked)")
        axes[2][column].axhline(1, color="#1c1d1f", linestyle=":", linewidth=1)
        axes[2][column].set(yscale="log")
        axes[2][column].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes[2][column].yaxis.set(major_formatter="{x:g}", minor_formatter="")
        axes[2][column].set_xticks(range(len(layers)), list(layers), rotation=70, fontsize=7)
        axes[2][0].set(ylabel="left of the drift,\ntriggered images, by layer")
        axes[0][column].set_title(words.attack(attack), loc="left")
    for axis in np.ravel(axes):
        axis.grid(alpha=0.25)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncol=2 * len(groups))
    return save(figure, path)


def refused(error: Exception, folder: Path) -> int:
    """Says in one line why nothing was made of the records in a folder; the exit status."""
    say(f"a record in {folder} is damaged: it has no {error}" if isinstance(error, KeyError) else error)
    return 1


def main(arguments=None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bibau_jax.report.unlearning", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the records of theory.measure")
    parser.add_argument("--out", type=Path, required=True, help="folder for unlearning.md and unlearning.png")
    given = parser.parse_args(arguments)
    try:
        runs = collect(given.folder)
        given.out.mkdir(parents=True, exist_ok=True)
        head = f"# Is Proposition 4.2 better met by BI-BAU (U) than by fine-tuning?\n\n{verdict(runs)}\n"
        head += f"Made from the records by `python -m bibau_jax.report.unlearning {given.folder} --out={given.out}`.\n\n"
        records.write_text(given.out / "unlearning.md", f"{head}{tables(runs)}")
        drawn = picture(runs, given.out / "unlearning.png")
        print(given.out / "unlearning.md", *([drawn] if drawn else []), sep="\n")
    except (UserError, OSError, KeyError) as error:
        return refused(error, given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
