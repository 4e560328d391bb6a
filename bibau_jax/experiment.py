"""The stages in order: implant, purify, evaluate, report. The only reader of the config; each stage leaves its work on disk.

A stage takes what the one before it left in the run's folder, is skipped when its work is there, and goes on from its last
checkpoint when it was cut off.
"""

import dataclasses
import inspect
import re
import shlex
import shutil
import sys
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np

from bibau_jax import attacks, checkpoint, data, defenses, keys, models, parallel, preflight, progress, records, train, workdir
from bibau_jax.data import splits
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.bibau import Perturbation
from bibau_jax.errors import UserError
from bibau_jax.metrics import cost, rates
from bibau_jax.report import html, tables

HARDLY = 50.0  # percent of ASR below which a backdoored model is not worth a defence
STAGES = ("implant", "purify", "evaluate", "report")
# What the models are called in the record; other defences keep their own names, and the main one's model is "purified".
MODELS = {"none": "backdoored", "clean": "clean", "ft": "finetuned"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its config, its folder, and what follows from them, made when first asked for."""

    config: dict
    folder: Path

    @property
    def key(self) -> jax.Array:
        return keys.root(self.config["seed"])

    @cached_property
    def dataset(self) -> data.Dataset:
        section = self.config["data"]
        progress.say(f"data: {section['name']}", show=parallel.is_lead())
        return data.load(
            section["name"],
            data_dir=section["data_dir"] or None,
            manual_dir=section["manual_dir"] or None,
            download=section["download"],
        )

    @cached_property
    def splits(self) -> splits.Splits:
        sizes = {name: self.config["data"][name] for name in ("train_size", "clean_size", "validation_size")}
        return splits.divide(keys.stream(self.key, "data"), self.dataset.train, **sizes)

    @cached_property
    def classifier(self) -> models.Classifier:
        section = dict(self.config["model"])
        channels = self.dataset.image_shape[2]
        if len(section["mean"]) != channels or len(section["std"]) != channels:
            raise UserError(f"model.mean and model.std need {channels} values, one a channel of {self.dataset.name}")
        return models.build(
            section.pop("name"),
            num_classes=self.dataset.num_classes,
            image_shape=self.dataset.image_shape,
            dtype=parallel.compute_dtype(self.config["compute"]),
            **section,
        )

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
        return {name: value for name, value in given.items() if name in known} | dict(section.get(row, {}))

    def model_folder(self, stage: str) -> Path:
        """Where the finished model of a stage lies: in this run's folder, or in that of the run it is taken from."""
        setting = {"implant": "reuse", "clean": "clean_twin"}.get(stage)
        other = self.config["implant"][setting] if setting else ""
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


def run(config: dict, folder: str, command: str = "") -> records.Record | None:
    """Runs the stages that `config["stages"]` names, in a folder that is claimed for this config; returns the record.

    `config` is a plain nested dict with every field of configs/base.py. What a user can put right raises `UserError`.
    """
    wanted = preflight.stages(config["stages"], STAGES)
    distributed = config["distributed"]
    parallel.connect(distributed["coordinator"], distributed["processes"], distributed["process"])
    config = settled(config)
    this = Run(config, Path(folder).expanduser().absolute())
    preflight.check(this, wanted)
    workdir.claim(folder, config)
    for stage in wanted:
        {"implant": implant, "purify": purify, "evaluate": evaluate, "report": write_report}[stage](this, command)
    path = this.folder / "record.json"
    return records.read(path) if path.exists() else None


def settled(config: dict) -> dict:
    """The config with the attack's own poison ratio where it is left to it (0), so that folder and record tell it."""
    section = config["attack"]
    own = section.get(section["name"], {})
    if section["poison_ratio"] != 0 or own.get("class_share", 0.0):
        return config
    return config | {"attack": section | {"poison_ratio": own.get("poison_ratio", 0.0)}}


# --- implant


def implant(this: Run, command: str) -> None:
    """Trains the backdoored model on the poisoned set, and its clean twin on the same images without poison.

    Neither where it is taken from another run.
    """
    section = this.config["implant"]
    if not section["reuse"]:
        _train_model(this, "implant", command, poisoned=True)
    if section["clean_twin"] == "train":
        _train_model(this, "clean", command, poisoned=False)


def _train_model(this: Run, stage: str, command: str, *, poisoned: bool) -> None:
    folder = this.folder / stage
    if _is_done(this, stage, command):
        return
    attack, split, section = this.attack, this.splits.train, this.config["implant"]
    key = keys.stream(this.key, "implant")  # the twin starts from the same weights and sees the same order
    with cost.measure() as spent:
        control = attack.control if poisoned else None
        shift = {name: this.config["data"][name] for name in ("padding", "flip")}
        prepare, training, extra, learned, before = partial(train.augmented, **shift), split, (), (), []
        if control:
            augment = partial(crop_and_flip, **shift)
            learned, before = _learned(this, control, key, split, augment)
        hand = control if control and control.prepare else None  # in training
        if hand:
            prepare, extra = partial(control.prepare, augment=augment), learned
        if poisoned and not (hand and hand.stamps):  # who stamps every batch anew is given clean images
            training = (control.finish(attack, learned) if control else attack).poison(split)
        told = {"images": training.images, "labels": training.labels}
        if hand and not hand.stamps:
            told |= {"poisoned": training.poisoned, "cover": training.cover}
        batch_size = min(section["batch_size"], len(split))
        schedule = train.learning_rate_schedule(
            section["schedule"], section["learning_rate"], section["epochs"] * (len(split) // batch_size)
        )
        optimizer = train.sgd(schedule, momentum=section["momentum"], weight_decay=section["weight_decay"])
        extra_optimizer = control.optimizer if control else None
        state, history = train.fit(
            partial(
                train.train_step,
                classifier=this.classifier,
                optimizer=optimizer,
                prepare=prepare,
                extra_optimizer=extra_optimizer,
            ),
            train.new_state(this.classifier.init(keys.stream(key, "init")), optimizer, extra, extra_optimizer),
            told,
            key=key,
            epochs=section["epochs"],
            batch_size=section["batch_size"],
            journal=this.journal(stage),
        )
    if hand:
        learned = jax.device_get(state.extra)
    if hand and hand.stamps:
        training = control.finish(attack, learned).poison(split)
    if poisoned:
        told = {"seed": np.int64(this.config["seed"]), "poison_ratio": training.poisoned.mean(), "means": _means(training)}
        _write_arrays(folder / "poison.npz", training.flags() | told)
    _finish(this, stage, {"variables": state.variables, "extra": learned}, [*before, *history], spent, command)


def _learned(this: Run, control: attacks.Control, key, split, augment):
    """What the attack learns before the victim's training, and its history; kept beside it, so that it is learned once."""
    stage, journal = "implant/trigger", this.journal("implant/trigger")
    if not (this.folder / stage / "model").exists():
        extra, history = control.init(keys.stream(key, "trigger"), split, journal, augment)
        checkpoint.save(this.folder / stage / "model", {"extra": extra}, {"history": history})
    shutil.rmtree(journal.keeper.directory, ignore_errors=True)  # those of its parts too
    tree, info = checkpoint.load(this.folder / stage / "model")
    return {"extra": (), **tree}["extra"], info["history"]


def _finish(this: Run, stage: str, tree, history, spent, command: str) -> None:
    """Saves a stage's model with what it cost, then drops its checkpoints and writes the cost into the record."""
    seconds = max(spent.seconds, sum(entry.get("seconds", 0.0) for entry in history))  # a resumed stage spent it in parts
    info = {"seconds": seconds, "cost": dataclasses.asdict(spent) | {"seconds": seconds}}
    checkpoint.save(this.folder / stage / "model", tree, info)
    this.journal(stage).keeper.clear()
    update(this, command, stages={stage: records.StageCost(**info["cost"])})


def _is_done(this: Run, stage: str, command: str) -> bool:
    """Whether the stage's model is there; its cost is written into the record again if a kill came between the two."""
    folder = this.folder / stage / "model"
    if not folder.exists():
        return False
    progress.say(f"{stage}: done", show=parallel.is_lead())
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
    attack = this.attack
    return attack.control.finish(attack, extra) if attack.control else attack, variables


def poisoned_split(this: Run) -> attacks.PoisonedSplit:
    """The training set as it was poisoned for this run's backdoored model, made again from the attack and what it learned.

    Of an attack that stamps every batch anew, a fixed set of the same kind. UserError where flags or images are not those
    saved with the run, of which the mean pixels are kept.
    """
    attack, _ = attack_as_trained(this)
    made, path = attack.poison(this.splits.train), this.model_folder("implant").parent / "poison.npz"
    with np.load(path) as saved:
        same = all(np.array_equal(saved[name], values) for name, values in made.flags().items())
        if not same or np.abs(saved["means"] - _means(made)).max() > 0.1:  # rounding differs between machines
            raise UserError(f"{path} holds another poisoned set than this version of bibau_jax makes of the same settings")
    return made


def _means(split: attacks.PoisonedSplit) -> np.ndarray:
    """The mean pixel of every image, float32 [N]."""
    return split.images.mean((1, 2, 3), dtype=np.float32)


# --- purify


def purify(this: Run, command: str) -> None:
    """Runs the main defence and those beside it, each on the backdoored model and the defender's clean images."""
    variables, _, _ = load_model(this, "implant")
    for row in this.rows:
        stage = f"purify/{row}"
        if _is_done(this, stage, command):
            continue
        with cost.measure() as spent:
            purified = defenses.get(row).purify(
                keys.stream(this.key, "purify"),  # every defence sees the same batches
                this.classifier,
                variables,
                this.splits.clean,
                held_out=this.splits.validation,
                journal=this.journal(stage),
                **this.options(row),
            )
        if purified.samples is not None:
            _write_arrays(this.folder / stage / "samples.npz", purified.samples)
        _finish(this, stage, {"variables": purified.variables}, purified.history, spent, command)


# --- evaluate


def evaluate(this: Run, command: str) -> None:
    """Clean accuracy, attack success rate and robust accuracy of every model there is, on the whole test set."""
    stages = {"none": "implant"} | _finished(this)
    named = {_name(this, row): (_label(this, row), stage) for row, stage in stages.items()}
    path = this.folder / "record.json"
    told = records.read(path).metrics if path.exists() else {}
    same = (
        name in told
        and told[name].defense == label
        and told[name].extra.get("model_sha256") == checkpoint.info(this.model_folder(stage))["sha256"]
        for name, (label, stage) in named.items()
    )
    if all(same) and (this.folder / "strip.npz").exists():
        progress.say("evaluate: done", show=parallel.is_lead())
        return
    attack, _ = attack_as_trained(this)
    test = this.dataset.test
    with cost.measure() as spent:
        triggered, aims = attack.stamp(test.images, test.ids), attack.aim(test.labels)
        metrics, predict = {}, partial(train.predict, this.classifier)
        variables = {}
        with progress.bar(len(named), "evaluate", unit="model", show=parallel.is_lead()) as bar:
            for name, (label, stage) in named.items():
                variables[name], _, info = load_model(this, stage)
                clean, hit = predict(variables[name], test.images), predict(variables[name], triggered)
                metrics[name] = records.Measurement(
                    label,
                    records.Rate(*rates.clean_accuracy(clean, test.labels)),
                    records.Rate(*rates.attack_success_rate(hit, test.labels, aims)),
                    records.Rate(*rates.robust_accuracy(hit, test.labels, aims)),
                    info["seconds"],
                    {"model_sha256": info["sha256"]},
                )
                bar.advance()
        _write_arrays(this.folder / "strip.npz", _strip(this, attack, variables))
    update(this, command, metrics=metrics, stages={"evaluate": records.StageCost(**dataclasses.asdict(spent))})
    if (taken := metrics["backdoored"].asr.percent) < HARDLY:
        more = "more poison (attack.poison_ratio), a stronger trigger or more epochs may help"
        progress.say(f"evaluate: the backdoor hardly took, ASR {taken:.1f} %; {more}", show=parallel.is_lead())


def _finished(this: Run) -> dict[str, str]:
    """The stages beside `implant` whose models can be measured, by row; says which are missing."""
    wanted = {"clean": "clean"} if this.config["implant"]["clean_twin"] != "none" else {}
    wanted |= {row: f"purify/{row}" for row in this.rows}
    found = {row: stage for row, stage in wanted.items() if (this.folder / stage / "model").exists()}
    if this.config["implant"]["clean_twin"] not in ("train", "none"):
        found |= {"clean": "clean"}
    if missing := [stage for row, stage in wanted.items() if row not in found]:
        progress.say(f"evaluate: without {', '.join(missing)}, not done yet", show=parallel.is_lead())
    return found


def _name(this: Run, row: str) -> str:
    return "purified" if row == this.config["defense"]["name"] else MODELS.get(row, row)


def _label(this: Run, row: str) -> str:
    """The row's name in tables: of an ablation, "bibau_u:+A"."""
    ablation = this.config["defense"]["ablation"]
    return f"{row}:{ablation}" if row in ("bibau_t", "bibau_u") and ablation != "+A+B" else row


def _strip(this: Run, attack: attacks.Attack, variables: dict) -> dict:
    """A few of the defender's images, clean, triggered and adversarial, and what the models make of them."""
    samples = [this.folder / "purify" / row / "samples.npz" for row in this.rows]
    samples = next((np.load(path) for path in samples if path.exists()), None)
    clean = this.splits.clean
    if samples is None:
        chosen = clean.take(np.flatnonzero(attack.aim(clean.labels) != clean.labels)[:8])
        kinds = {}
    else:
        chosen = clean.take(samples["rows"])
        kinds = {"adversarial": samples["adversarial"]}
    kinds |= {"clean": chosen.images, "triggered": attack.stamp(chosen.images, chosen.ids)}
    seen = {
        f"{kind}_by_{name}": train.predict(this.classifier, variables[name], images)
        for kind, images in kinds.items()
        for name in ("backdoored", "purified")
        if name in variables
    }
    aims = attack.aim(chosen.labels)
    return kinds | seen | {"labels": chosen.labels, "aims": aims, "class_names": np.array(this.dataset.class_names)}


def _write_arrays(path: Path, arrays: dict) -> None:
    if parallel.is_lead():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
        part.replace(path)
    parallel.wait(path.name)


# --- record and report


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


def write_report(this: Run, command: str) -> None:
    """The page <workdir>/report.html and the closing table on the terminal, from the record alone."""
    path = this.folder / "record.json"
    if not path.exists() or not records.read(path).metrics:
        raise UserError(f'{this.folder} has no measurements yet; run the stage "evaluate" first')
    if parallel.is_lead():
        page = html.write(this.folder)
        tables.show(records.read(path))
        progress.say(f"report: {page}")


def command_line() -> str:
    """The command that started this program, for all stages: run in another folder, it makes the same record."""
    told = " ".join(map(shlex.quote, sys.argv[1:]))
    kept = shlex.split(re.sub(r"(^|\s)--?config\.stages[= ]\S+", "", told))
    return shlex.join(["python", "-m", "bibau_jax.main", *kept])
