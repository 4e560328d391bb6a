"""Writes tests/goldens anew from the code as it is: `python -m tests.regenerate`; look at what changed before keeping it."""

import atexit
import inspect
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bibau_jax import attacks, defenses, keys, models, parallel, train
from bibau_jax.attacks import iad, issba
from bibau_jax.data import ImageSet
from bibau_jax.defenses import bibau

FOLDER = Path(__file__).parent / "goldens"
HOW = "if the change is meant: python -m tests.regenerate"


def resnet18() -> dict[str, str]:
    """Names and shapes of all variables of the full ResNet-18 for CIFAR-10."""
    classifier = models.build("resnet18", num_classes=10, image_shape=(32, 32, 3))
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape)) for path, leaf in flat}


def small_case():
    """A network, two sets of variables and a batch, all drawn by NumPy."""
    rng = np.random.default_rng(0)
    classifier = models.build("resnet18", num_classes=4, image_shape=(16, 16, 1), width=4, stages=(1,), mean=(0.4,), std=(0.3,))
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))

    def draw(leaf):
        return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

    params = jax.tree.map(draw, shapes["params"])
    statistics = jax.tree.map(lambda leaf: 0.5 + np.abs(draw(leaf)), shapes["batch_stats"])
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * draw(leaf), params)
    images = rng.integers(0, 256, (8, 16, 16, 1)).astype(np.uint8)
    return classifier, {"params": params, "batch_stats": statistics}, moved, images, rng.integers(0, 4, 8).astype(np.int32)


def bibau_steps() -> dict[str, list[dict[str, float]]]:
    """Every metric of three steps of BI-BAU, (U) and (T), with all four terms awake, and a sum over the parameters after."""
    classifier, backdoored, moved, images, labels = small_case()
    optimizer = train.sgd(optax.constant_schedule(0.02), momentum=0.9, weight_decay=5e-4)
    weights = bibau.Weights(1.0, 1.0, 1.0, 0.5, 0.5, 4.0, 0.5, "cosine", 1e4, "clip")
    found = {}
    for mode, target in (("untargeted", None), ("targeted", 1)):

        @jax.jit
        def step(state, key, target=target):
            return bibau.step(
                state,
                {"backdoored": backdoored},
                {"images": jnp.asarray(images), "labels": jnp.asarray(labels)},
                key,
                classifier=classifier,
                optimizer=optimizer,
                target=target,
                weights=weights,
                perturbation=bibau.Perturbation("l2", 100.0, 60.0, 2),
                padding=0,
                flip=False,
            )

        state = bibau._first_state(backdoored, optimizer)
        ones = jax.tree.map(jnp.ones_like, state.params)
        state = parallel.replicate(state.replace(params=moved, fisher_clean=ones, fisher_unlearning=ones))
        found[mode] = []
        for number in range(3):
            state, metrics = step(state, keys.stream(keys.root(0), "step", number))
            size = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(state.variables))
            found[mode].append({name: float(value) for name, value in sorted(metrics.items())} | {"size": size})
    return found


# A few steps of the defences that have no golden of their own.
_ROUNDS = {"rounds": 1, "pretrain_epochs": 1, "mask_epochs": 1, "generator_epochs": 1, "epochs": 1, "width": 2}
QUICK = {
    "ft": {"epochs": 2},
    "anp": {"iterations": 2, "threshold": 0.9, "learning_rate": 0.5},
    "rnp": {"unlearn_epochs": 1, "recover_epochs": 1, "threshold": 0.99},
    "clp": {"u": 0.5},
    "ep": {"u": 0.5, "width": 0.5},
    "bnp": {"u": 0.5},
    "i_bau": {"epochs": 1, "radius": 1.0},
    "sau": {"epochs": 1, "steps": 2},
    "nad": {"epochs": 1, "teacher_epochs": 1, "cutout": 2},
    "nc": {"inversion_epochs": 2, "enough": 0.01, "limit": 0.1, "epochs": 1},
    "bti_dbf": _ROUNDS,
    "pam": _ROUNDS,
}


def few_steps(name: str) -> dict[str, float]:
    """What a defence makes of the small case in a few steps: the sum of all values' magnitudes, and its last loss."""
    classifier, backdoored, _, images, labels = small_case()
    clean = ImageSet(images, labels, np.arange(len(labels), dtype=np.int32))
    options = QUICK[name] | ({"poisoned": clean} if defenses.is_informed(name) else {})
    known = inspect.signature(defenses.get(name).purify).parameters
    options |= {"batch_size": 4, "padding": 1, "flip": False}
    options = {option: value for option, value in options.items() if option in known}
    found = defenses.get(name).purify(keys.root(0), classifier, backdoored, clean, **options)
    sizes = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(jax.device_get(found.variables)))
    return {"size": sizes, "loss": found.history[-1]["loss"] if found.history else 0.0}


def loud(learned: dict) -> dict:
    """ISSBA's networks with an image that varies: as they begin it is grey all over, whatever they are shown."""
    image = learned["encoder"]["image"]
    learned["encoder"]["image"] = image | {"kernel": 200 * image["kernel"]}
    return learned


# What the attacks that train their triggers have learned: networks as they begin, so that nothing here takes long.
LEARNED = {
    "iad": lambda shape: iad.fresh(keys.root(0), shape, width=2),
    "issba": lambda shape: loud(issba.fresh(keys.root(0), shape, bits=1, width=2)) | {"secret": np.ones(1)},
    "narcissus": lambda shape: {"delta": np.random.default_rng(1).choice([-16.0, 16.0], shape)},
}
OPTIONS = {"iad": {"width": 2}, "issba": {"width": 2}, "narcissus": {"poison_ratio": 0.02}}


def own_trigger(shape) -> dict[str, str]:
    """The options of an attack from a file: half-opaque noise in the upper half of images of `shape`."""
    path = Path(tempfile.gettempdir()) / f"trigger_{'x'.join(map(str, shape))}_{os.getpid()}.npz"
    mask = np.zeros((*shape[:2], 1), np.float32)
    mask[: shape[0] // 2] = 0.5
    np.savez(path, mask=mask, pattern=np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8))
    atexit.register(path.unlink, missing_ok=True)
    return {"file": str(path)}


def attack(name, seed=0, *, shape=(16, 20, 3), **options):
    """The attack, and where its trigger is trained, what it is then for images of `shape`."""
    given = OPTIONS.get(name, {}) | (own_trigger(shape) if name in attacks.FROM_FILES else {})
    made = attacks.get(name).make(keys.root(seed), num_classes=5, **given | options)
    return made.control.finish(made, LEARNED[name](shape)) if name in LEARNED else made


def stamps() -> dict[str, np.ndarray]:
    """Every attack's trigger on two images of 32x32: a ramp of grey from left to right, and one of colours downwards."""
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    grey = np.broadcast_to(ramp[:, None], (32, 32, 3))
    colours = np.stack([np.broadcast_to(ramp[:, None], (32, 32)), np.full((32, 32), 128), 255 - grey[..., 0]], -1)
    images = np.stack([grey, colours.astype(np.uint8)])
    return {name: attack(name, shape=(32, 32, 3)).stamp(images, np.arange(2)) for name in attacks.names()}


def main() -> None:
    """Writes every golden file."""
    FOLDER.mkdir(exist_ok=True)
    with parallel.on_devices(1):
        runs = ("defenses", lambda: {name: few_steps(name) for name in QUICK})
        for name, make in (("resnet18", resnet18), ("bibau", bibau_steps), runs):
            (FOLDER / f"{name}.json").write_text(json.dumps(make(), indent=1) + "\n")
            print(f"wrote {FOLDER / name}.json")
        np.savez_compressed(FOLDER / "stamps.npz", **stamps())
        print(f"wrote {FOLDER / 'stamps'}.npz")


if __name__ == "__main__":
    main()
