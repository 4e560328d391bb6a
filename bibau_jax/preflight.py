"""Everything that can be wrong with the settings of a run, found before anything is written or computed."""

import math
from pathlib import Path

import numpy as np

from bibau_jax import attacks, defenses, models, parallel, records, train, workdir
from bibau_jax.errors import UserError
from bibau_jax.models import own_file
from bibau_jax.run import Run
from bibau_jax.stages import export, reactivate, scan, verify

# The parts of the config that decide the backdoored model and its clean twin: what a model may be shared between runs by.
IMPLANT_PARTS = (
    "seed",
    "compute",
    "data.name",
    "data.train_size",
    "data.validation_size",
    "data.padding",
    "data.flip",
    "model",
)


def stages(listed: str, known: tuple[str, ...]) -> list[str]:
    """The stages named in "purify,implant", in the order of those known; none, or an unknown one, raises `UserError`."""
    wanted = [stage.strip() for stage in listed.split(",") if stage.strip()]
    for stage in wanted:
        if stage not in known:
            raise UserError(f'unknown stage "{stage}"; known: {", ".join(known)}')
    if not wanted:
        raise UserError(f"which stages? set --config.stages to some of {', '.join(known)}")
    return [stage for stage in known if stage in wanted]


def check(run: Run, wanted: list[str]) -> None:
    """Raises `UserError` on the first setting that the stages in `wanted` cannot be run with."""
    config = run.config
    _numbers(config)
    if (run.folder / "record.json").exists():
        records.read(run.folder / "record.json")  # a damaged one would lose what is measured from here on
    if not set(wanted) - {"report"}:
        if not (run.folder / "record.json").exists():
            raise UserError(f"{run.folder} holds no record: nothing was measured there yet")
        return
    if not run.is_own:
        _network(config["model"])
    attacks.get(config["attack"]["name"])
    for row in run.rows:
        defenses.get(row)
    _own(run, wanted)
    if defenses.is_ideal(config["defense"]["name"]):
        name = config["defense"]["name"]
        raise UserError(f"defense.name={name} sees the trigger and is no defence; it goes to defense.beside")
    for section in ("implant", "defense"):
        training(section, config[section])
    if config["checkpoint_every"] < 1 or config["data"]["padding"] < 0:
        raise UserError("checkpoint_every must be at least 1, data.padding at least 0")
    if config["defense"]["cutout"] < 0:
        raise UserError("defense.cutout must not be negative")
    if config["defense"]["max_seconds"] < 0 or config["data"]["clean_ratio"] < 0:
        raise UserError("defense.max_seconds and data.clean_ratio must not be negative; 0 sets no limit, and takes clean_size")
    if config["measured_on"] not in ("test", "validation"):
        raise UserError(f'measured_on "{config["measured_on"]}" is unknown; choose test or validation')
    if config["measured_on"] == "validation" and config["data"]["validation_size"] == 0:
        raise UserError("measured_on=validation needs data.validation_size above 0")
    # From here on the data set is read, which is where the classes and the sizes are.
    classifier = run.classifier
    missing = np.setdiff1d(np.arange(classifier.num_classes), run.splits.clean.labels)
    if len(missing):
        raise UserError(f"the defender's clean images have none of class {missing[0]}, which every defence would forget")
    for row in run.rows:
        module, options = defenses.get(row), run.options(row)
        _own_settings(row, config["defense"].get(row, {}))
        if hasattr(module, "check"):
            module.check(classifier.num_classes, **options)
        if hasattr(module, "check_network") and row == config["defense"]["name"]:
            module.check_network(classifier)  # one that runs beside it is left out, and said so
        if "batch_size" in config["defense"].get(row, {}):
            taken = min(options["batch_size"], len(run.splits.clean))
            parallel.check_batch(taken, f"defense.{row}.batch_size (of {len(run.splits.clean)} images)")
    if {"implant", "evaluate", "reactivate"} & set(wanted):
        _attack(run)
    for section, images in (("implant", run.splits.train), ("defense", run.splits.clean)):
        taken = min(config[section]["batch_size"], len(images))  # a batch is at most the whole set
        parallel.check_batch(taken, f"{section}.batch_size (of {len(images)} images)")
    if "reactivate" in wanted:
        reactivate.check(run, config["attack"]["name"])
    if "scan" in wanted or "verify" in wanted:
        scan.check(config["scan"])
    if "verify" in wanted:
        verify.check(run)
    if "export" in wanted:
        export.check(run)
    if config["implant"]["innocent"] and not config["implant"]["reuse"]:
        raise UserError("implant.innocent takes the clean twin of another run; name it by implant.reuse")
    if "implant" in wanted and config["implant"]["start"] and not config["implant"]["reuse"]:
        run.first_weights(run.key)
    if config["implant"]["reuse"]:
        _same_model(run, "reuse", "implant", (*IMPLANT_PARTS, "attack", "implant"))
    if config["implant"]["clean_twin"] not in ("train", "none"):
        _same_model(run, "clean_twin", "clean", (*IMPLANT_PARTS, "implant"))


def _own_settings(row: str, section: dict) -> None:
    """Refuses what no training of a defence with settings of its own can use, whichever it is."""
    for name, value in section.items():
        if (name == "batch_size" or name.endswith("epochs")) and value < 1:
            raise UserError(f"defense.{row}.{name} must be at least 1, got {value}")
        if name.endswith("rate") and value <= 0:
            raise UserError(f"defense.{row}.{name} must be positive, got {value}")
        negative = (name == "weight_decay" or name.startswith("lambda_")) and value < 0
        if (name == "momentum" and not 0 <= value < 1) or negative:
            raise UserError(f"defense.{row}.{name} must not be negative{', and below 1' * (name == 'momentum')}, got {value}")


def _network(section: dict) -> None:
    """Refuses a network that is not known, a file that defines none, and lists that are not of numbers."""
    if section["file"]:
        own_file.load(section["file"])
    else:
        models.check(section["name"])
    for name, kind in {"stages": int, "mean": (int, float), "std": (int, float)}.items():
        listed = section[name]
        if listed is not None and (not listed or not all(isinstance(value, kind) for value in listed)):
            raise UserError(f"model.{name} takes {'whole ' * (kind is int)}numbers, not {listed}")


def _own(run: Run, wanted: list[str]) -> None:
    """What goes together with a stranger's model, and what does not."""
    if not run.is_own:
        if lost := [stage for stage in wanted if stage in ("import", "verify", "export")]:
            raise UserError(f'the stage "{lost[0]}" is about a model from a file: name it by --config.model.weights')
        if run.config["data"]["folder"]:
            raise UserError("data.folder holds a defender's few images, and needs a model to purify (--config.model.weights)")
        return
    if lost := [stage for stage in wanted if stage in ("evaluate", "reactivate")]:
        raise UserError(f'the stage "{lost[0]}" is about an attack that was implanted here; a model from a file has "verify"')
    sizes = ("width", "stages", "hidden", "patch", "size", "projection")
    if told := [name for name in sizes if run.config["model"][name] is not None]:
        raise UserError(f"model.{told[0]} is told by the file of weights: leave it open")
    if run.config["model"]["file"] and run.config["model"]["heads"]:
        raise UserError("model.heads is for networks that are known here; those of model.file stand in that file")
    after = [stage for stage in wanted if stage in ("verify", "export")]
    if after and "purify" not in wanted and not (run.folder / "purify").exists():
        raise UserError(f'the stage "{after[0]}" comes after purify, and nothing is purified yet')
    if run.config["data"]["name"] == "own" and not run.config["data"]["folder"]:
        raise UserError("which images? set --config.data.folder to labelled clean ones, a folder a class, or an .npz file")
    if (images := Path(run.config["data"]["folder"]).expanduser().absolute()).is_dir() and run.folder.is_relative_to(images):
        raise UserError(f"{run.folder} lies among the images of data.folder; choose another --workdir")
    if informed := [row for row in run.rows if defenses.is_ideal(row) or defenses.is_informed(row)]:
        raise UserError(f"{informed[0]} sees the trigger or poisoned images, which nobody has of a stranger's model")
    if run.config["implant"]["reuse"] or run.config["implant"]["clean_twin"] != "none":
        raise UserError("a stranger's model has no run to reuse and no clean twin: set implant.reuse='' and clean_twin=none")
    if run.config["defense"]["max_loss"] < 0 or not 0 < run.config["data"]["held_out"] < 1:
        raise UserError("defense.max_loss must not be negative, data.held_out must lie between 0 and 1")


def _numbers(config: dict) -> None:
    """Refuses numbers that are not finite, other things among numbers, and seeds that no key can be made of."""
    for name, value in workdir.flat(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}; it must be a finite number")
        if name.startswith("defense.") and isinstance(value, list):
            if not all(isinstance(one, int | float) and math.isfinite(one) for one in value):
                raise UserError(f"{name} is {value}; it must hold finite numbers")
    if not 0 <= config["seed"] < 2**31:
        raise UserError(f"seed {config['seed']} is outside 0..{2**31 - 1}")


def training(name: str, section: dict) -> None:
    """What every training needs, whatever it trains."""
    parallel.check_batch(section["batch_size"], f"{name}.batch_size")
    if section["epochs"] < 1 or section["batch_size"] < 1:
        raise UserError(f"{name}.epochs and {name}.batch_size must be at least 1")
    if section["learning_rate"] <= 0:
        raise UserError(f"{name}.learning_rate must be positive")
    if not 0 <= section["momentum"] < 1 or section["weight_decay"] < 0:
        raise UserError(f"{name}.momentum must lie in 0..1 (below 1), {name}.weight_decay must not be negative")
    train.learning_rate_schedule(section["schedule"], 1.0, 1)


def _attack(run: Run) -> None:
    """The poison ratio, and the trigger on one image."""
    images, ratio = run.splits.train, run.config["attack"]["poison_ratio"]
    first, options = images.take(slice(8)), run.config["attack"].get(run.config["attack"]["name"], {})
    candidates = np.flatnonzero(run.attack.may_poison(images.labels))
    ratio = len(attacks.protocol.choose(run.key, candidates, ratio, len(images), options.get("class_share", 0.0))) / len(images)
    attacks.protocol.check_pixels(first.images)
    if run.attack.control:
        run.attack.control.check(images)
    if not (run.attack.control and run.attack.control.trains_trigger):
        if (run.attack.stamp(first.images, first.ids) == first.images).all():
            raise UserError(f"the trigger of {run.attack.name} changes no pixel of the first images")
    covers = options.get("covers_per_poison", options.get("cross_per_poison", 0.0))
    attacks.protocol.poisons_and_covers(run.key, len(images), ratio, covers)


def _same_model(run: Run, setting: str, stage: str, parts: tuple[str, ...]) -> None:
    """Refuses a model of another run that was trained with other settings, or is not finished."""
    other = run.config["implant"][setting]
    theirs = workdir.read_config(Path(other).expanduser())
    parts = (*parts, f"data.{run.config['data']['name']}")
    mine, theirs = map(workdir.told_apart_by, (run.config, theirs))
    chosen = [{name: value for name, value in workdir.flat(c).items() if _among(name, parts)} for c in (theirs, mine)]
    changed = workdir.differences(*chosen, ignore=("implant.reuse", "implant.clean_twin", "implant.innocent"))
    if changed:
        raise UserError(f"implant.{setting}={other} was trained with other settings ({'; '.join(changed)})")
    run.model_folder(stage)


def _among(name: str, parts) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
