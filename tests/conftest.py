"""What all tests share: devices, compiled programs, small data and networks, one small model with a backdoor in it.

Eight CPU devices are there and work runs on one of them; tests about devices open `parallel.on_devices(8)` themselves.
"""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also for the programs that tests start
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Nearly all the time goes into compiling, of random numbers above all. This halves it and changes no result.
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=2 {os.environ.get('XLA_FLAGS', '')}".strip()

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import attacks, data, keys, models, parallel, train
from bibau_jax.data import ImageSet, splits
from bibau_jax.models.layers import Head, Normalize

jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).parents[1]
DIGITS = {"num_classes": 10, "image_shape": (16, 16, 1), "mean": (0.305,), "std": (0.376,)}
SMALL = {
    "attack.poison_ratio": 0.1,
    "data.train_size": 200,
    "data.clean_size": 40,
    "data.validation_size": 20,
    "model.width": 4,
    "model.stages": (1,),
    "implant.epochs": 1,
    "implant.batch_size": 40,
    "implant.clean_twin": "none",
    "defense.epochs": 1,
    "defense.batch_size": 20,
    "defense.beside": "",
    "defense.pgd.steps": 2,
    "reactivate.checks": "",
    "reactivate.test_size": 60,
    "reactivate.retuning.images": 40,
    "reactivate.retuning.repeats": 2,
    "reactivate.retuning.epochs": 1,
    "reactivate.query.images": 24,
    "reactivate.query.epochs": 2,
    "reactivate.query.hidden": 16,
    "reactivate.universal.images": 24,
    "reactivate.universal.epochs": 1,
    "reactivate.square.queries": 3,
    "reactivate.orthogonality.images": 20,
    "reactivate.linearity.images": 8,
    "reactivate.path.points": 3,
    "reactivate.features.images": 30,
    "checkpoint_every": 2,
}


class Backdoored(NamedTuple):
    """A small network that knows the digits and the white square that makes a 0 of any of them."""

    classifier: models.Classifier
    variables: dict
    attack: attacks.Attack
    clean: ImageSet
    test: ImageSet

    def rates(self, variables) -> tuple[float, float]:
        """Clean accuracy and attack success rate on the test digits, 0..1."""
        clean, hit = (
            train.predict(self.classifier, variables, images)
            for images in (self.test.images, self.attack.stamp(self.test.images, self.test.ids))
        )
        return float(np.mean(clean == self.test.labels)), float(np.mean(hit[self.test.labels != 0] == 0))


@pytest.fixture(scope="session", autouse=True)
def one_device(tmp_path_factory):
    """One device, and a cache on disk: the same program is built again and again by tests that train."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with parallel.on_devices(1):
        yield


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="session")
def tiny() -> models.Classifier:
    """One block of width 4 on 16x16 grey images: for what holds whatever the network."""
    return models.build("resnet18", width=4, stages=(1,), **DIGITS)


@pytest.fixture(scope="session")
def tiny_variables(tiny) -> dict:
    """Parameters as they begin, on the host, with running statistics that are not those of a fresh network."""
    variables = jax.device_get(tiny.init(keys.root(7)))
    rng = np.random.default_rng(7)
    return {
        "params": variables["params"],
        "batch_stats": jax.tree.map(
            lambda leaf: (leaf + rng.uniform(0.0, 0.3, leaf.shape)).astype(np.float32), variables["batch_stats"]
        ),
    }


class Linear(nn.Module):
    """Logits that are linear in the parameters."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels, train: bool = False):
        features = Normalize((0.3,), (4.0,), self.dtype)(pixels).reshape(len(pixels), -1)
        return Head(10, name="head")(features), features


@pytest.fixture(scope="session")
def linear() -> tuple[models.Classifier, dict]:
    """A classifier of 16x16 grey images whose theory is exact, and its variables."""
    classifier = models.Classifier(Linear(), 10, (16, 16, 1))
    return classifier, jax.device_get(classifier.init(keys.root(0)))


@pytest.fixture(scope="session")
def backdoored(digits) -> Backdoored:
    classifier = models.build("resnet18", width=16, stages=(1,), **DIGITS)
    attack = attacks.get("badnets").make(keys.root(1), num_classes=10)
    poisoned = attack.poison(digits.train)
    optimizer = train.sgd(train.learning_rate_schedule("one_cycle", 0.2, 300), momentum=0.9, weight_decay=5e-4)
    prepare = partial(train.augmented, padding=1, flip=False)
    state, _ = train.fit(
        partial(train.train_step, classifier=classifier, optimizer=optimizer, prepare=prepare),
        train.new_state(classifier.init(keys.root(0)), optimizer),
        {"images": poisoned.images, "labels": poisoned.labels},
        key=keys.root(2),
        epochs=15,
        batch_size=64,
    )
    divided = splits.divide(keys.root(3), digits.train, train_size=0, clean_size=200, validation_size=0)
    return Backdoored(classifier, jax.device_get(state.variables), attack, divided.clean, digits.test)


@pytest.fixture(scope="session")
def tiny_config():
    """Settings of a whole run in seconds: `tiny_config({"defense.epochs": 2}, stages="implant")` is a plain dict."""

    def make(changes=None, **top) -> dict:
        config = importlib.import_module("configs.digits").get_config()
        config.update_from_flattened_dict(SMALL | (changes or {}) | top)
        return config.to_dict()

    return make


@pytest.fixture
def program():
    """Starts the command in a process of its own, with the settings of `tiny_config` unless it is to be `bare`."""
    started = []

    def start(*flags: str, bare: bool = False) -> subprocess.Popen:
        small = ["--config=configs/digits.py", *(f"--config.{name}={value}" for name, value in SMALL.items())]
        line = [sys.executable, "-m", "bibau_jax.main", *([] if bare else small), *flags]
        started.append(subprocess.Popen(line, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def networks() -> dict[str, dict[str, np.ndarray]]:
    """The weights of PyTorch's small networks, {network: {its name: array}}; see tests/torch."""
    found = {}
    with np.load(ROOT / "tests" / "torch" / "networks.npz") as file:
        for name in (name for name in file.files if "/weights/" in name):
            network, _, key = name.partition("/weights/")
            found.setdefault(network, {})[key] = file[name]
    return found
