"""The theory measured on finished runs: orthogonality, tangent overlap, Proposition 4.2 and 4.3, complete unlearning.

python -m bibau_jax.theory.measure runs/reactivation_cpu/badnets_0 runs/reactivation_cpu/badnets_1 --out=results/theory/runs

A run keeps its models but not the states that a purification passed: without `--states` the angles are those of the whole
way. With it every defence is run again on the run's backdoored model with the run's data, settings and keys, and a journal that
keeps a state several times an epoch in that folder; a second start finds them there. Runs are only read. `<out>/<run>.json` is
written for each.
"""

import argparse
import hashlib
import json
import runpy
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from bibau_jax import checkpoint, defenses, keys, parallel, progress, records, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import bibau
from bibau_jax.defenses.adversarial import attack_images, sufficient
from bibau_jax.errors import UserError
from bibau_jax.method import settings
from bibau_jax.run import Run, batch_sizes, load_model
from bibau_jax.stages import purify
from bibau_jax.stages.checks import Scene, scene_of, test_pairs
from bibau_jax.theory import complete_unlearning, linearize, ntk, orthogonality, overlap, trajectory
from bibau_jax.workdir import read_config

EVERY = 3  # states kept in an epoch
APART = 1e-3  # of the parameters' length: what a purification that is run again may end away from the run's own
LAMBDAS = ("lambda_kd", "lambda_prior", "lambda_ewc", "lambda_iewc")
CONSTANTS = ("alpha", "temperature", "eta", "prior_form", "iewc_cap", "iewc_form", "attack_form", "balance", "softened")


def of_run(this: Run, rows: list[str], states: Path | None, *, images: int, tangents: int) -> dict:
    """Everything that is measured of one run, as JSON-able numbers.

    `rows` are defences; see the module for `states`. `images` of each kind give gradients, drifts and adversarial images,
    `tangents` of each kind the tangent kernels.
    """
    scene = scene_of(this, {"none": "implant", "clean": "clean"})
    clean, triggered = test_pairs(scene, images)
    towards = trajectory.directions(this.classifier, scene.models["clean"], scene.models["none"], clean, triggered)
    absolute, signed = orthogonality.orthogonality(this.classifier, scene.models["none"], clean, triggered)
    found = {"attack": scene.attack.name, "seed": this.config["seed"], "models": {}, "tangent_overlap": {}}
    found |= {"orthogonality": absolute, "orthogonality_signed": signed}
    found["directions"] = {
        "backdoor_to_clean": trajectory.angles(towards.backdoor, towards).to_clean,
        "implanted_to_backdoor": trajectory.angles(towards.implanted, towards).to_backdoor,
        "implanted_to_clean": trajectory.angles(towards.implanted, towards).to_clean,
    }
    for name in ("none", "clean"):
        progress.say(f"{this.folder.name}: tangents of {name}", show=parallel.is_lead())
        found["tangent_overlap"][name] = tangent_overlaps(scene, name, tangents)
        found["models"][name] = _rates(scene, scene.models[name])
    tasks = (clean, triggered, towards)
    found["defenses"] = {row: of_defense(scene, row, states and states_of(scene, row, states), *tasks) for row in rows}
    return found


def states_of(scene: Scene, row: str, states: Path) -> Path:
    """The folder under `states` for a defence's states: another model or other settings under the same name have another."""
    told = json.dumps([scene.digests["none"], scene.this.options(row)], sort_keys=True, default=str)
    return states / scene.this.folder.name / f"{row}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def check(this: Run, rows: list[str], states: Path | None, *, images: int, tangents: int) -> None:
    """Raises `UserError` on sizes that cannot be had, a row that cannot be measured, and a model that a run does not have."""
    for name, value in (("images", images), ("tangents", tangents)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if 4 * tangents > len(this.measured):
        raise UserError(f"--tangents={tangents} needs {4 * tangents} test images, there are {len(this.measured)}")
    for row in rows:
        defenses.get(row)
        if states and not {"epochs", "batch_size"} <= this.options(row).keys():
            raise UserError(f"{row} is not trained by epochs of batches: no states can be kept on its way")
        if not states and not (this.folder / "purify" / row / "model").exists():
            raise UserError(
                f"{this.folder} has no model of {row}; leave it out of --defenses, or give --states to run it again"
            )
    for stage in ("implant", "clean"):
        this.model_folder(stage)


def completed(config: dict, defaults: dict) -> dict:
    """A nested config with the fields that it lacks, of a run that an earlier version made, from `defaults`."""
    sections = {name: value for name, value in config.items() if isinstance(value, dict) and name in defaults}
    return defaults | config | {name: completed(value, defaults[name]) for name, value in sections.items()}


def tangent_overlaps(scene: Scene, name: str, count: int) -> dict:
    """The overlap of clean test images' tangent space with that of other images, `count` of each kind, all logits.

    `triggered` other images with the trigger; `same_triggered` the same ones with the trigger; `ceiling` other clean images;
    `floor` other images with their pixels shuffled. UserError for fewer than `4 count` test images outside the target class.
    """
    rest = np.flatnonzero(scene.aims != scene.test.labels)
    if len(rest) < 4 * count:
        raise UserError(f"tangent kernels of {count} images a kind need {4 * count} test images, there are {len(rest)}")
    rows = [rest[index * count : (index + 1) * count] for index in range(4)]
    kinds = {
        "triggered": scene.triggered[rows[1]],
        "same_triggered": scene.triggered[rows[0]],
        "ceiling": scene.test.images[rows[2]],
        "floor": overlap.shuffled(scene.test.images[rows[3]]),
    }
    stacked = np.concatenate([scene.test.images[rows[0]], *kinds.values()])
    kernel = ntk.kernel(scene.this.classifier, scene.models[name], stacked, show=True)
    size = count * scene.this.classifier.num_classes
    parts = {kind: slice((index + 1) * size, (index + 2) * size) for index, kind in enumerate(kinds)}
    found = {}
    for kind, part in parts.items():
        told = overlap.overlap(kernel[:size, :size], kernel[part, part], kernel[:size, part])._asdict()
        told.pop("cosines")
        found[kind] = told
    return found


def _rates(scene: Scene, variables) -> dict[str, float]:
    """Clean accuracy and attack success rate, percent, on the run's test images."""
    said = [train.predict(scene.this.classifier, variables, images) for images in (scene.test.images, scene.triggered)]
    chosen = scene.aims != scene.test.labels
    return {
        "ca": 100 * float(np.mean(said[0] == scene.test.labels)),
        "asr": 100 * float(np.mean(said[1][chosen] == scene.aims[chosen])),
    }


def of_defense(scene: Scene, row: str, place: Path | None, clean: ImageSet, triggered: ImageSet, towards) -> dict:
    """One defence: its rates, the angles along its way, what it left of the drifts, and its adversarial images."""
    this, models = scene.this, scene.models
    states, last = purification(this, row, models["none"], place) if place else its_own(this, row)
    points = trajectory.trajectory(models["none"], [params for _, params in states], towards)
    three = complete_unlearning.Models(models["clean"], models["none"], last)
    movement = trajectory.difference(models["none"]["params"], last["params"])
    found = _rates(scene, last) | {"apart_from_run": _apart(this, row, last) if place else None}
    if (found["apart_from_run"] or 0) > APART:
        ended = f"run again it ended {100 * found['apart_from_run']:.1f} % of its parameters' length from the run's own model"
        progress.say(f"{this.folder.name}: {row}: {ended}; what is told is of the new one", show=parallel.is_lead())
    found["trajectory"] = {
        "step": [step for step, _ in states],
        "length": [point.length for point in points],
        **{
            f"{stretch}_{name}": [getattr(getattr(point, stretch), name) for point in points]
            for stretch in ("whole", "last")
            for name in trajectory.Angles._fields
        },
    }
    found["angles_by_module"] = {name: told._asdict() for name, told in trajectory.by_group(movement, towards).items()}
    found["completeness"] = {
        kind: _completeness(this, three, images.images) for kind, images in (("clean", clean), ("triggered", triggered))
    }
    if getattr(defenses.get(row).purify, "func", None) is bibau.purify:
        found["adversarial"] = adversarial(scene, row, last, len(clean))
    return found


def its_own(this: Run, row: str) -> tuple[list, dict]:
    """As `purification`, from the run's own purified model, with no state but the last (its step is not known, 0)."""
    variables = load_model(this, f"purify/{row}")[0]
    return [(0, variables["params"])], variables


def purification(this: Run, row: str, variables, place: Path) -> tuple[list, dict]:
    """([(step, parameters)] in order, the last one included, and the purified variables) of a defence that is run again."""
    options = this.options(row)
    size = len(this.splits.clean)
    steps = max(1, size // min(options["batch_size"], size))
    # States at the ends of epochs are not kept by a training that goes step by step.
    keeper = checkpoint.Keeper(place, max(1, steps // EVERY), keep=sys.maxsize)
    show = parallel.is_lead()
    last = purify.apply(this, row, variables, train.Journal(f"{this.folder.name}/{row}", keeper, show=show)).variables
    kept = sorted(int(path.name) for path in place.iterdir() if path.name.isdecimal())
    return [(step, checkpoint.load(place / str(step))[0]["params"]) for step in kept], jax.device_get(last)


def _apart(this: Run, row: str, variables) -> float | None:
    """How far a repeated purification ended from the run's own, |difference| / |parameters|; None without the latter."""
    if not (this.folder / "purify" / row / "model").exists():
        return None
    theirs, mine = load_model(this, f"purify/{row}")[0]["params"], variables["params"]
    squares = [
        sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(tree))
        for tree in (trajectory.difference(theirs, mine), theirs)
    ]
    return float(np.sqrt(squares[0] / squares[1]))


def _completeness(this: Run, models: complete_unlearning.Models, images: np.ndarray) -> dict:
    """Eq. 8-10 in total and by layer, and how far the purified parameters lead from the backdoored model's linearisation.

    `linear_gap` is |f_lin - f| over |f - f_b| at the backdoored model's running statistics, `by_statistics` how much of
    |f_u - f_b| the purified model's own statistics make up; None where nothing moved.
    """
    classifier = this.classifier.in_float32()  # as the linearisation is
    logits = [train.logits(classifier, each, images) for each in models]
    found = complete_unlearning.completeness(*logits)._asdict()
    # The linearisation is of the parameters alone, so that it is held against the purified ones under the old statistics.
    purified = models.purified["params"]
    linear = linearize.outputs(classifier, models.backdoored, purified, images)
    unmoved = train.logits(classifier, models.backdoored | {"params": purified}, images)
    found["linear_gap"] = _share(linear - unmoved, unmoved - logits[1])
    found["by_statistics"] = _share(logits[2] - unmoved, logits[2] - logits[1])
    found["layers"] = complete_unlearning.by_layer(classifier, models, images)
    return found


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
    size = np.linalg.norm(whole)
    return float(np.linalg.norm(part) / size) if size else None


def adversarial(scene: Scene, row: str, last, count: int) -> dict[str, dict[str, float]]:
    """Proposition 4.3 on `count` of the defender's clean images, for x' of BI-BAU's kind as the defence makes them.

    {"start": `AdversarialRates` as a dictionary, "end": the same at `last`, the purified variables}.
    """
    this, backdoored = scene.this, scene.models["none"]
    chosen = this.options(row) | defenses.get(row).purify.keywords
    targeted, clean = chosen.get("targeted", False), this.splits.clean.take(slice(0, count))
    attack = {
        "classifier": this.classifier,
        "target": chosen["target_label"] if targeted else None,
        "weights": settings.weighted(chosen["ablation"], **{name: chosen[name] for name in (*LAMBDAS, *CONSTANTS)}),
        "perturbation": chosen["pgd"]._replace(aim=chosen["target_label"]),
        "batch_size": chosen["batch_size"],
    }
    # with the key that the purification itself had
    attack["perturbation"], _ = sufficient(this.splits.clean, backdoored, keys.stream(this.key, "purify"), **attack)
    found, given = {}, (this.classifier, scene.models["clean"], backdoored)
    for when, current in (("start", backdoored), ("end", last)):
        key = keys.stream(this.key, "theory/adversarial")
        images, _ = attack_images(clean.images, clean.labels, current, backdoored, key, **attack)
        aims = scene.attack.aim(clean.labels)
        found[when] = complete_unlearning.adversarial_rates(*given, images, clean.labels, aims, targeted=targeted)._asdict()
    return found


def _defaults(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"there is no {path}: run this in the repository's root, or name the file by --defaults")
    try:
        return runpy.run_path(str(path))["get_config"]().to_dict()
    except Exception as error:  # anything can go wrong in a file of the user's
        raise UserError(f"{path} is no config: {type(error).__name__}: {error}") from error


def _refuse_lost(out: Path, states: Path | None, folders: list[Path]) -> None:
    """Raises `UserError` where results could not be written, or one run's would take the place of another's."""
    for name, place in (("out", out), ("states", states)):
        if place and place.exists() and not place.is_dir():
            raise UserError(f"--{name}={place} is not a folder")
    names = [folder.absolute().name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two runs are called {twice[0]}, and so would their records be; measure them into two folders")
    for folder, name in zip(folders, names, strict=True):
        if (path := out / f"{name}.json").exists():
            seed, before = read_config(folder).get("seed"), records.read_study(path).found
            if before.get("seed") != seed:
                raise UserError(f"{path} is of another run (seed {before.get('seed')}, not {seed}); choose another --out")


def main(arguments=None) -> None:
    """The command line."""
    from bibau_jax.cli import fail

    parser = argparse.ArgumentParser(prog="python -m bibau_jax.theory.measure", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, each with a clean twin")
    parser.add_argument("--out", type=Path, required=True, help="folder for one record a run")
    parser.add_argument("--states", type=Path, default=None, help="run purifications again and keep their states here")
    parser.add_argument("--defenses", default="ft,base_at,bibau_u,ibu", help="comma-separated")
    parser.add_argument("--images", type=int, default=500, help="of each kind, for gradients and drifts")
    parser.add_argument("--tangents", type=int, default=40, help="of each kind, for tangent kernels")
    parser.add_argument("--defaults", type=Path, default=Path("configs/base.py"), help="settings that older runs lack")
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "bibau_jax.theory.measure", *(sys.argv[1:] if arguments is None else arguments)])
    rows = [row.strip() for row in given.defenses.split(",")]
    sizes = {"images": given.images, "tangents": given.tangents}
    parallel.keep_compiled()
    try:
        defaults = _defaults(given.defaults)
        configs = {folder: completed(read_config(folder), defaults) for folder in given.runs}
        _refuse_lost(given.out, given.states, list(configs))
        parallel.use_cores(*(size for config in configs.values() for size in batch_sizes(config)))
        runs, states = [Run(config, folder.absolute()) for folder, config in configs.items()], given.states
        for run in runs:
            check(run, rows, states, **sizes)
        for run in runs:
            found = of_run(run, rows, states and states.absolute(), **sizes)
            path = given.out / f"{run.folder.name}.json"
            if parallel.is_lead():
                records.write_study(path, "unlearning", command, sizes | {"defenses": rows}, found)
                print(path)
    except (UserError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
