"""The three orders of learning: who sees what when, and one whole small experiment that goes on where it was cut off."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from bibau_jax import attacks, keys, records
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.theory import task_stream
from tests.conftest import SMALL

SHARES = {"epochs": 10, "first_epochs": 3, "clean_share": 0.1, "poison_share": 0.1, "poisoned_images": 2}


@pytest.fixture(scope="module")
def told(digits):
    attack = attacks.get("badnets").make(keys.root(0), num_classes=10, poison_ratio=0.1)
    poisoned = attack.poison(digits.train.take(slice(0, 400)))
    return poisoned, task_stream.phases(keys.root(1), poisoned, **SHARES)


def test_every_setting_lasts_as_long_and_sees_what_the_paper_says(told):
    poisoned, settings = told
    bad = poisoned.poisoned.sum()
    assert bad == 40 and {sum(phase.epochs for phase in parts) for parts in settings.values()} == {10}
    sizes = {
        name: [
            (phase.task, int(poisoned.poisoned[phase.images.ids].sum()), int((~poisoned.poisoned[phase.images.ids]).sum()))
            for phase in parts
        ]
        for name, parts in settings.items()
    }
    assert sizes == {
        "together": [("both", 40, 360)],
        "backdoor_first": [("backdoor", 40, 36), ("clean", 4, 360)],
        "clean_first": [("clean", 2, 360), ("backdoor", 40, 36)],
    }


def test_the_images_are_the_poisoned_sets_under_its_labels(told):
    poisoned, settings = told
    phase = settings["backdoor_first"][0]
    np.testing.assert_array_equal(phase.images.images, poisoned.images[phase.images.ids])
    np.testing.assert_array_equal(phase.images.labels, poisoned.labels[phase.images.ids])
    assert isinstance(phase.images, ImageSet) and len(set(phase.images.ids)) == len(phase.images)


def test_a_first_phase_as_long_as_everything_is_refused(told):
    with pytest.raises(UserError, match="stream.first_epochs=10 must lie between 0 and stream.epochs=10"):
        task_stream.phases(keys.root(1), told[0], **(SHARES | {"first_epochs": 10}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clean_share": 2.0}, "stream.clean_share=2.0 must lie in 0..1"),
        ({"poison_share": -0.1}, "stream.poison_share=-0.1 must lie in 0..1"),
        ({"poisoned_images": -1}, "stream.poisoned=-1 must not be negative"),
    ],
)
def test_shares_outside_their_range_are_refused(told, changes, words):
    with pytest.raises(UserError, match=words):
        task_stream.phases(keys.root(1), told[0], **(SHARES | changes))


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.001, 1), (0.5, 20)])
def test_a_share_is_one_image_at_least_and_none_only_at_0(told, share, count):
    _, last = task_stream.phases(keys.root(1), told[0], **(SHARES | {"poison_share": share}))["backdoor_first"]
    assert told[0].poisoned[last.images.ids].sum() == count


def test_a_set_without_poison_is_refused(told):
    innocent = dataclasses.replace(told[0], poisoned=np.zeros_like(told[0].poisoned))
    with pytest.raises(UserError, match="no image is poisoned, so there is no backdoor to learn"):
        task_stream.phases(keys.root(1), innocent, **SHARES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "stream.epochs and stream.batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "stream.learning_rate must be positive"),
        ({"momentum": 1.0}, "stream.momentum must lie in 0..1"),
        ({"schedule": "foo"}, 'learning rate schedule "foo" is unknown; choose one of cosine'),
        ({"clean_share": 2.0}, "stream.clean_share=2.0 must lie in 0..1"),
    ],
)
def test_a_mistake_costs_no_folder(config, changes, words, tmp_path):
    config["stream"] |= changes
    with pytest.raises(UserError, match=words):
        task_stream.run(config, str(tmp_path / "stream"))
    assert not (tmp_path / "stream").exists()


def test_a_config_of_something_else_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match="has no section stream; take configs/theory/task_stream.py"):
        task_stream.run(tiny_config(), str(tmp_path / "x"))


@pytest.fixture
def config():
    made = importlib.import_module("configs.theory.task_stream").get_config("digits")
    made.update_from_flattened_dict(SMALL | {"data.train_size": 500, "model.width": 8, "reactivate.test_size": 200})
    made.stream.update(epochs=8, first_epochs=3, batch_size=16, clean_share=0.2)
    return made.to_dict()


@pytest.mark.slow
def test_the_experiment_ends_with_a_record_and_a_picture_and_is_not_run_twice(config, tmp_path):
    folder = tmp_path / "stream"
    picture = task_stream.run(config, str(folder))
    assert picture.read_bytes().startswith(b"\x89PNG")
    study = records.read_study(folder / "task_stream.json")
    assert [[entry["epoch"] for entry in entries] for entries in study.found.values()] == [list(range(1, 9))] * 3
    assert [entry["task"] for entry in study.found["clean_first"]] == ["clean"] * 5 + ["backdoor"] * 3
    assert study.found["backdoor_first"][-1]["ca"] > study.found["backdoor_first"][2]["ca"] + 5
    assert study.found["clean_first"][-1]["asr"] > study.found["clean_first"][4]["asr"]
    assert not list(folder.rglob("checkpoints"))
    before = json.loads((folder / "task_stream.json").read_text())["found"]
    (folder / "clean_first.json").unlink()
    task_stream.run(config, str(folder))
    again = records.read_study(folder / "task_stream.json").found
    for name, entries in before.items():
        for one, other in zip(entries, again[name], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
            assert (one == other) == (name != "clean_first")  # seconds differ where it was run again


def test_an_attack_that_takes_a_hand_in_training_is_refused(config, tmp_path):
    config["attack"]["name"] = "wanet"
    with pytest.raises(UserError, match='attack "wanet" takes a hand in training'):
        task_stream.run(config, str(tmp_path / "stream"))
    assert not (tmp_path / "stream").exists()
