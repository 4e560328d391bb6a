"""One run: its config, its folder, and what follows from them; how finished work is told and kept on disk."""

import dataclasses
import inspect
import shutil
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from bibau_jax import attacks, checkpoint, data, defenses, keys, models, npz, parallel, progress, records, train
from bibau_jax.data import own, splits
from bibau_jax.errors import UserError
from bibau_jax.importers.pretrained import begin
from bibau_jax.importers.suspect import Suspect, bring, counted
from bibau_jax.importers.torch_file import sha256
from bibau_jax.method.settings import Perturbation
from bibau_jax.metrics import cost
from bibau_jax.models import own_file

OF_A_FILE = ("weights", "container", "normalisation")  # settings of config.model that are about weights from a file


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its config, its folder, and what follows from them, made when first asked for."""

    config: dict
    folder: Path

    @property
    def key(self) -> jax.Array:
        return keys.root(self.config["seed"])

    @property
    def is_own(self) -> bool:
        """Whether the model comes from a file of weights."""
        return bool(self.config["model"]["weights"])

    @cached_property
    def dataset(self) -> data.Dataset:
        section = self.config["data"]
        if section["folder"]:
            sizes = {"image_size": section["image_size"] or None, "channels": section["channels"] or None}
            mine = own.read(section["folder"], **sizes)
            test = own.read_test(section["test"], mine, **sizes) if section["test"] else mine.images.take(slice(0))
            return data.Dataset("own", mine.images, test, mine.class_names)
        options = section.get(section["name"], {})
        progress.say(f"data: {section['name']}", show=parallel.is_lead())
        return data.load(
            section["name"],
            data_dir=section["data_dir"] or None,
            manual_dir=section["manual_dir"] or None,
            download=section["download"],
            **(options if isinstance(options, dict) else {}),
        )

    @cached_property
    def splits(self) -> splits.Splits:
        section = self.config["data"]
        if section["folder"]:
            if not self._holds_out:
                return splits.Splits(self.dataset.train, self.dataset.train, self.dataset.train.take(slice(0)))
            key, share = keys.stream(self.key, "data"), section["held_out"]
            clean, held_out = splits.divide_own(key, self.dataset.train, held_out_share=share)
            return splits.Splits(clean, clean, held_out)
        sizes = {name: section[name] for name in ("train_size", "clean_size", "validation_size")}
        if section["clean_ratio"]:
            total = section["train_size"] or len(self.dataset.train) - section["validation_size"]
            sizes["clean_size"] = round(section["clean_ratio"] * total)
        return splits.divide(keys.stream(self.key, "data"), self.dataset.train, **sizes)

    @property
    def _holds_out(self) -> bool:
        """Whether some of one's own images are held out: to measure on, to limit a loss by, or to choose thresholds by."""
        measures = self.config["measured_on"] == "validation" or not self.config["data"]["test"]
        return measures or self.config["defense"]["max_loss"] > 0 or any(map(defenses.chooses, self.rows))

    def first_weights(self, key: jax.Array) -> dict:
        """The variables that a training of this run's network begins with."""
        made, section = self.classifier.init(key), self.config["model"]
        if not self.config["implant"]["start"]:
            return made
        return begin(self.config["implant"]["start"], self.classifier, made, name=section["name"], file=section["file"] or "")

    @property
    def measured(self) -> data.ImageSet:
        """The images that models are measured on: the test set, or the held-out images of `splits` for choosing settings."""
        held_out = self.config["measured_on"] == "validation" or not len(self.dataset.test)
        return self.splits.validation if held_out else self.dataset.test

    @property
    def suspect(self) -> Suspect:
        """The model of a stranger's file."""
        return self.brought[0]

    @cached_property
    def brought(self) -> tuple[Suspect, cost.Cost]:
        """The model of a stranger's file, which is read once, and what that cost."""
        with cost.measure() as spent:
            found = self._bring()
        return found, spent

    def _bring(self) -> Suspect:
        section = self.config["model"]
        taken = {name: section[name] or "" for name in ("file", *OF_A_FILE[1:], "mean", "std")} | {"heads": section["heads"]}
        kept = self.folder / "implant" / "model"
        if kept.exists():  # the scale of pixels was chosen then, if the file is the same
            told = checkpoint.info(kept)["told"]
            known = told.get("sha256") == sha256(section["weights"])
            taken["normalisation"] = told["normalisation"] if known else taken["normalisation"]
        found = bring(
            section["weights"],
            self.splits.clean,
            class_names=self.dataset.class_names,
            name="" if section["name"] == "auto" else section["name"],
            dtype=parallel.compute_dtype(self.config["compute"]),
            **taken,
        )
        parts = {"given": self.dataset.train, "clean": self.splits.clean, "held_out": self.splits.validation}
        all_images = {"train": self.dataset.train, "test": self.dataset.test}
        arrays = {f"{name}.{kind}": getattr(part, kind) for name, part in all_images.items() for kind in ("images", "labels")}
        found = found._replace(told=found.told | {"images_sha256": checkpoint.digest(arrays)})
        return counted(found, **{name: len(part) for name, part in (parts | {"measured": self.measured}).items()})

    @cached_property
    def classifier(self) -> models.Classifier:
        if self.is_own:
            return self.suspect.classifier
        section = {name: value for name, value in self.config["model"].items() if value is not None and name not in OF_A_FILE}
        channels = self.dataset.image_shape[2]
        if len(section["mean"]) != channels or len(section["std"]) != channels:
            raise UserError(f"model.mean and model.std need {channels} values, one a channel of {self.dataset.name}")
        name, file = section.pop("name"), section.pop("file", None)
        shape = {"num_classes": self.dataset.num_classes, "image_shape": self.dataset.image_shape}
        given = shape | section | {"dtype": parallel.compute_dtype(self.config["compute"])}
        return own_file.load(file).build(**given) if file else models.build(name, **given)

    @cached_property
    def attack(self) -> attacks.Attack:
        return self.attack_named(self.config["attack"]["name"])

    def attack_named(self, name: str) -> attacks.Attack:
        """An attack with its settings in the config, whether it is the run's own or another."""
        section, options = self.config["attack"], self.config["attack"].get(name, {})
        shared = {option: section[option] for option in ("target_label", "mode")}
        if section["poison_ratio"] != 0:
            options = options | {"poison_ratio": section["poison_ratio"]}
        key = keys.stream(self.key, "attack")
        return attacks.get(name).make(key, num_classes=self.dataset.num_classes, **shared, **options)

    @property
    def rows(self) -> list[str]:
        """The defences to run, the main one first, each once."""
        section = self.config["defense"]
        return list(dict.fromkeys([section["name"], *filter(None, map(str.strip, section["beside"].split(",")))]))

    def options(self, row: str) -> dict:
        """The settings of the config that this defence takes, by name; its own section, where there is one, comes last."""
        section = dict(self.config["defense"])
        known = inspect.signature(defenses.get(row).purify).parameters
        given = section | {name: self.config["data"][name] for name in ("padding", "flip")}
        if row == "base_at":
            given.pop("ablation")  # what makes it Base AT
        given["pgd"] = Perturbation(**section["pgd"])
        if section["target_label"] < 0:
            given["target_label"] = max(self.scanned_class or 0, 0)  # any will do to look at other settings before the scan
            if self.scanned is not None and not self.scanned.max() > self.config["scan"]["limit"]:
                given["pgd"] = given["pgd"]._replace(aimed=0.0)  # no class stands out: to aim costs accuracy and meets nothing
        return {name: value for name, value in given.items() if name in known} | dict(section.get(row, {}))

    @property
    def scanned(self) -> np.ndarray | None:
        """The anomaly index of every class, minus infinity where the scan found no trigger; None before it is done."""
        path = self.folder / "scan" / "triggers.npz"
        return npz.left(path, "index")["index"] if path.exists() else None

    @property
    def scanned_class(self) -> int | None:
        """The class that the scan suspects, -1 where it found no trigger at all; None before it is done."""
        if self.scanned is None:
            return None
        return int(np.argmax(self.scanned)) if np.isfinite(self.scanned).any() else -1

    def model_folder(self, stage: str) -> Path:
        """Where the finished model of a stage lies: in this run's folder, or in that of the run it is taken from."""
        setting = {"implant": "reuse", "clean": "clean_twin"}.get(stage)
        other = self.config["implant"][setting] if setting else ""
        if stage == "implant" and self.config["implant"]["innocent"]:
            stage = "clean"
        folder = Path(other).expanduser().absolute() if other not in ("", "train", "none") else self.folder
        if not (folder / stage / "model").exists():
            raise UserError(f'{folder} has no finished "{stage}" model; run that stage first (--config.stages)')
        return folder / stage / "model"

    def journal(self, stage: str) -> train.Journal:
        """Checkpoints, scalars and progress of one training, which is named after its folder."""
        lead = parallel.is_lead()
        keeper = checkpoint.Keeper(self.folder / stage / "checkpoints", every_steps=self.config["checkpoint_every"])
        scalars = records.Scalars(self.folder / "metrics.jsonl", tensorboard=self.config["tensorboard"], lead=lead)
        return train.Journal(stage, keeper, scalars, show=lead)


def batch_sizes(config: dict) -> list[int]:
    """The batch sizes of the trainings that the config asks for, for the devices to share out."""
    named = [config["defense"]["name"], *map(str.strip, config["defense"]["beside"].split(","))]
    own = [section.get("batch_size", 0) for name in named if isinstance(section := config["defense"].get(name), dict)]
    most = config["data"]["clean_size"]
    return [config["implant"]["batch_size"], *(min(size, most) for size in (config["defense"]["batch_size"], *own) if size)]


def finish(this: Run, stage: str, tree, history, spent, command: str, told: dict | None = None) -> None:
    """Saves a stage's model with what it cost and `told` of itself, drops its checkpoints, writes the cost into the record."""
    seconds = max(spent.seconds, sum(entry.get("seconds", 0.0) for entry in history))  # a resumed stage spent it in parts
    info = {"seconds": seconds, "cost": dataclasses.asdict(spent) | {"seconds": seconds}, "told": told or {}}
    checkpoint.save(this.folder / stage / "model", tree, info)
    if parallel.is_lead():
        shutil.rmtree(this.journal(stage).keeper.directory, ignore_errors=True)  # those of its parts too
    update(this, command, stages={stage: records.StageCost(**info["cost"])})


def is_done(this: Run, stage: str, command: str, called: str = "") -> bool:
    """Whether the stage's model is there, which is said; its cost is written into the record again if a kill came between."""
    folder = this.folder / stage / "model"
    if not folder.exists():
        return False
    progress.say(f"{called or stage}: done", show=parallel.is_lead())
    path = this.folder / "record.json"
    if not path.exists() or stage not in records.read(path).stages:
        update(this, command, stages={stage: records.StageCost(**checkpoint.info(folder)["cost"])})
    return True


def load_model(this: Run, stage: str) -> tuple[dict, object, dict]:
    """(variables, the attack's own parameters, info) of a finished stage."""
    like = jax.eval_shape(this.classifier.init, jax.random.key(0))
    tree, info = checkpoint.load(this.model_folder(stage))
    tree = {"extra": (), **tree}
    shapes = [[(str(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(t)] for t in (tree["variables"], like)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{this.model_folder(stage)} does not hold this network's parameters")
    return tree["variables"], tree["extra"], info


def attack_as_trained(this: Run) -> tuple[attacks.Attack, dict]:
    """The attack with what it learned while implanting, and the backdoored model's variables."""
    variables, extra, _ = load_model(this, "implant")
    if this.config["implant"]["innocent"]:  # the twin knows nothing of the trigger, which the other run has
        theirs = Path(this.config["implant"]["reuse"]).expanduser() / "implant" / "model"
        extra = {"extra": (), **checkpoint.load(theirs)[0]}["extra"]
    attack = this.attack
    return attack.control.finish(attack, extra) if attack.control else attack, variables


def write_arrays(path: Path, arrays: dict) -> None:
    if parallel.is_lead():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
        part.replace(path)
    parallel.wait(path.name)


def measured_so_far(this: Run) -> dict[str, records.Measurement]:
    """What the run's record says of its models; {} before it is written."""
    path = this.folder / "record.json"
    return records.read(path).metrics if path.exists() else {}


def update(this: Run, command: str, *, stages: dict | None = None, metrics: dict | None = None) -> None:
    """Adds what a stage measured to <workdir>/record.json."""
    path = this.folder / "record.json"
    if parallel.is_lead():
        if path.exists():
            record = records.read(path)
        else:
            record = records.Record(this.config, this.config["seed"], command, records.versions(), records.device(), {}, {})
        record = dataclasses.replace(
            record,
            config=this.config,
            command=command,
            stages=record.stages | (stages or {}),
            metrics=record.metrics | (metrics or {}),
        )
        records.write(path, record)
    parallel.wait("record")
