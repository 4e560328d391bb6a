"""A network of one's own from a file: the example is the network that its authors trained, mistakes are told in one line."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import experiment, train
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.importers import export, rules, suspect, torch_file
from bibau_jax.models import own_file

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SMALL_VGG = ROOT / "examples" / "small_vgg.py"
CIFAR = {"num_classes": 10, "image_shape": (32, 32, 3), "mean": (0.0,) * 3, "std": (1.0,) * 3, "dtype": jnp.float32}
TINY = """
import flax.linen as nn
from bibau_jax.models import Classifier
from bibau_jax.models.layers import Head

TABLE = ((r"fc", "head"),)

class Linear(nn.Module):
    classes: int
    dtype: object

    @nn.compact
    def __call__(self, pixels, train=False):
        features = pixels.reshape(len(pixels), -1) / 255
        return Head(self.classes, name="head")(features), features

def build(*, num_classes, image_shape, mean, std, dtype):
    return Classifier(Linear(num_classes, dtype), num_classes, image_shape)
"""


@pytest.fixture
def written(tmp_path):
    """Writes a file and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "my_net.py"
        path.write_text(text)
        return str(path)

    return write


def torch_arrays() -> dict[str, np.ndarray]:
    """Arrays with the names and shapes of the authors' file, which has no other."""
    rng, arrays, inputs = np.random.default_rng(0), {}, 3
    for number, width in zip((0, 3, 8, 11, 16, 19), (32, 32, 64, 64, 128, 128), strict=True):
        arrays[f"features.{number}.weight"] = rng.normal(0, 0.1, (width, inputs, 3, 3))
        for name in (f"{number}.bias", f"{number + 1}.weight", f"{number + 1}.bias", f"{number + 1}.running_mean"):
            arrays[f"features.{name}"] = rng.normal(0, 1, width)
        arrays[f"features.{number + 1}.running_var"] = rng.uniform(0.5, 2, width)
        arrays[f"features.{number + 1}.num_batches_tracked"] = np.int64(7)
        inputs = width
    arrays |= {"classifier.weight": rng.normal(0, 0.1, (10, 2048)), "classifier.bias": rng.normal(0, 1, 10)}
    return {name: array if array.dtype == np.int64 else array.astype(np.float32) for name, array in arrays.items()}


def imported(network: own_file.OwnNetwork, classifier, arrays) -> rules.Imported:
    return rules.to_variables(arrays, network.table, jax.eval_shape(classifier.init, jax.random.key(0)))


def test_every_key_of_the_authors_network_has_its_place_in_the_example_and_goes_back():
    network, arrays = own_file.load(str(SMALL_VGG)), torch_arrays()
    found = imported(network, network.build(**CIFAR), arrays)
    back = rules.to_arrays(found.variables, arrays, found.places)
    assert list(back) == list(arrays) and all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)


def test_the_example_flattens_as_pytorch_does():
    network, arrays = own_file.load(str(SMALL_VGG)), torch_arrays()
    classifier = network.build(**CIFAR)
    variables = imported(network, classifier, arrays).variables
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    outputs = classifier.apply(variables, images, taps=True)
    last = np.asarray(outputs.taps["features_19"], np.float64).transpose(0, 3, 1, 2)
    norm = {name: arrays[f"features.20.{name}"][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")}
    last = (last - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
    last = np.where(last > 0, last, np.expm1(np.minimum(last, 0)))
    flat = last.reshape(2, 128, 4, 2, 4, 2).max((3, 5)).reshape(2, -1)
    np.testing.assert_allclose(outputs.logits, flat @ arrays["classifier.weight"].T + arrays["classifier.bias"], rtol=1e-3)


def test_its_keys_are_found_behind_what_they_all_begin_with_and_given_back_so(written, tmp_path):
    rng = np.random.default_rng(0)
    images, weight = rng.integers(0, 256, (40, 4, 4, 1)).astype(np.uint8), rng.normal(0, 1, (2, 16)).astype(np.float32)
    weight -= weight.mean(1, keepdims=True)  # so that neither class is the brighter one
    labels = np.argmax(images.reshape(40, -1) @ weight.T, 1).astype(np.int32)
    export.write(tmp_path / "wrapped.pth", {"model.net.fc.weight": weight, "model.net.fc.bias": np.zeros(2, np.float32)})
    clean = ImageSet(images, labels, np.arange(40, dtype=np.int32))
    found = suspect.bring(tmp_path / "wrapped.pth", clean, file=written(TINY), normalisation="0..1")
    assert found.told["prefix"] == "model.net." and set(found.arrays) == {"fc.weight", "fc.bias"}
    assert found.told["accuracy_by_normalisation"] == {"0..1": 1.0}
    export.write(tmp_path / "other.pth", {"model.net.fc.weight": weight, "model.head.bias": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="other.pth: .*model.net.fc.weight"):
        suspect.bring(tmp_path / "other.pth", clean, file=written(TINY), normalisation="0..1")


def test_the_example_is_described_truly():
    classifier = own_file.load(str(SMALL_VGG)).build(**CIFAR)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))["params"]
    assert [shapes[pair.norm[0]]["scale"].shape[0] for pair in classifier.norms] == [32, 32, 64, 64, 128, 128]
    with pytest.raises(UserError, match="the small VGG takes images of 32x32 pixels, not 16x16"):
        own_file.load(str(SMALL_VGG)).build(**CIFAR | {"image_shape": (16, 16, 3)})


@pytest.mark.parametrize(
    "text, words",
    [
        ("def build(:", r"it cannot be imported \(SyntaxError: "),
        ("import nowhere_at_all", r"it cannot be imported \(ModuleNotFoundError: No module named 'nowhere_at_all'\)"),
        ("raise SystemExit(0)", r"it cannot be imported \(SystemExit: 0\)"),
        ("raise RuntimeError('no\\nway')", r"it cannot be imported \(RuntimeError: no way\)"),
        ("TABLE = ()", "it does not define build"),
        ("x = 1", "it does not define build and TABLE"),
        (TINY + "\nTABLE = ('head',)", "build must be a function and TABLE a sequence of "),
        (TINY + "\nTABLE = 3", "build must be a function and TABLE a sequence of "),
        (TINY + "\nTABLE = (('(', 'head'),)", r"TABLE has no regular expression in '\('"),
    ],
)
def test_a_file_that_is_no_network_is_told_by_name_in_one_line(text, words, written):
    with pytest.raises(UserError, match=r"^model.file=.*my_net.py: " + words) as told:
        own_file.load(written(text))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text, words",
    [
        (TINY + "\ndef build(**options): return 3", "build gives a int, and must give a bibau_jax.models.Classifier"),
        (TINY + "\ndef build(): pass", r"build fails \(TypeError: "),
        (TINY.replace("num_classes, image_shape)", "7, image_shape)"), "build gives a Classifier for other classes or images"),
        (TINY.replace("Head(self.classes", "Head(7"), r"logits and head's kernel are \(\(1, 7\), \(768, 7\)\), and must be "),
        (
            TINY.replace('name="head"', 'name="fc"'),
            r"its network cannot be run on images of \[16, 16, 3\] \(KeyError: 'head'\)",
        ),
        (TINY.replace(", train=False", ""), r"its network cannot be run on images of \[16, 16, 3\] \(TypeError: "),
    ],
)
def test_a_build_that_gives_no_such_classifier_is_told_in_one_line(text, words, written):
    with pytest.raises(UserError, match=r"^model.file=.*my_net.py: " + words) as told:
        own_file.load(written(text)).build(**CIFAR | {"image_shape": (16, 16, 3)})
    assert "\n" not in str(told.value)


def test_a_missing_file_and_one_that_is_no_python_are_told(tmp_path):
    with pytest.raises(UserError, match="model.file=/nowhere/net.py: there is no such file"):
        own_file.load("/nowhere/net.py")
    (tmp_path / "net.txt").write_text("x")
    with pytest.raises(UserError, match="net.txt: it is no Python file"):
        own_file.load(str(tmp_path / "net.txt"))


# --- in a run


def test_a_run_takes_the_network_of_the_file_and_its_record_tells_it(tiny_config, tmp_path, written):
    config = tiny_config({"model.file": written(TINY), "model.width": None, "model.stages": None, "defense.name": "ft"})
    record = experiment.run(config, str(tmp_path / "run"), "the command")
    assert record.config["model"]["name"] == "my_net" and record.metrics["purified"].defense == "ft"
    variables = experiment.load_model(experiment.Run(experiment.settled(config), tmp_path / "run"), "implant")[0]
    assert variables["params"].keys() == {"head"} and variables["batch_stats"] == {}


def test_settings_of_other_networks_are_refused_beside_a_file(tiny_config, tmp_path, written):
    config = tiny_config({"model.file": written(TINY), "model.width": None, "model.stages": (1,)})
    with pytest.raises(
        UserError, match="model.stages is no setting of a network from a file, model.file=.*: it stands in there"
    ):
        experiment.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- models that others trained, where they are at hand


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").exists(), reason="models of others are not at hand")
# GTSRB: 98.4 is stated, perhaps of signs cut out of the original pictures; those at hand were shrunk first, and on them PyTorch
# gives 97.9 too.
@pytest.mark.parametrize("name, accuracy, success", [("cifar10", 84.46, 97.74), ("gtsrb", 97.9, 99.0)])
def test_the_authors_models_have_their_stated_accuracy_and_success(name, accuracy, success, monkeypatch):
    monkeypatch.syspath_prepend(str(SHARED))
    monkeypatch.delitem(sys.modules, "load_data", raising=False)
    from load_data import gtsrb_roi_crop, load_mosaic

    data = load_mosaic(name, splits=("test",))
    images, labels = data["test_images"], data["test_labels"].astype(np.int32)
    if name == "gtsrb":
        images = gtsrb_roi_crop(images, data["test_roi"])
    network, stem = own_file.load(str(SMALL_VGG)), f"ibau_{name}_badnets"
    classifier = network.build(**CIFAR | {"num_classes": labels.max() + 1})
    variables = imported(network, classifier, torch_file.read(SHARED / "models" / f"{stem}.pth").arrays).variables
    assert 100 * train.accuracy(classifier, variables, images, labels) == pytest.approx(accuracy, abs=0.3)
    triggers, others = np.load(SHARED / "models" / "triggers.npz"), labels != 8
    stamped = (images[others] * (1 - triggers[f"{stem}__mask"]) + triggers[f"{stem}__pattern"]).astype(np.uint8)
    assert 100 * np.mean(train.predict(classifier, variables, stamped) == 8) == pytest.approx(success, abs=0.3)
