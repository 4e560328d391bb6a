"""Weights of others in our networks: PyTorch's numbers, every key accounted for, and the same file back."""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from bibau_jax import models, train
from bibau_jax.errors import UserError
from bibau_jax.importers import architectures, rules, torch_file
from bibau_jax.models import inside
from bibau_jax.models.classifier import at

FOLDER = Path(__file__).parent / "torch"
SHARED = Path(__file__).parents[2] / "shared" / "data"
# The stored networks: the side of the images that they were shown, and what their weights do not tell.
STORED = {
    "wide_resnet16": (16, {}),
    "resnet20": (16, {}),
    "resnet18_imagenet": (32, {}),
    "preact_resnet18": (16, {}),
    "vgg19_bn": (32, {}),
    "vit_b_32": (16, {"heads": 2}),
    "clip_vit_b_32": (16, {"heads": 2}),
}
TINY = {
    "vit_b_32": {"stages": (2,), "patch": 8, "size": 32},
    "clip_vit_b_32": {"stages": (2,), "patch": 8, "size": 32, "projection": 5},
    "vgg19_bn": {"hidden": 12},
}


@pytest.fixture(scope="module")
def stored():
    with np.load(FOLDER / "networks.npz") as file:
        return dict(file)


def small(networks, name) -> tuple[dict[str, np.ndarray], architectures.Architecture, models.Classifier]:
    """(weights, what they are guessed to be, the network for the stored images)."""
    (side, hidden), arrays = STORED[name], networks[name]
    found = architectures.guess(arrays)
    options = {"num_classes": 10, "image_shape": (side, side, 3), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    return arrays, found, architectures.classifier(found, **options, **hidden)


def imported(arrays, table, classifier):
    return rules.to_variables(arrays, table, jax.eval_shape(classifier.init, jax.random.key(0)))


@pytest.mark.parametrize("name", STORED)
def test_imported_networks_answer_as_pytorchs_do(name, stored, networks):
    arrays, found, classifier = small(networks, name)
    assert found.name == name
    variables = imported(arrays, found.table, classifier).variables
    logits = train.logits(classifier, variables, stored[f"images_{STORED[name][0]}"])
    np.testing.assert_allclose(logits, stored[f"{name}/logits"], atol=1e-5)
    assert np.ptp(logits, 0).min() > 1e-3  # the images make a difference


@pytest.mark.parametrize("name", STORED)
def test_what_was_imported_goes_back_bit_by_bit_under_the_same_names(name, networks):
    arrays, architecture, classifier = small(networks, name)
    found = imported(arrays, architecture.table, classifier)
    back = rules.to_arrays(found.variables, arrays, found.places)
    assert list(back) == list(arrays)
    for key, value in arrays.items():
        assert back[key].shape == value.shape and back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", ["resnet18", "resnet18_imagenet", "resnet20", "preact_resnet18"])
def test_a_network_trained_here_gets_the_names_that_it_is_told_by(name):
    network = models.build(name, num_classes=10, image_shape=(32, 32, 3), width=4, mean=(0.5,) * 3, std=(0.2,) * 3)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: np.abs(rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    named = rules.named(variables)
    back = rules.to_variables(named, rules.RESNET, shapes)
    jax.tree.map(np.testing.assert_array_equal, back.variables, variables)
    assert len(named) == len(jax.tree.leaves(variables)) and {"conv1.weight", "fc.bias"} <= set(named)
    assert named["layer1.0.conv1.weight"].shape == (4, 4, 3, 3) and named["fc.weight"].shape[0] == 10


def test_a_network_without_names_is_refused():
    with pytest.raises(UserError, match="params/block_0/qkv/kernel has no name in PyTorch"):
        rules.named({"params": {"block_0": {"qkv": {"kernel": np.zeros((2, 2))}}}})


@pytest.mark.parametrize("name", models.names())
def test_every_description_of_a_network_is_true_of_it(name):
    shape = {"num_classes": 10, "image_shape": (32, 32, 3), "width": 8}
    classifier = models.build(name, **shape, **TINY.get(name, {}))
    variables, images = jax.eval_shape(classifier.init, jax.random.key(0)), np.zeros((2, 32, 32, 3), np.float32)
    for pair in classifier.norms:
        kernel, norm = at(variables["params"], pair.conv), at(variables["params"], pair.norm)
        assert kernel["kernel"].shape[-1:] == norm["scale"].shape == norm["bias"].shape
    outputs, seen = jax.eval_shape(lambda v: inside.look(classifier, v, images, classifier.stages), variables)
    sides = [seen["/".join(path)].shape[1] for path in classifier.stages]
    assert sides == sorted(set(sides), reverse=True) and all(activation.ndim == 4 for activation in seen.values())
    assert (classifier.head_kernel(variables["params"]).shape[0],) == outputs.features.shape[1:]
    taps = jax.eval_shape(lambda v: classifier.apply(v, images, taps=True).taps, variables)
    assert classifier.compared and {"/".join(path) for path in classifier.compared} <= taps.keys()
    for path in classifier.compared:
        assert at(variables["params"], path)["kernel"].shape[-1] == taps["/".join(path)].shape[-1]
    assert {pair.conv for pair in classifier.main_path} <= set(classifier.compared)


@pytest.mark.parametrize("name", ["vgg19_bn", "preact_resnet18", "resnet18", "resnet18_imagenet"])
def test_norms_are_in_the_order_in_which_the_network_runs(name):
    classifier = models.build(name, num_classes=10, image_shape=(32, 32, 3), width=8, **TINY.get(name, {}))
    run = []

    def intercept(call, arguments, options, context):
        run.append(context.module.path)
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        jax.eval_shape(classifier.module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    for described in ([pair.norm for pair in classifier.main_path], [pair.conv for pair in classifier.main_path]):
        assert sorted(described, key=run.index) == described
    assert sorted(classifier.compared, key=run.index) == list(classifier.compared)


def test_what_is_missing_left_over_or_of_another_shape_is_listed(networks):
    arrays, architecture, classifier = small(networks, "resnet20")
    table = architecture.table
    with pytest.raises(UserError, match=r"1 missing \(params/head/bias\)"):
        imported({key: value for key, value in arrays.items() if key != "linear.bias"}, table, classifier)
    with pytest.raises(UserError, match=r"1 left over \(layer9.0.conv1.weight\)"):
        imported(arrays | {"layer9.0.conv1.weight": arrays["conv1.weight"]}, table, classifier)
    with pytest.raises(UserError, match=r"1 of another shape \(params/head/kernel \[32, 7\] for \[32, 10\]\)"):
        imported(arrays | {"linear.weight": np.zeros((7, 32), np.float32)}, table, classifier)
    with pytest.raises(UserError, match=r"1 not finite \(batch_stats/bn1/var\)"):
        imported(arrays | {"bn1.running_var": np.full(8, np.inf)}, table, classifier)
    with pytest.raises(UserError, match=r"and \d+ more\)"):
        imported(networks["wide_resnet16"], table, classifier)


# --- models that others trained, where they are at hand

THIRD_PARTY = {  # network, mean and std, clean accuracy and attack success rate in percent, target
    "nad_cifar10_wrn16-1_grid.pth.tar": ("wide_resnet16", ((0.0,) * 3, (1.0,) * 3), 84.80, 100.0, 5),
    "abl_cifar10_wrn16-1_grid.tar": ("wide_resnet16", ((0.0,) * 3, (1.0,) * 3), 83.36, 99.99, 0),
    "clean_cifar10_resnet20.th": ("resnet20", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 91.7, None, None),
}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models").exists(), reason="models of others are not at hand")
@pytest.mark.parametrize("file", THIRD_PARTY)
def test_models_of_others_have_their_stated_accuracy_and_success(file, monkeypatch):
    monkeypatch.syspath_prepend(str(SHARED))
    monkeypatch.delitem(sys.modules, "load_data", raising=False)
    from load_data import load_mosaic

    name, (mean, std), accuracy, success, target = THIRD_PARTY[file]
    data = load_mosaic("cifar10", splits=("test",))
    images, labels = data["test_images"], data["test_labels"].astype(np.int32)
    arrays = torch_file.read(SHARED / "models" / file).arrays
    found = architectures.guess(arrays)
    assert found.name == name
    classifier = architectures.classifier(found, num_classes=10, image_shape=(32, 32, 3), mean=mean, std=std)
    variables = imported(arrays, found.table, classifier).variables
    assert 100 * train.accuracy(classifier, variables, images, labels) == pytest.approx(accuracy, abs=0.3)
    if success is not None:
        triggers, stem, others = np.load(SHARED / "models" / "triggers.npz"), file.partition(".")[0], labels != target
        mask, pattern = triggers[f"{stem}__mask"], triggers[f"{stem}__pattern"]
        stamped = (images[others] * (1 - mask) + pattern).astype(np.uint8)
        assert 100 * np.mean(train.predict(classifier, variables, stamped) == target) == pytest.approx(success, abs=0.3)
