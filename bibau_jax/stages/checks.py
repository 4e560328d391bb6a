"""The checks of `reactivate`: what each attacker holds, and what is measured of one model."""

import dataclasses
import shutil
from functools import cached_property

import jax
import numpy as np

from bibau_jax import checkpoint, keys, parallel, progress, records, train
from bibau_jax.attacks import Attack
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.metrics import bec, rates
from bibau_jax.reactivation import query, retuning, universal
from bibau_jax.run import Run, attack_as_trained, load_model, write_arrays
from bibau_jax.theory import orthogonality, path

BEC_IMAGES = 500  # triggered images that CKA compares, as in the authors' code


@dataclasses.dataclass(frozen=True)
class Scene:
    """What all checks of a run share: the attack, the test images (plain, stamped, wanted classes) and every model by row."""

    this: Run
    attack: Attack
    test: ImageSet
    triggered: np.ndarray
    aims: np.ndarray
    models: dict[str, dict]
    digests: dict[str, str]
    room: str = "reactivate"  # the part of the run's folder that work is kept in

    @property
    def shown(self) -> dict[str, np.ndarray]:
        """The test images with and without the trigger, each of which may be perturbed."""
        return {"triggered": self.triggered, "clean": self.test.images}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the test images under the trigger, and what it is to lead them to."""
        return checkpoint.digest({"triggered": self.triggered, "aims": self.aims, "labels": self.test.labels})

    @property
    def counted(self) -> dict[str, int]:
        """How many triggered test images a rate of success is over, as the record tells it."""
        return {"reactivation_images": int(np.sum(self.aims != self.test.labels))}

    @cached_property
    def pairs_for_bec(self) -> tuple[np.ndarray, np.ndarray]:
        """Attackable test images without and with the trigger."""
        chosen = np.flatnonzero(self.aims != self.test.labels)[:BEC_IMAGES]
        return self.test.images[chosen], self.triggered[chosen]

    @cached_property
    def bec_reference(self) -> bec.Reference:
        section = self.this.config["reactivate"]["bec"]
        ends, shape = (self.models["none"], self.models["clean"]), {name: section[name] for name in ("share", "layers")}
        return bec.reference(self.this.classifier, *ends, *self.pairs_for_bec, **shape)


def scene_of(this: Run, stages: dict[str, str]) -> Scene:
    attack, _ = attack_as_trained(this)
    return staged(this, attack, this.measured.take(tested(this)), stages)


def tested(this: Run) -> np.ndarray:
    """The positions of the test images that the checks count on, rising."""
    count, size = this.config["reactivate"]["test_size"], len(this.measured)
    if not count or count >= size:
        return np.arange(size)
    order = np.asarray(jax.random.permutation(keys.stream(this.key, "reactivate/test"), size))
    return np.sort(order[:count])


def check_tested(this: Run, attack: Attack, least: int) -> None:
    """Raises `UserError` where fewer than `least` of those images are of another class than the attacker wants for them."""
    labels = this.measured.labels[tested(this)]
    count = int(np.sum(attack.aim(labels) != labels))
    if count < least:
        raise UserError(f"the checks need {least} images that can be attacked, and {count} of {len(labels)} are; see test_size")


def staged(this: Run, attack: Attack, test: ImageSet, stages: dict[str, str], **where) -> Scene:
    """The scene of an attack on these images and the models of these stages, by row; `where` its `room`."""
    loaded = {row: load_model(this, stage) for row, stage in stages.items()}
    models = {row: variables for row, (variables, _, _) in loaded.items()}
    digests = {row: info["sha256"] for row, (_, _, info) in loaded.items()}
    return Scene(this, attack, test, attack.stamp(test.images, test.ids), attack.aim(test.labels), models, digests, **where)


def only_of(scene: Scene, row: str) -> None:
    """Drops what was left of attacks on another model of this row, or with another trigger: nothing goes on from there."""
    place = scene.this.folder / scene.room / row
    mark, digest = place / "made_of", f"{scene.digests.get(row, '')} {scene.digest}"
    if parallel.is_lead() and not (mark.exists() and mark.read_text() == digest):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        records.write_text(mark, digest)
    parallel.wait("only of this model")


def _success(scene: Scene, variables, images: np.ndarray) -> float:
    """The share of test images, the target class's own left out, that a model takes for the attacker's class; percent."""
    found = train.predict(scene.this.classifier, variables, images)
    return records.Rate(*rates.attack_success_rate(found, scene.test.labels, scene.aims)).percent


def _accuracy(scene: Scene, variables) -> float:
    found = train.predict(scene.this.classifier, variables, scene.test.images)
    return records.Rate(*rates.clean_accuracy(found, scene.test.labels)).percent


def _journal(scene: Scene, row: str, check: str) -> train.Journal:
    return scene.this.journal(f"{scene.room}/{row}/{check}")


# --- what the attacker holds


def drawn(this: Run, name: str, number: int = 0) -> np.ndarray:
    """The training images in the order in which the attacker's are taken for one purpose, int [N]."""
    return np.asarray(jax.random.permutation(keys.stream(this.key, name, number), len(this.splits.train)))


def attackable(attack: Attack, images: ImageSet, order: np.ndarray) -> np.ndarray:
    """The positions of `order` whose class is not the one that the attacker wants for them."""
    labels = images.labels[order]
    return order[attack.aim(labels) != labels]


def stamped(attack: Attack, images: ImageSet, labels: np.ndarray) -> ImageSet:
    """The images as the attack shows them at test, under these labels."""
    return ImageSet(attack.stamp(images.images, images.ids), labels.astype(np.int32), images.ids)


def for_retuning(this: Run, attack: Attack, number: int) -> tuple[ImageSet, ImageSet]:
    """The benign and the poisoned images of one retuning; together `retuning.images`, or a whole number of batches less."""
    images, (count, total) = this.splits.train, retuning_sizes(this, attack.name)
    order = drawn(this, "retuning", number)
    chosen = attackable(attack, images, order)[:count]
    poisoned = images.take(chosen)
    benign = images.take(order[~np.isin(order, chosen)][: total - count])
    return benign, stamped(attack, poisoned, attack.aim(poisoned.labels))


def retuning_sizes(this: Run, attack: str) -> tuple[int, int]:
    """How many of how many images are poisoned in a retuning."""
    section, size = this.config["reactivate"]["retuning"], len(this.splits.train)
    batch = min(section["batch_size"], section["images"], size)
    parallel.check_batch(batch, f"reactivate.retuning.batch_size (of {min(section['images'], size)} images)")
    total = min(section["images"], size) // batch * batch
    count = section["poisoned"] or retuning.poisoned_count(attack, this.config["data"]["name"])
    if total <= count:
        raise UserError(f"retuning with {count} poisoned images needs more than {total} images in all")
    return count, total


def pairs(this: Run, attack: Attack, count: int) -> tuple[ImageSet, ImageSet]:
    """`count` clean images and as many others, all attackable, that the trigger goes on; fewer where there are not so many."""
    images, order = this.splits.train, drawn(this, "query")
    count = min(count, len(images) // 2)
    return images.take(order[:count]), images.take(attackable(attack, images, order[count:])[:count])


def aimed_pairs(scene: Scene, count: int) -> tuple[ImageSet, ImageSet]:
    """The same `pairs`, the triggered ones under the attacker's labels."""
    clean, others = pairs(scene.this, scene.attack, count)
    return clean, stamped(scene.attack, others, scene.attack.aim(others.labels))


def test_pairs(scene: Scene, count: int) -> tuple[ImageSet, ImageSet]:
    """Clean test images with true labels, and others with the trigger under the attacker's; as many of each, `count` at most.

    Gradients of a network on images that it was trained on are small and point elsewhere.
    """
    chosen = np.flatnonzero(scene.aims != scene.test.labels)
    count = min(count, len(chosen) // 2, len(scene.test) // 2)
    hit = chosen[-count:]
    rest = np.setdiff1d(np.arange(len(scene.test)), hit)[:count]
    return scene.test.take(rest), ImageSet(scene.triggered[hit], scene.aims[hit].astype(np.int32), scene.test.ids[hit])


# --- the checks


def retuning_attack(scene: Scene, row: str) -> dict:
    """R-ASR and clean accuracy after fine-tuning with a few poisoned images, mean over several draws of them."""
    section, hit, kept = dict(scene.this.config["reactivate"]["retuning"]), [], []
    for number in range(section["repeats"]):
        variables = _retune(scene, row, number)
        hit.append(_success(scene, variables, scene.triggered))
        kept.append(_accuracy(scene, variables))
    for number in range(1, section["repeats"]):  # the first one is the query attack's teacher
        shutil.rmtree(scene.this.folder / _journal(scene, row, f"retuned_{number}").stage, ignore_errors=True)
    found = {"r_asr": float(np.mean(hit)), "r_ca": float(np.mean(kept)), "r_asr_each": hit}
    poisoned, _ = retuning_sizes(scene.this, scene.attack.name)
    return found | {"r_poisoned": poisoned} | scene.counted


def _retune(scene: Scene, row: str, number: int):
    """The model after one retuning, from disk where it was done before."""
    section = dict(scene.this.config["reactivate"]["retuning"])
    journal = _journal(scene, row, f"retuned_{number}")
    place = scene.this.folder / journal.stage / "model"
    if not place.exists():
        benign, poisoned = for_retuning(scene.this, scene.attack, number)
        variables, _ = retuning.retune(
            keys.stream(scene.this.key, "retune", number),
            scene.this.classifier,
            scene.models[row],
            benign,
            poisoned,
            **{name: section[name] for name in ("epochs", "batch_size", "learning_rate", "momentum")},
            **{name: scene.this.config["data"][name] for name in ("padding", "flip")},
            journal=journal,
        )
        checkpoint.save(place, {"variables": variables}, {})
        journal.keeper.clear()
    return checkpoint.load(place)[0]["variables"]


def query_attack(scene: Scene, row: str) -> dict:
    """Q-ASR, and beside it how the same perturbations fare without trigger and on a clean model."""
    section = dict(scene.this.config["reactivate"]["query"])
    clean, others = pairs(scene.this, scene.attack, section.pop("images"))
    # Who only queries cannot retune the model either: he has the backdoored one that he gave away.
    by_queries = section["gradient"] == "queries"
    teacher = scene.models["none"] if by_queries else _retune(scene, row, 0)
    reference = scene.models["ibu" if row == "clean" else "clean"]  # for the twin itself another one
    journal = _journal(scene, row, "query")
    params, _, asked = query.learn(
        keys.stream(scene.this.key, "query"),
        scene.this.classifier,
        query.Models(scene.models[row], teacher, reference),
        clean,
        stamped(scene.attack, others, others.labels),
        journal=journal,
        **section,
    )
    shape = {"epsilon": section["epsilon"], "hidden": section["hidden"]}
    moved = {kind: query.apply(params, images, **shape) for kind, images in scene.shown.items()}
    journal.keeper.clear()
    found = {
        "q_asr": _success(scene, scene.models[row], moved["triggered"]),
        "q_clean": _success(scene, scene.models[row], moved["clean"]),
        "q_twin": _success(scene, reference, moved["triggered"]),
        "q_twin_clean": _success(scene, reference, moved["clean"]),
    }
    return found | scene.counted | ({"q_queries": asked} if by_queries else {})


def universal_attack(scene: Scene, row: str) -> dict:
    """U-ASR: one perturbation on top of the trigger, with gradients; beside it the same one on clean images."""
    section = dict(scene.this.config["reactivate"]["universal"])
    _, told = aimed_pairs(scene, section.pop("images"))
    key, journal = keys.stream(scene.this.key, "universal"), _journal(scene, row, "universal")
    given = (scene.this.classifier, scene.models[row], told.images, told.labels)
    delta, _ = universal.white_box(key, *given, journal=journal, **section)
    journal.keeper.clear()
    return {f"u_{kind}": value for kind, value in _added(scene, row, delta).items()}


def square_attack(scene: Scene, row: str) -> dict:
    """S-ASR: the same by Square Attack, which only asks for outputs."""
    section = dict(scene.this.config["reactivate"]["square"])
    _, told = aimed_pairs(scene, section.pop("images"))
    given = (scene.this.classifier, scene.models[row], told.images, told.labels)
    label = f"reactivate/{row}/square" if parallel.is_lead() else ""
    delta, asked = universal.square(keys.stream(scene.this.key, "square"), *given, label=label, **section)
    return {f"s_{kind}": value for kind, value in _added(scene, row, delta).items()} | {"s_queries": asked * len(told)}


def _added(scene: Scene, row: str, delta: np.ndarray) -> dict[str, float]:
    moved = {kind: universal.added(images, delta) for kind, images in scene.shown.items()}
    hit = {kind: _success(scene, scene.models[row], images) for kind, images in moved.items()}
    return {"asr": hit["triggered"], "clean": hit["clean"]}


def backdoor_existence(scene: Scene, row: str) -> dict:
    """BEC with its layers, and the CKA behind it."""
    section = scene.this.config["reactivate"]["bec"]
    found = bec.existence(scene.this.classifier, scene.bec_reference, scene.models[row], scene.pairs_for_bec[1])
    values = {"bec": found.value, "bec_layers": found.layers, "bec_similarity": found.similarity}
    return values | {"bec_squashed": bec.squashed(found.value, section["steepness"], section["centre"])}


def gradient_angles(scene: Scene, row: str) -> dict:
    """The angle between the gradients of the clean and the backdoor task."""
    clean, told = test_pairs(scene, scene.this.config["reactivate"]["orthogonality"]["images"])
    absolute, signed = orthogonality.orthogonality(scene.this.classifier, scene.models[row], clean, told)
    return {"orthogonality": absolute, "orthogonality_signed": signed}


def straightness(scene: Scene, row: str) -> dict:
    """How straight the target's logit answers its channels, beside random channels."""
    clean, told = test_pairs(scene, scene.this.config["reactivate"]["linearity"]["images"])
    given = (scene.this.classifier, scene.models[row], clean.images, told.images, told.labels)
    found = orthogonality.linearity(keys.stream(scene.this.key, "linearity"), *given)
    means = np.nanmean(list(found.values()), axis=0)
    layers = {name: list(pair) for name, pair in found.items()}
    return {"linearity": float(means[0]), "linearity_random": float(means[1]), "linearity_layers": layers}


def weight_path(scene: Scene, row: str) -> dict:
    """ASR and clean accuracy on the straight line from this model to the backdoored one, with and without new statistics."""
    shares = np.linspace(0, 1, scene.this.config["reactivate"]["path"]["points"])
    found = {"path": shares.tolist(), "path_asr": [], "path_ca": [], "path_asr_recalibrated": []}
    with progress.bar(len(shares), f"reactivate/{row}/path", unit="point", show=parallel.is_lead()) as bar:
        for share in shares:
            variables = path.between(scene.models[row], scene.models["none"], float(share))
            found["path_asr"].append(_success(scene, variables, scene.triggered))
            found["path_ca"].append(_accuracy(scene, variables))
            fresh = path.recalibrated(scene.this.classifier, variables, scene.this.splits.clean.images)
            found["path_asr_recalibrated"].append(_success(scene, fresh, scene.triggered))
            bar.advance()
    return found


def features(scene: Scene, row: str) -> dict:
    """Saves what the network makes of some images, clean ones, the target's and triggered ones: <row>/features.npz."""
    count = scene.this.config["reactivate"]["features"]["images"]
    ours = np.flatnonzero(scene.aims != scene.test.labels)
    target = np.flatnonzero(scene.aims == scene.test.labels)  # none in all-to-all: every class is another's target
    kinds = {
        "clean": scene.test.images[ours[:count]],
        "target": scene.test.images[target[: max(1, count // 3)]],
        "triggered": scene.triggered[ours[:count]],
    }
    kinds = {kind: images for kind, images in kinds.items() if len(images)}
    saved = {kind: train.features(scene.this.classifier, scene.models[row], images) for kind, images in kinds.items()}
    write_arrays(scene.this.folder / "reactivate" / row / "features.npz", saved | {"labels": scene.test.labels[ours[:count]]})
    return {"features_images": sum(map(len, saved.values()))}
