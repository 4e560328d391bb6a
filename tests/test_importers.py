"""Weights of others in our networks: PyTorch's numbers, every key accounted for, and the same file back."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bibau_jax import models, train
from bibau_jax.errors import UserError
from bibau_jax.importers import rules, torch_file
from bibau_jax.models import inside
from bibau_jax.models.classifier import at

FOLDER = Path(__file__).parent / "torch"
SHARED = Path(__file__).parents[2] / "shared" / "data"
TABLES = {"wide_resnet16": rules.WIDE_RESNET, "resnet20": rules.RESNET, "resnet18": rules.RESNET}
SMALL = {"wide_resnet16": {"width": 16}, "resnet20": {"width": 8}}


@pytest.fixture(scope="module")
def stored():
    with np.load(FOLDER / "networks.npz") as file:
        return dict(file)


def weights(stored, name) -> dict[str, np.ndarray]:
    begin = f"{name}/weights/"
    return {key.removeprefix(begin): value for key, value in stored.items() if key.startswith(begin)}


def build(name, shape=(16, 16, 3), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), **options):
    return models.build(name, num_classes=10, image_shape=shape, mean=mean, std=std, **options)


def imported(name, arrays, classifier):
    return rules.to_variables(arrays, TABLES[name], jax.eval_shape(classifier.init, jax.random.key(0)))


@pytest.mark.parametrize("name", SMALL)
def test_imported_networks_answer_as_pytorchs_do(name, stored):
    classifier = build(name, **SMALL[name])
    found = imported(name, weights(stored, name), classifier)
    logits = train.logits(classifier, found.variables, stored["images"])
    np.testing.assert_allclose(logits, stored[f"{name}/logits"], atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_what_was_imported_goes_back_bit_by_bit_under_the_same_names(name, stored):
    arrays = weights(stored, name)
    found = imported(name, arrays, build(name, **SMALL[name]))
    back = rules.to_arrays(found.variables, arrays, found.places)
    assert list(back) == list(arrays)
    for key, value in arrays.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


def test_every_description_of_a_network_is_true_of_it():
    for name in models.names():
        classifier = build(name, width=8)
        variables = jax.eval_shape(classifier.init, jax.random.key(0))
        for pair in classifier.norms:
            kernel, norm = (
                at(variables["params"], pair.conv),
                at(variables["params"], pair.norm),
            )
            assert kernel["kernel"].shape[-1:] == norm["scale"].shape == norm["bias"].shape
        seen = jax.eval_shape(
            lambda pixels, c=classifier: inside.look(c, c.init(jax.random.key(0)), pixels, c.stages)[1],
            np.zeros((2, 16, 16, 3), np.float32),
        )
        widths = [activation.shape[1] for activation in seen.values()]
        assert widths == [16 // 2**stage for stage in range(len(classifier.stages))]
        taps = jax.eval_shape(
            lambda pixels, c=classifier: c.apply(c.init(jax.random.key(0)), pixels, taps=True).taps, np.zeros((2, 16, 16, 3))
        )
        assert {"/".join(pair.conv) for pair in classifier.main_path} <= taps.keys()


def test_what_is_missing_left_over_or_of_another_shape_is_listed(stored):
    classifier, arrays = build("resnet20", width=8), weights(stored, "resnet20")
    with pytest.raises(UserError, match=r"1 are missing \(params/head/bias\)"):
        imported("resnet20", {key: value for key, value in arrays.items() if key != "linear.bias"}, classifier)
    with pytest.raises(UserError, match=r"1 are left over \(layer9.0.conv1.weight\)"):
        imported("resnet20", arrays | {"layer9.0.conv1.weight": arrays["conv1.weight"]}, classifier)
    with pytest.raises(UserError, match=r"1 have another shape \(params/head/kernel \[32, 7\] for \[32, 10\]\)"):
        imported("resnet20", arrays | {"linear.weight": np.zeros((7, 32), np.float32)}, classifier)
    with pytest.raises(UserError, match=r"1 are not finite \(batch_stats/bn1/var\)"):
        imported("resnet20", arrays | {"bn1.running_var": np.full(8, np.inf)}, classifier)
    with pytest.raises(UserError, match=r"and \d+ more\)"):
        imported("resnet20", weights(stored, "wide_resnet16"), classifier)


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
    classifier = build(name, (32, 32, 3), mean, std)
    variables = imported(name, torch_file.read(SHARED / "models" / file).arrays, classifier).variables
    assert 100 * train.accuracy(classifier, variables, images, labels) == pytest.approx(accuracy, abs=0.3)
    if success is not None:
        triggers, stem, others = np.load(SHARED / "models" / "triggers.npz"), file.partition(".")[0], labels != target
        mask, pattern = triggers[f"{stem}__mask"], triggers[f"{stem}__pattern"]
        stamped = (images[others] * (1 - mask) + pattern).astype(np.uint8)
        assert 100 * np.mean(train.predict(classifier, variables, stamped) == target) == pytest.approx(success, abs=0.3)
