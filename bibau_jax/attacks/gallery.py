"""One picture of all attacks: clean, triggered and five times the difference, with PSNR and SSIM.

python -m bibau_jax.attacks.gallery --config=configs/cifar10.py --out=gallery.png

Attacks whose trigger is trained are drawn from the folders of runs that implanted them (--runs=runs/iad,runs/issba).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging

from bibau_jax.cli import CONFIG, fail, read_flags
from bibau_jax.errors import UserError

OUT = flags.DEFINE_string("out", "gallery.png", "the picture to write; its ending says the format (png, pdf, svg)")
RUNS = flags.DEFINE_list("runs", [], "folders of runs whose attack is drawn as it was trained")
ATTACKS = flags.DEFINE_list("attacks", [], "which attacks to draw; all whose trigger needs no training if left out")
GAIN = 5  # of the difference
MEASURED = 500  # test images that PSNR and SSIM are the means of


class Row(NamedTuple):
    """One attack on some test images: its name, what was stamped, and the mean likeness over MEASURED images."""

    name: str
    stamped: np.ndarray
    psnr: float
    ssim: float


def row(attack, test) -> Row:
    """The attack's row for a test set."""
    from bibau_jax.metrics import likeness

    some = test.take(slice(MEASURED))
    stamped = attack.stamp(some.images, some.ids)
    psnr = likeness.psnr(some.images, stamped)
    return Row(attack.name, stamped, float(psnr[np.isfinite(psnr)].mean()), float(likeness.ssim(some.images, stamped).mean()))


def check_run(theirs: dict, config: dict, folder: str) -> None:
    """Refuses a run on another data set."""
    if theirs["data"]["name"] != config["data"]["name"]:
        raise UserError(f"{folder} is a run on {theirs['data']['name']}, not on {config['data']['name']}")


def rows(config: dict, names: list[str], runs: list[str]) -> tuple[list[Row], object]:
    """The rows of the named attacks (all that need no training for none) and of those that runs trained; and the test set.

    A run's own attack takes the place of the same one with the config's settings. Says what it leaves out.
    """
    from bibau_jax import attacks, progress, workdir
    from bibau_jax.report import words
    from bibau_jax.run import Run, attack_as_trained

    anew = {"mode": "all_to_one", "poison_ratio": 0.0}  # a trigger at test looks the same whatever these are
    run = Run(config | {"attack": config["attack"] | anew}, Path())
    made, missing = {}, []
    for name in names or [name for name in attacks.names() if name not in attacks.FROM_FILES]:
        attack = run.attack_named(name)
        if attack.control is not None and attack.control.trains_trigger:
            if names:
                raise UserError(f"the trigger of {name} is trained: name a run that implanted it (--runs=FOLDER)")
            missing.append(name)
            continue
        made[name] = row(attack, run.dataset.test)
    for folder in runs:
        theirs = workdir.read_config(Path(folder).expanduser())
        check_run(theirs, config, folder)
        theirs["data"] |= {name: config["data"][name] for name in ("data_dir", "manual_dir", "download")}
        trained = Run(theirs, Path(folder).expanduser().absolute())
        attack, _ = attack_as_trained(trained)
        made[attack.name] = row(attack, run.dataset.test)
    if missing := [name for name in missing if name not in made]:
        progress.say(f"left out: {', '.join(missing)}; triggers that are trained are drawn from runs (--runs=FOLDER,...)")
    return sorted(made.values(), key=lambda one: words.order(words.ATTACKS, one.name)), run.dataset.test


def draw(made: list[Row], images: np.ndarray, chosen: list[int], path: Path) -> None:
    """Writes the picture: a row an attack, three columns (clean, triggered, difference) for each of the chosen images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bibau_jax.report import words

    figure, axes = plt.subplots(
        len(made), 3 * len(chosen), figsize=(1.1 * 3 * len(chosen) + 1.6, 1.15 * len(made) + 0.4), squeeze=False
    )
    for line, one in zip(axes, made, strict=True):
        for place, index in enumerate(chosen):
            clean, stamped = images[index], one.stamped[index]
            change = np.clip(128 + GAIN * (stamped.astype(int) - clean), 0, 255).astype(np.uint8)
            for axis, image in zip(line[3 * place :][:3], (clean, stamped, change), strict=True):
                grey = image.shape[-1] == 1
                axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
        label = f"{words.attack(one.name)}\n{one.psnr:.1f} dB\nSSIM {one.ssim:.3f}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for place in range(len(chosen)):
        for axis, title in zip(axes[0][3 * place :][:3], ("clean", "triggered", f"difference × {GAIN}"), strict=True):
            axis.set_title(title, fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    """Draws the picture and says where it is."""
    from bibau_jax import run  # noqa: F401  JAX starts after the flags were found right

    logging.set_verbosity(logging.WARNING)
    out = Path(OUT.value)
    try:
        if out.suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--out={out} must end in .png, .pdf or .svg")
        made, test = rows(CONFIG.value.to_dict(), ATTACKS.value, RUNS.value)
        labels = test.labels[:MEASURED]
        first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)[-3:]]
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(made, test.images, first, out)
    except UserError as error:
        fail(error)
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
    print(out)


if __name__ == "__main__":
    app.run(main, flags_parser=read_flags)
