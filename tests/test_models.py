"""Networks: shapes, the head, layer names, and arithmetic that does not depend on type, batch or mode."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import keys, models
from bibau_jax.errors import UserError
from configs import base
from tests import regenerate

RESNET18 = {"num_classes": 10, "image_shape": (32, 32, 3)}


@pytest.fixture(scope="module")
def network():
    """Two stages, so that there is a shortcut that changes the shape."""
    return models.build("resnet18", width=4, stages=(1, 1), num_classes=5, image_shape=(16, 16, 3))


@pytest.fixture(scope="module")
def variables(network):
    variables = network.init(keys.root(0))
    rng = np.random.default_rng(0)
    statistics = jax.tree.map(lambda leaf: leaf + rng.uniform(0, 0.3, leaf.shape).astype(np.float32), variables["batch_stats"])
    return {"params": variables["params"], "batch_stats": statistics}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def outputs(network, variables, pixels):
    return network.apply(variables, pixels, taps=True)


def test_resnet18_has_the_parameters_of_the_published_one():
    shapes = jax.eval_shape(models.build("resnet18", **RESNET18).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 11_173_962
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


def test_names_and_shapes_of_resnet18_stay_as_they_are_because_checkpoints_hold_them():
    golden = json.loads((regenerate.FOLDER / "resnet18.json").read_text())
    assert regenerate.resnet18() == golden, regenerate.HOW


def test_output_shapes(outputs):
    assert outputs.logits.shape == (6, 5) and outputs.features.shape == (6, 8)
    assert outputs.logits.dtype == outputs.features.dtype == jnp.float32


def test_resnet18_halves_the_image_three_times_into_512_features():
    classifier = models.build("resnet18", **RESNET18)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((7, 32, 32, 3), jnp.uint8)
    found = jax.eval_shape(lambda variables, x: classifier.apply(variables, x, taps=True), shapes, images)
    assert found.logits.shape == (7, 10) and found.features.shape == (7, 512)
    assert found.taps["layer4_1/conv2"].shape == (7, 4, 4, 512)
    assert len(found.taps) == 17  # of its 20 convolutions, all but the shortcuts'


def test_features_feed_the_head(network, variables, outputs):
    head = variables["params"][network.head[0]]
    assert network.head_kernel(variables["params"]) is head["kernel"] and head["kernel"].shape == (8, 5)
    np.testing.assert_allclose(outputs.logits, outputs.features @ head["kernel"] + head["bias"], atol=1e-5)


def test_taps_are_the_outputs_of_the_named_convolutions(outputs, network, variables, pixels):
    shapes = {name: tap.shape[1:] for name, tap in outputs.taps.items()}
    first = dict.fromkeys(("conv1", "layer1_0/conv1", "layer1_0/conv2"), (16, 16, 4))
    assert shapes == first | dict.fromkeys(("layer2_0/conv1", "layer2_0/conv2"), (8, 8, 8))
    assert all((tap < 0).any() for tap in outputs.taps.values())  # before their norm and activation
    padded = np.pad(((pixels / 255 - [0.4914, 0.4822, 0.4465]) / [0.247, 0.243, 0.261]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = np.einsum("nijc,ijcf->nf", padded[:, 4:7, 9:12], variables["params"]["conv1"]["kernel"])
    np.testing.assert_allclose(outputs.taps["conv1"][:, 4, 9], corner, atol=1e-4)


def test_without_asking_there_are_no_taps_and_no_new_statistics(network, variables, pixels):
    found = network.apply(variables, pixels)
    assert found.taps is None and found.statistics is None


def test_every_convolution_has_its_norm_with_as_many_channels(network, variables):
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    shapes = {tuple(part.key for part in path): leaf.shape for path, leaf in flat}
    convolutions = {path[:-1]: shape[-1] for path, shape in shapes.items() if len(shape) == 4}
    scales = {path[:-1]: shape[0] for path, shape in shapes.items() if path[-1] == "scale"}
    assert {pair.conv for pair in network.norms} == set(convolutions) and len(network.norms) == len(convolutions) == 6
    assert {pair.norm for pair in network.norms} == set(scales)
    assert all(convolutions[pair.conv] == scales[pair.norm] for pair in network.norms)


@pytest.mark.parametrize(
    ("name", "count", "channels"),
    [("resnet18", 20, 4800), ("preact_resnet18", 16, 3392), ("vgg19_bn", 16, 5504), ("wide_resnet16", 13, 464)],
)
def test_every_norm_of_a_network_is_described(name, count, channels):
    network = models.build(name, num_classes=10, image_shape=(32, 32, 3))
    params = jax.eval_shape(network.init, jax.random.key(0))["params"]
    scales = {
        "/".join(key.key for key in path[:-1]): leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "scale"
    }
    assert set(network.all_norms) == set(scales) and (len(scales), sum(scales.values())) == (count, channels)


def test_bfloat16_is_close_to_float32_and_still_gives_float32(network, variables, pixels, outputs):
    narrow = dataclasses.replace(network, module=network.module.clone(dtype=jnp.bfloat16))
    found = narrow.apply(variables, pixels)
    assert found.logits.dtype == jnp.float32
    np.testing.assert_allclose(found.logits, outputs.logits, atol=0.05)
    assert np.abs(found.logits - outputs.logits).max() > 0  # it did compute in bfloat16
    np.testing.assert_array_equal(narrow.in_float32().apply(variables, pixels).logits, outputs.logits)


def test_in_evaluation_mode_an_image_does_not_depend_on_its_batch(network, variables, pixels, outputs):
    alone = network.apply(variables, pixels[2:3])
    np.testing.assert_allclose(alone.logits, outputs.logits[2:3], atol=1e-5)


def test_in_training_mode_it_does_and_the_statistics_move(network, variables, pixels, outputs):
    found, part = (network.apply(variables, images, train=True) for images in (pixels, pixels[:3]))
    assert np.abs(found.logits[:3] - part.logits).max() > 1e-3
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), found.statistics, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_uint8_and_float_pixels_are_the_same_image(network, variables, pixels, outputs):
    np.testing.assert_array_equal(network.apply(variables, pixels.astype(np.float32), taps=True).logits, outputs.logits)


def test_the_same_key_gives_the_same_parameters_and_another_key_others(network, variables):
    again, other = network.init(keys.root(0)), network.init(keys.root(1))
    jax.tree.map(np.testing.assert_array_equal, again["params"], variables["params"])
    assert not np.array_equal(other["params"]["conv1"]["kernel"], again["params"]["conv1"]["kernel"])


def test_every_option_of_a_network_is_one_of_the_configs():
    section = base.get_config().model.to_dict().keys() | {"dtype"}
    assert all(models.options(name).keys() <= section for name in models.names())
    with pytest.raises(UserError, match="model.patch is no setting of resnet18; it has width, stages, mean, std, dtype"):
        models.build("resnet18", **RESNET18, patch=4)


def test_an_unknown_network_or_an_empty_stage_is_refused():
    with pytest.raises(UserError, match='unknown model "resnet19"; known: .*resnet18'):
        models.build("resnet19", **RESNET18)
    assert "resnet18" in models.names()
    for wrong in ({"width": 0}, {"stages": (2, 0)}, {"stages": ()}):
        with pytest.raises(UserError, match="model.width and every entry of model.stages must be at least 1"):
            models.build("resnet18", **RESNET18, **wrong)
