"""Data sets by name, the digits, splits, and the real CIFAR-10 where it is at hand."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from bibau_jax import data, keys
from bibau_jax.data import Dataset, ImageSet, digits, splits
from bibau_jax.errors import UserError

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


def image_set(labels):
    labels = np.asarray(labels, np.int32)
    images = np.zeros((len(labels), 2, 2, 1), np.uint8)
    return ImageSet(images, labels, np.arange(len(labels), dtype=np.int32) + 100)


@pytest.fixture(scope="module")
def handwritten():
    return data.load("digits")


def divide(train, seed=0, **sizes):
    return splits.divide(keys.root(seed), train, **{"train_size": 0, "clean_size": 10, "validation_size": 0, **sizes})


def test_data_sets_are_found_by_file_name_and_other_modules_are_not_listed():
    assert data.names() == ("cifar10", "digits", "gtsrb", "tiny_imagenet")


def test_listing_the_data_sets_imports_none_of_them():
    code = "import sys, bibau_jax.data; bibau_jax.data.names(); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "bibau_jax.data" in loaded and not {"sklearn", "tensorflow_datasets"} & set(loaded)


@pytest.mark.parametrize("name", ["cifar11", "splits", "../digits", ""])
def test_an_unknown_data_set_is_named_with_the_known_ones(name):
    with pytest.raises(UserError, match='unknown data set ".*"; known: .*cifar10, .*digits'):
        data.load(name)


def test_taking_images_keeps_image_label_and_id_together():
    taken = image_set([3, 1, 2, 0]).take(np.array([2, 0]))
    assert taken.labels.tolist() == [2, 3] and taken.ids.tolist() == [102, 100] and len(taken) == 2


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_an_error(label):
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.2, found"):
        Dataset("toy", image_set([0, 1]), image_set([label, 1]), ("a", "b", "c"))


def test_an_image_set_of_floats_or_of_unequal_lengths_is_refused():
    good = image_set([0, 1])
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(good.images.astype(np.float32), good.labels, good.ids)
    with pytest.raises(ValueError, match="ids must be int32"):
        ImageSet(good.images, good.labels, good.ids[:1])
    with pytest.raises(ValueError, match="groups must be int32"):
        dataclasses.replace(good, groups=good.labels[:1])


def test_digits_are_1297_and_500_images_of_ten_classes_that_share_none(handwritten):
    assert handwritten.num_classes == 10 and handwritten.image_shape == (16, 16, 1)
    assert (len(handwritten.train), len(handwritten.test)) == (1297, 500)
    ids = np.concatenate([handwritten.train.ids, handwritten.test.ids])
    assert sorted(ids) == list(range(1797))
    assert handwritten.train.images.max() == 255 and handwritten.train.images.min() == 0


def test_every_digit_gives_the_same_share_to_the_test_set(handwritten):
    train, test = (np.bincount(part.labels) for part in (handwritten.train, handwritten.test))
    np.testing.assert_allclose(test, (train + test) * 500 / 1797, atol=1)


def test_digits_are_divided_the_same_way_every_time(handwritten):
    again = data.load("digits")
    np.testing.assert_array_equal(again.test.ids, handwritten.test.ids)
    assert handwritten.test.ids[:6].tolist() == [9, 11, 15, 17, 18, 22]
    np.testing.assert_array_equal(again.train.images, handwritten.train.images)


def test_doubling_an_image_leaves_constants_and_ramps_as_they_are():
    assert np.all(digits.double_size(np.full((1, 3, 3), 7.0)) == 7)
    ramp = digits.double_size(np.arange(4.0)[None, None, :].repeat(4, 1))[0, 0]
    np.testing.assert_allclose(ramp, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_validation_and_training_images_are_disjoint_and_clean_ones_lie_in_training(handwritten):
    parts = divide(handwritten.train, train_size=800, clean_size=100, validation_size=200)
    train, clean, validation = (set(part.ids.tolist()) for part in (parts.train, parts.clean, parts.validation))
    assert (len(train), len(clean), len(validation)) == (800, 100, 200)
    assert not train & validation and clean <= train


def test_clean_images_are_the_originals_with_their_labels(handwritten):
    clean = divide(handwritten.train).clean
    place = {i: n for n, i in enumerate(handwritten.train.ids.tolist())}
    original = handwritten.train.take([place[i] for i in clean.ids.tolist()])
    np.testing.assert_array_equal(clean.images, original.images)
    np.testing.assert_array_equal(clean.labels, original.labels)


def test_train_size_zero_means_all_that_validation_leaves(handwritten):
    parts = divide(handwritten.train, train_size=0, validation_size=97)
    assert (len(parts.train), len(parts.validation)) == (1200, 97)


@pytest.mark.parametrize("clean_size", [10, 55, 500])
def test_the_clean_set_has_as_many_images_of_each_class_as_can_be(handwritten, clean_size):
    counts = np.bincount(divide(handwritten.train, clean_size=clean_size).clean.labels, minlength=10)
    assert counts.sum() == clean_size and counts.max() - counts.min() <= 1


def test_a_rare_class_gives_all_it_has_to_the_clean_set():
    counts = np.bincount(divide(image_set([0] * 50 + [1] * 3 + [2] * 50), clean_size=21).clean.labels)
    assert counts.tolist() == [9, 3, 9]


def test_the_same_key_divides_the_same_way_and_another_key_differently(handwritten):
    first, same, other = (divide(handwritten.train, seed, validation_size=50) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.validation.ids, same.validation.ids)
    np.testing.assert_array_equal(first.clean.ids, same.clean.ids)
    assert set(first.validation.ids.tolist()) != set(other.validation.ids.tolist())


def test_the_size_of_the_clean_set_does_not_change_the_other_parts(handwritten):
    small, large = (divide(handwritten.train, clean_size=n, validation_size=50) for n in (10, 400))
    np.testing.assert_array_equal(small.train.ids, large.train.ids)
    assert set(small.clean.ids.tolist()) <= set(large.clean.ids.tolist())


def test_sets_without_groups_are_divided_as_they_were_when_their_results_were_recorded(handwritten):
    parts = divide(handwritten.train, train_size=800, clean_size=100, validation_size=200)
    found = [part.ids.astype(int) for part in (parts.train, parts.clean, parts.validation)]
    assert found[0][:5].tolist() == [1702, 187, 909, 1261, 37] and found[2][:5].tolist() == [1793, 1653, 1569, 64, 833]
    assert [int(ids @ np.arange(len(ids))) for ids in found] == [293283409, 4490971, 17284454]


def grouped(count=300, size=7):
    """Images of three classes, `size` near-copies of each, in the order of a publisher; the last group is a single image."""
    train = image_set(np.arange(count) // size % 3)
    groups = (np.arange(count) // size).astype(np.int32) * 10
    groups[-1] = 5
    return dataclasses.replace(train, groups=groups)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("validation_size", [1, 7, 50, 52])
def test_a_group_is_never_on_both_sides_of_a_split(seed, validation_size):
    parts = divide(train := grouped(), seed, validation_size=validation_size)
    assert len(parts.validation) == validation_size
    assert not set(parts.validation.groups) & set(parts.train.groups)
    # Whole groups but for the last one, whose other images are in no part.
    assert 0 <= len(train) - len(parts.train) - validation_size < 7
    assert len(set(parts.validation.groups)) <= validation_size // 7 + 2
    assert set(parts.clean.ids) <= set(parts.train.ids)
    for part in (parts.train, parts.clean, parts.validation):
        np.testing.assert_array_equal(part.groups, train.groups[part.ids - 100])


def test_groups_change_nothing_where_nothing_is_held_out_and_training_images_stay_mixed():
    train = grouped()
    with_groups, without = (divide(one, train_size=60) for one in (train, dataclasses.replace(train, groups=None)))
    np.testing.assert_array_equal(with_groups.train.ids, without.train.ids)
    assert len(set(divide(train, train_size=60, validation_size=50).train.groups)) > 20


def test_training_images_that_groups_take_away_are_missed():
    with pytest.raises(UserError, match="train_size 299, validation_size 1, images 300, [1-6] of them near-copies"):
        divide(grouped(), train_size=299, validation_size=1)


def test_images_of_ones_own_are_divided_with_the_classes_in_their_shares():
    own = image_set(np.repeat([0, 1, 2, 7], [50, 25, 10, 4]))
    clean, held_out = splits.divide_own(keys.root(0), own, held_out_share=0.2)
    assert sorted([*clean.ids, *held_out.ids]) == own.ids.tolist() and len(held_out) == 18
    np.testing.assert_allclose(np.bincount(held_out.labels), [10, 5, 2, 0, 0, 0, 0, 1], atol=1)
    same, other = (splits.divide_own(keys.root(seed), own, held_out_share=0.2)[1] for seed in (0, 1))
    np.testing.assert_array_equal(same.ids, held_out.ids)
    assert set(other.ids) != set(held_out.ids)


@pytest.mark.parametrize("share", [-0.1, 0.0, 0.01, 0.99, 1.0])
def test_neither_part_of_ones_own_images_may_be_empty(share):
    with pytest.raises(UserError, match=f"data.held_out {share} of 20 images leaves one part empty"):
        splits.divide_own(keys.root(0), image_set([0, 1] * 10), held_out_share=share)


def test_a_class_is_never_held_out_whole():
    own = image_set([0] * 19 + [1])
    for seed in range(10):
        clean, held_out = splits.divide_own(keys.root(seed), own, held_out_share=0.5)
        assert 1 in clean.labels and len(clean) + len(held_out) == 20
    clean, held_out = splits.divide_own(keys.root(0), image_set([0, 1, 2] * 60), held_out_share=0.98)
    assert set(clean.labels) == set(held_out.labels) == {0, 1, 2} and len(clean) + len(held_out) == 180
    with pytest.raises(UserError, match="no image can be held out, for there is one of each class"):
        splits.divide_own(keys.root(0), image_set([0, 1, 2]), held_out_share=0.5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": -1}, "train_size must not be negative: -1"),
        ({"validation_size": -5}, "validation_size must not be negative: -5"),
        (
            {"train_size": 1200, "validation_size": 98},
            "larger than the data: train_size 1200, validation_size 98, images 1297",
        ),
        ({"train_size": 50, "clean_size": 60}, "clean set larger than the data: clean_size 60, training images 50"),
        ({"validation_size": 1297}, "clean set larger than the data: clean_size 10, training images 0"),
        ({"clean_size": 9}, "fewer images than classes: clean_size 9, classes 10"),
    ],
)
def test_sizes_that_cannot_be_had_are_one_line_errors(handwritten, sizes, message):
    with pytest.raises(UserError, match=message) as error:
        divide(handwritten.train, **sizes)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_cifar10_from_its_archive_is_the_real_set_and_loads_within_seconds(tmp_path):
    if not (SHARED / "make_archives.py").is_file():
        pytest.skip("the real images are not at hand")
    subprocess.check_call([sys.executable, SHARED / "make_archives.py", tmp_path / "manual", "cifar10"], cwd=SHARED)
    dataset = data.load("cifar10", data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
    spec = importlib.util.spec_from_file_location("load_data", SHARED / "load_data.py")
    spec.loader.exec_module(original := importlib.util.module_from_spec(spec))
    original = original.load_mosaic("cifar10")
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        np.testing.assert_array_equal(part.images, original[f"{split}_images"])
        np.testing.assert_array_equal(part.labels, original[f"{split}_labels"])
    start = time.monotonic()
    data.load("cifar10", data_dir=tmp_path / "data", download=False)
    assert time.monotonic() - start < 10
