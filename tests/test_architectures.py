"""Which network a file holds: told by its keys and shapes, asked for where they do not tell, refused where none fits."""

from pathlib import Path

import jax
import numpy as np
import pytest

from bibau_jax import models
from bibau_jax.errors import UserError
from bibau_jax.importers import architectures, rules

FOLDER = Path(__file__).parent / "torch"
DATA = {"num_classes": 10, "image_shape": (16, 16, 3), "mean": (0.5,) * 3, "std": (0.2,) * 3}


def as_torch(classifier, names: dict[str, str]) -> dict[str, np.ndarray]:
    """Arrays of a network's shapes under PyTorch's layouts, by names that `names` makes of our modules' paths."""
    arrays, leaves = {}, {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(classifier.init, jax.random.key(0))):
        _, *modules, last = (part.key for part in path)
        name = "/".join(modules)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        array = np.ones(leaf.shape, np.float32)
        arrays[f"{name}.{leaves[last]}"] = rules.turned_back(array) if last == "kernel" else array
    return arrays


OF_RESNET = {"layer1_": "layer1.", "layer2_": "layer2.", "/shortcut_conv": ".downsample.0", "/shortcut_bn": ".downsample.1"}
OF_RESNET |= {"head": "fc", "/": "."}


@pytest.mark.parametrize(
    "name, options",
    [
        ("wide_resnet16", {"width": 16, "stages": (2, 2, 2)}),
        ("resnet20", {"width": 8, "stages": (3, 3, 3)}),
        ("resnet18_imagenet", {"width": 4, "stages": (1, 1)}),
        ("preact_resnet18", {"width": 4, "stages": (2, 1)}),
        ("vgg19_bn", {"width": 2, "stages": (1, 1, 2, 1, 1), "hidden": 16}),
        ("vit_b_32", {"width": 16, "stages": (2,), "heads": 1, "patch": 8, "size": 24}),
        ("clip_vit_b_32", {"width": 16, "stages": (2,), "heads": 1, "patch": 8, "size": 16, "projection": 12}),
    ],
)
def test_a_network_and_its_sizes_are_read_from_names_and_shapes(name, options, networks):
    found = architectures.guess(networks[name])
    assert (found.name, found.options, found.channels) == (name, {"num_classes": 10} | options, 3)
    assert architectures.by_name(name, networks[name]) == found


def test_every_network_that_is_built_can_be_imported():
    assert sorted(architectures.NETWORKS) == models.names()


def test_a_stem_of_three_by_three_is_that_of_small_images():
    network = models.build("resnet18", **DATA, width=4, stages=(2, 1))
    found = architectures.guess(as_torch(network, OF_RESNET))
    assert (found.name, found.options) == ("resnet18", {"num_classes": 10, "width": 4, "stages": (2, 1)})


def test_a_vgg_without_hidden_layers_is_found_too():
    network = models.build("vgg19_bn", **DATA, width=2, stages=(1, 2), hidden=0)
    found = architectures.guess(as_torch(network, {"features_": "features.", "head": "classifier"}))
    assert found.options == {"num_classes": 10, "width": 2, "stages": (1, 2), "hidden": 0}


def test_names_and_shapes_of_two_networks_are_decided_by_a_name():
    arrays = as_torch(models.build("resnet18", **DATA, width=4, stages=(2,)), OF_RESNET)
    with pytest.raises(UserError, match="those of resnet18 or of resnet20, which have the same names and shapes: name one"):
        architectures.guess(arrays)
    assert architectures.by_name("resnet20", arrays).options == {"num_classes": 10, "width": 4, "stages": (2,)}


def test_the_keys_of_a_stranger_are_refused_in_one_line():
    arrays = {f"backbone.stage{number}.weight": np.zeros((2, 2, 3, 3)) for number in range(9)}
    with pytest.raises(
        UserError, match=r"no network that is known \(resnet18, .*\); the file has backbone.stage0.weight, "
    ) as told:
        architectures.guess(arrays)
    assert "\n" not in str(told.value) and "stage6" not in str(told.value) and "--config.model.file" in str(told.value)
    with pytest.raises(UserError, match="the weights are not those of vgg19_bn; the file has backbone.stage0.weight, "):
        architectures.by_name("vgg19_bn", arrays)
    with pytest.raises(UserError, match='unknown model "resnet19"; known: clip_vit_b_32'):
        architectures.by_name("resnet19", arrays)
    with pytest.raises(UserError, match="no network that is known"):
        architectures.guess({})


@pytest.mark.parametrize(
    "name, changed, words",
    [
        ("preact_resnet18", {"layer1.0.conv3.weight": np.zeros((4, 4, 1, 1))}, r"1 left over \(layer1.0.conv3.weight\)"),
        ("vgg19_bn", {"classifier.3.bias": np.zeros(3)}, r"1 of another shape \(params/classifier_3/bias \[3\] for \[16\]\)"),
        ("vit_b_32", {"1.encoder.pos_embedding": np.zeros((1, 12, 16))}, r"1 of another shape \(params/positions \[12, 16\]"),
        ("vgg19_bn", {"classifier.6.weight": np.zeros((0, 16))}, r"2 of another shape \(params/head/bias \[10\] for \[1\]"),
        (
            "vgg19_bn",
            {"features.0.weight": np.zeros((2, 0, 3, 3))},
            r"1 of another shape \(params/features_0/kernel \[3, 3, 0",
        ),
        ("vgg19_bn", {"features.0.weight": np.zeros((0, 3, 3, 3))}, "model.width and every entry of model.stages must be at "),
        ("vit_b_32", {"1.conv_proj.weight": np.zeros((16, 3, 8, 7))}, r"1 of another shape \(params/patches/kernel \[8, 7"),
    ],
)
def test_what_does_not_fit_the_likeliest_network_is_told(name, changed, words, networks):
    with pytest.raises(UserError, match=f"look like those of {name}, but do not fit it: {words}"):
        architectures.guess(networks[name] | changed)
    with pytest.raises(UserError, match=f"the weights do not fit {name}: {words}"):
        architectures.by_name(name, networks[name] | changed)


def test_an_image_encoder_without_a_head_is_no_classifier(networks):
    tower = {name: array for name, array in networks["clip_vit_b_32"].items() if not name.startswith("fc.")}
    with pytest.raises(UserError, match=r"like those of clip_vit_b_32, .* 2 missing \(params/head/bias, params/head/kernel\)"):
        architectures.guess(tower)


def test_data_of_other_classes_or_channels_are_refused(networks):
    found = architectures.guess(networks["vgg19_bn"])
    with pytest.raises(UserError, match="the model has 10 classes, the data have 43"):
        architectures.classifier(found, **DATA | {"num_classes": 43})
    with pytest.raises(UserError, match="the model takes images of 3 channels, the data have 1"):
        architectures.classifier(found, **DATA | {"image_shape": (32, 32, 1)})
    with pytest.raises(
        UserError, match="a VGG of 5 stages halves images as often: 16x16 pixels are too few, it takes 32x32 or more"
    ):
        architectures.classifier(found, **DATA)


def test_what_the_file_cannot_tell_may_be_given(networks):
    found = architectures.guess(networks["vit_b_32"])
    assert architectures.classifier(found, **DATA, heads=4).module.heads == 4
    with pytest.raises(UserError, match="a ViT of width 16 cannot have 3 heads"):
        architectures.classifier(found, **DATA, heads=3)
    with pytest.raises(UserError, match="model.heads is no setting of vgg19_bn; it has "):
        architectures.classifier(architectures.guess(networks["vgg19_bn"]), **DATA, heads=2)
