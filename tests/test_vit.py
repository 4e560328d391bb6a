"""A network without BatchNorm, whose activations are tokens, through all that is done with networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import checkpoint, defenses, information, keys, models, train
from bibau_jax.defenses import bibau
from bibau_jax.errors import NotApplicable
from bibau_jax.method.terms import cross_entropy
from bibau_jax.metrics import bec
from tests.conftest import DIGITS

SIZES = {"width": 8, "stages": (2,), "heads": 2, "patch": 8, "size": 16}


@pytest.fixture(scope="module")
def vit() -> models.Classifier:
    return models.build("vit_b_32", **SIZES, **DIGITS)


@pytest.fixture(scope="module")
def variables(vit) -> dict:
    return jax.device_get(vit.init(keys.root(0)))


@pytest.fixture(scope="module")
def some(digits):
    return digits.train.take(slice(40))


def test_there_are_no_running_statistics_in_any_mode(vit, variables, some):
    assert variables["batch_stats"] == {}
    told = vit.apply(variables, some.images, train=True)
    assert told.statistics == {} and vit.apply(variables, some.images).statistics is None
    np.testing.assert_array_equal(told.logits, vit.apply(variables, some.images).logits)


def test_a_checkpoint_keeps_that_there_are_none(variables, tmp_path):
    checkpoint.save(tmp_path / "model", {"variables": variables}, {})
    loaded, _ = checkpoint.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded["variables"], variables)
    assert loaded["variables"]["batch_stats"] == {}


@pytest.mark.slow
def test_it_is_purified_by_bi_bau(some):
    vit = models.build("vit_b_32", **SIZES | {"stages": (1,)}, **DIGITS)
    variables = jax.device_get(vit.init(keys.root(0)))
    options = {"epochs": 1, "batch_size": 20, "learning_rate": 0.02, "fisher_chunk": 20, "padding": 1, "flip": False}
    found = bibau.purify(keys.root(0), vit, variables, some, pgd=bibau.Perturbation("l2", 200.0, 60.0, 1), **options)
    assert np.isfinite([value for value in found.history[0].values()]).all() and found.history[0]["step"] == 2
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), found.variables["params"], variables["params"])
    assert all(jax.tree.leaves(moved)) and found.variables["batch_stats"] == {}


def test_fine_tuning_makes_it_know_the_digits_better(vit, variables, digits):
    options = {"epochs": 3, "batch_size": 50, "learning_rate": 0.1, "padding": 0, "flip": False}
    found = defenses.get("ft").purify(keys.root(0), vit, variables, digits.train.take(slice(500)), **options)
    assert found.history[-1]["loss"] < found.history[0]["loss"] - 0.1 and found.variables["batch_stats"] == {}


def test_its_fisher_information_is_the_mean_of_squared_gradients(vit, variables, some):
    def likelihood(params, image, label):
        return -cross_entropy(vit.apply(variables | {"params": params}, image[None]).logits, label[None])[0]

    gradient, sums = jax.jit(jax.grad(likelihood)), None
    for image, label in zip(some.images[:5], some.labels[:5], strict=True):
        squared = jax.tree.map(lambda g: np.asarray(g, np.float64) ** 2, gradient(variables["params"], image, label))
        sums = squared if sums is None else jax.tree.map(np.add, sums, squared)
    found = information.diagonal_fisher(vit, variables, some.images[:5], some.labels[:5], chunk=2)
    jax.tree.map(lambda ours, loop: np.testing.assert_allclose(ours, loop / 5, rtol=1e-3, atol=1e-8), found, sums)


def test_tokens_change_as_pixels_do(vit, variables, some, digits):
    triggered = np.where(np.arange(16)[:, None, None] < 4, 255, some.images).astype(np.uint8)
    found = bec.trigger_activated_change(vit, variables, some.images, triggered)
    taps = [vit.apply(variables, pixels, taps=True).taps["block_1/mlp2"] for pixels in (some.images, triggered)]
    one, other = (np.asarray(tap, np.float64) for tap in taps)
    assert one.shape == (40, 5, 8)
    size = lambda x: np.sqrt((x**2).sum(1)).sum(0)  # noqa: E731
    np.testing.assert_allclose(found["block_1/mlp2"], 2 * size(one - other) / (size(one) + size(other)), rtol=1e-4)


def test_the_last_layers_of_a_transformer_are_what_its_last_blocks_add(vit, variables, some):
    twin = jax.device_get(vit.init(keys.root(9)))
    triggered = 255 - some.images
    ends = bec.reference(vit, variables, twin, some.images, triggered, share=0.25, layers=3)
    assert list(ends.channels) == ["block_0/mlp2", "block_1/out", "block_1/mlp2"]
    values = [bec.existence(vit, ends, model, triggered).value for model in (variables, twin)]
    np.testing.assert_allclose(values, (1, 0), atol=1e-6)


@pytest.mark.parametrize("name", ["anp", "rnp", "clp", "ep", "bnp", "nad"])
def test_defences_that_need_convolutions_do_not_apply(name, vit, variables, some):
    options = {"poisoned": some} if defenses.is_informed(name) else {}
    with pytest.raises(NotApplicable, match="this network has n"):
        defenses.get(name).purify(keys.root(0), vit, variables, some, **options)


def test_bfloat16_is_close_to_float32(vit, variables, some):
    narrow = dataclasses.replace(vit, module=vit.module.clone(dtype=jnp.bfloat16))
    logits = [network.apply(variables, some.images).logits for network in (narrow, vit, narrow.in_float32())]
    np.testing.assert_allclose(logits[0], logits[1], atol=0.1)
    assert logits[0].dtype == jnp.float32 and np.abs(logits[0] - logits[1]).max() > 0
    np.testing.assert_array_equal(logits[2], logits[1])


def test_images_of_another_size_are_scaled_to_the_networks(vit, variables):
    blocks = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    scaled = jax.image.resize(blocks.astype(np.float32), (3, 16, 16, 1), "bilinear", antialias=False)
    other = dataclasses.replace(vit, image_shape=(8, 8, 1))
    shown = [train.logits(network, variables, images) for network, images in ((other, blocks), (vit, np.asarray(scaled)))]
    np.testing.assert_allclose(*shown, atol=1e-5)
