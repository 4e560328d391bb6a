"""Trainings that begin with the weights of a file."""

import jax
import numpy as np
import pytest

from bibau_jax import checkpoint, experiment, records
from bibau_jax.errors import UserError
from bibau_jax.importers import architectures, export, pretrained, rules, torch_file

HEADS = {"resnet18_imagenet": "fc.", "vgg19_bn": "classifier.6.", "clip_vit_b_32": "fc.", "preact_resnet18": "linear."}


def network(arrays):
    """(the arrays, what they are, that network for small images)."""
    found = architectures.guess(arrays)
    shape = {"num_classes": 10, "image_shape": (32, 32, 3), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    return arrays, found, architectures.classifier(found, **shape)


@pytest.mark.parametrize("name", HEADS)
def test_all_but_the_head_is_the_files(name, networks, tmp_path):
    arrays, found, classifier = network(networks[name])
    theirs = rules.to_variables(arrays, found.table, jax.eval_shape(classifier.init, jax.random.key(0))).variables
    own = classifier.init(jax.random.key(1))
    other = {key: value[:7] for key, value in arrays.items() if key.startswith(HEADS[name])}  # of seven classes
    assert other
    for left in (arrays | other, {key: value for key, value in arrays.items() if key not in other}):
        export.write(path := tmp_path / f"{len(left)}.safetensors", left)
        begun = pretrained.begin(path, classifier, own, name=name)
        head = begun["params"].pop("head")
        jax.tree.map(np.testing.assert_array_equal, head, own["params"]["head"])
        rest = theirs | {"params": {key: value for key, value in theirs["params"].items() if key != "head"}}
        jax.tree.map(np.testing.assert_array_equal, begun, rest)


def test_of_a_whole_clip_the_image_encoder_is_taken(networks, tmp_path):
    arrays, _, classifier = network(networks["clip_vit_b_32"])
    tower = {key.removeprefix("visual."): value for key, value in arrays.items() if not key.startswith("fc.")}
    text = {"token_embedding.weight": np.zeros((5, 4)), "logit_scale": np.zeros(())}
    text |= {key: np.zeros_like(value) for key, value in tower.items() if key.startswith("transformer.")}
    export.write(tmp_path / "whole.safetensors", text | {f"visual.{key}": value for key, value in tower.items()})
    export.write(tmp_path / "tower.safetensors", tower)
    own = classifier.init(jax.random.key(1))
    begun = [pretrained.begin(tmp_path / f"{n}.safetensors", classifier, own, name="clip_vit_b_32") for n in ("whole", "tower")]
    jax.tree.map(np.testing.assert_array_equal, *begun)
    assert np.any(begun[0]["params"]["block_0"]["qkv"]["kernel"])


def test_what_does_not_fit_is_told_before_training(networks, tiny_config, tmp_path):
    export.write(path := tmp_path / "vgg.safetensors", networks["vgg19_bn"])
    for start, words in ((path, "vgg.safetensors: the weights do not fit this network"), (tmp_path / "no.pth", "No such file")):
        with pytest.raises(UserError, match=words):
            experiment.run(tiny_config({"implant.start": str(start)}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_backdoored_model_and_twin_begin_with_the_file_and_the_record_names_it(tiny_config, tmp_path):
    plain = {"implant.epochs": 1, "implant.clean_twin": "train", "stages": "implant,evaluate"}
    experiment.run(tiny_config(plain), str(tmp_path / "first"))
    variables = checkpoint.load(tmp_path / "first" / "implant" / "model")[0]["variables"]
    export.write(start := tmp_path / "start.safetensors", rules.named(variables))
    still = {"implant.start": str(start), "implant.learning_rate": 1e-9, "implant.schedule": "constant"}
    experiment.run(tiny_config(plain | still), str(tmp_path / "second"))
    for stage in ("implant", "clean"):
        after = checkpoint.load(tmp_path / "second" / stage / "model")[0]["variables"]["params"]
        for name in after.keys() - {"head"}:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after[name], variables["params"][name])
        assert np.abs(after["head"]["kernel"] - variables["params"]["head"]["kernel"]).max() > 0.01
    told = records.read(tmp_path / "second" / "record.json").metrics["backdoored"].extra
    assert told["start_sha256"] == torch_file.sha256(start)
