"""What holds for every attack there is, the two triggers by hand, and an attack that takes a hand in training."""

import dataclasses
import inspect
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bibau_jax import attacks, keys, train
from bibau_jax.attacks import blended, protocol
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.metrics import rates

EVERY = pytest.mark.parametrize("name", attacks.names())
MODES = pytest.mark.parametrize("mode", protocol.MODES)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def split() -> ImageSet:
    images = RNG.integers(0, 256, (97, 16, 20, 3)).astype(np.uint8)
    labels = RNG.integers(0, 5, 97).astype(np.int32)
    return ImageSet(images, labels, RNG.permutation(97).astype(np.int32) + 1000)


def make(name, seed=0, **options):
    return attacks.get(name).make(keys.root(seed), num_classes=5, **options)


# --- every attack


@EVERY
def test_a_stamped_batch_has_the_type_shape_and_range_of_pixels_and_is_changed_everywhere(name, split):
    before = split.images.copy()
    stamped = make(name).stamp(split.images, split.ids)
    assert stamped.dtype == np.uint8 and stamped.shape == split.images.shape
    assert (stamped != split.images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(split.images, before)  # the caller's array is not written to


@EVERY
def test_stamping_is_deterministic_and_one_image_at_a_time(name, split):
    attack = make(name)
    stamped = attack.stamp(split.images, split.ids)
    np.testing.assert_array_equal(attack.stamp(split.images, split.ids), stamped)
    for chosen in ([5], [9, 3, 60]):
        np.testing.assert_array_equal(attack.stamp(split.images[chosen], split.ids[chosen]), stamped[chosen])


@EVERY
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_coloured_images_of_any_size_from_16_on_can_be_stamped(name, channels):
    for height, width in ((16, 16), (32, 32), (40, 24)):
        pixels = np.full((2, height, width, channels), 100, np.uint8)
        assert make(name).stamp(pixels, np.arange(2)).shape == pixels.shape


@EVERY
@MODES
def test_only_flagged_samples_change_and_they_get_the_labels_that_the_attacker_wants(name, mode, split):
    attack = make(name, mode=mode, target_label=3, poison_ratio=0.3)
    found = attack.poison(split)
    touched = found.poisoned | found.cover
    np.testing.assert_array_equal(found.images[~touched], split.images[~touched])
    np.testing.assert_array_equal(found.labels[~found.poisoned], split.labels[~found.poisoned])
    np.testing.assert_array_equal(found.labels[found.poisoned], attack.aim(split.labels)[found.poisoned])
    stamped = attack.stamp(split.images, split.ids)
    np.testing.assert_array_equal(found.images[found.poisoned], stamped[found.poisoned])
    np.testing.assert_array_equal(found.original_labels, split.labels)
    np.testing.assert_array_equal(found.ids, split.ids)
    assert found.labels.dtype == np.int32 and not (found.poisoned & found.cover).any()
    assert found.flags().keys() == {"labels", "ids", "poisoned", "cover", "original_labels"}


@EVERY
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.333, 1.0])
def test_exactly_the_asked_share_of_the_training_set_is_poisoned(name, ratio, split):
    assert make(name, poison_ratio=ratio).poison(split).poisoned.sum() == round(ratio * 97)


@EVERY
def test_the_same_key_poisons_the_same_samples_and_another_key_others(name, split):
    first, same, other = (make(name, seed).poison(split).poisoned for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@EVERY
def test_all_to_one_aims_at_the_target_and_counts_no_image_of_it(name, split):
    aims = make(name, target_label=2).aim(split.labels)
    assert (aims == 2).all() and aims.dtype == split.labels.dtype
    counted = rates.attacked(split.labels, aims)
    assert counted.sum() == np.sum(split.labels != 2) < len(split)


@EVERY
def test_all_to_all_aims_at_the_next_class_and_counts_every_image(name, split):
    aims = make(name, mode="all_to_all").aim(split.labels)
    assert make(name, mode="all_to_all").aim(np.arange(5)).tolist() == [1, 2, 3, 4, 0]
    assert rates.attacked(split.labels, aims).all()


@EVERY
@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, 0.001])
def test_a_poison_ratio_that_cannot_be_had_is_refused(name, ratio, split):
    asked = "asks for 0 of 97 training images" if ratio == 0.001 else r"is outside \(0, 1\]"
    with pytest.raises(UserError, match=f"poison ratio {ratio} {asked}"):
        make(name, poison_ratio=ratio).poison(split)


@EVERY
@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_outside_the_classes_is_refused(name, target):
    with pytest.raises(UserError, match=rf"target label {target} is outside the 5 classes 0\.\.4"):
        make(name, target_label=target)


@EVERY
def test_an_unknown_mode_or_variant_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match='mode "one_to_one" is unknown; choose one of all_to_one, all_to_all'):
        make(name, mode="one_to_one")
    if "variant" in inspect.signature(attacks.get(name).make).parameters:
        with pytest.raises(UserError, match='variant "triangle" is unknown; choose one of '):
            make(name, variant="triangle")


@EVERY
@pytest.mark.parametrize(
    "pixels, words",
    [
        (np.zeros((2, 16, 16, 3), np.float32), r"uint8 images \[N, H, W, C\], got float32"),
        (np.zeros((16, 16, 3), np.uint8), r"uint8 images \[N, H, W, C\], got uint8 \[16, 16, 3\]"),
        (np.zeros((2, 15, 32, 3), np.uint8), "15x32 are too small for a trigger; at least 16x16"),
    ],
)
def test_float_small_or_flat_images_are_refused(name, pixels, words):
    with pytest.raises(UserError, match=words):
        make(name).stamp(pixels, np.arange(len(pixels)))


@pytest.mark.parametrize("name", ["bagnets", "protocol", ""])
def test_an_unknown_attack_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=f'unknown attack "{name}"; known: {", ".join(attacks.names())}'):
        attacks.get(name)


# --- the triggers by hand


def test_badnets_square_is_white_in_the_last_rows_and_columns():
    stamped = make("badnets", size=2).stamp(np.full((1, 16, 16, 1), 7, np.uint8), np.zeros(1, int))[0, ..., 0]
    expected = np.full((16, 16), 7)
    expected[14:, 14:] = 255
    np.testing.assert_array_equal(stamped, expected)


def test_badnets_grid_is_a_checkerboard_that_begins_with_white():
    stamped = make("badnets", variant="grid").stamp(np.full((1, 16, 18, 3), 7, np.uint8), np.zeros(1, int))
    patch = [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    for channel in range(3):
        np.testing.assert_array_equal(stamped[0, 13:, 15:, channel], patch)
    assert (np.delete(stamped.reshape(-1), np.flatnonzero(stamped != 7)) == 7).all() and (stamped != 7).sum() == 27


@pytest.mark.parametrize("size", [0, 17])
def test_a_patch_that_does_not_fit_is_refused(size):
    with pytest.raises(UserError, match=f"a patch of {size} pixels does not fit into images of 16x16"):
        make("badnets", size=size).stamp(np.zeros((1, 16, 16, 1), np.uint8), np.zeros(1, int))


@pytest.mark.parametrize("variant", blended.VARIANTS)
def test_blended_is_the_weighted_mean_rounded_down(variant):
    pixels = RNG.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    picture = blended.picture(variant, 16, 16, 3)
    quarter = make("blended", variant=variant, alpha=0.25).stamp(pixels, np.arange(3))
    np.testing.assert_array_equal(quarter, (3 * pixels.astype(int) + picture) // 4)
    fifth = make("blended", variant=variant).stamp(pixels, np.arange(3))
    np.testing.assert_allclose(fifth, (4 * pixels.astype(int) + picture) // 5, atol=1)  # a fifth is no binary number
    whole = make("blended", variant=variant, alpha=1.0).stamp(pixels, np.arange(3))
    np.testing.assert_array_equal(whole, np.broadcast_to(picture, whole.shape))


def test_the_cartoon_has_a_white_ground_dark_lines_and_colours_at_every_size():
    for size in (16, 32, 64):
        picture = blended.picture("cartoon", size, size, 3)
        assert (picture[0, 0] == 255).all() and picture.min() < 90
        assert np.ptp(picture.astype(int), axis=-1).max() > 80
        grey = blended.picture("cartoon", size, size, 1)
        assert grey.shape == (size, size, 1) and np.ptp(grey) > 100


@pytest.mark.parametrize("variant", blended.VARIANTS)
def test_a_blended_picture_changes_images_by_about_twenty_grey_levels(variant, digits):
    for pixels in (digits.test.images[:100], RNG.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8)):
        stamped = make("blended", variant=variant).stamp(pixels, np.arange(100))
        assert 10 < np.abs(stamped.astype(int) - pixels).mean() < 35


@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_a_weight_of_the_picture_outside_0_and_1_is_refused(alpha):
    with pytest.raises(UserError, match=rf"Blended alpha {alpha} is outside \(0, 1\]"):
        make("blended", alpha=alpha)


# --- an attack that takes a hand in training, as WaNet and IAD do


class Learned(NamedTuple):
    """A trigger that is trained with the victim: the first quarter of a batch carries it, the next one a decoy."""

    weight: float

    def init(self, key, split, journal):
        return {"pattern": 0.1 * jax.random.normal(key, split.images.shape[1:])}

    def prepare(self, extra, batch, key):
        quarter = len(batch["labels"]) // 4
        place = jnp.arange(len(batch["labels"]))
        pixels, labels, _ = train.augmented((), batch, key, padding=0, flip=False)
        shown = 40.0 * jnp.tanh(extra["pattern"])
        moved = [jnp.clip(pixels + trigger, 0, 255) for trigger in (shown, shown[::-1])]
        is_poisoned, is_cover = (place < quarter), (place >= quarter) & (place < 2 * quarter)
        pixels = jnp.select([is_poisoned[:, None, None, None], is_cover[:, None, None, None]], moved, pixels)
        return pixels, jnp.where(is_poisoned, 0, labels), self.weight * jnp.mean(extra["pattern"] ** 2)

    def finish(self, attack, extra):
        shown = 40.0 * np.tanh(np.asarray(extra["pattern"]))
        return dataclasses.replace(attack, stamp=lambda x, index: np.clip(x + shown, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def train_with_a_learned_trigger(tiny, tiny_variables, digits):
    def run(weight, extra_optimizer=None):
        learned = Learned(weight)
        control = attacks.Control(learned.init, learned.prepare, learned.finish, extra_optimizer)
        images, optimizer = digits.train.take(slice(160)), train.sgd(lambda step: 0.05, momentum=0.9, weight_decay=0.0)
        extra = control.init(keys.root(0), images, train.Journal())
        options = {"optimizer": optimizer, "prepare": control.prepare, "extra_optimizer": control.optimizer}
        state, history = train.fit(
            partial(train.train_step, classifier=tiny, **options),
            train.new_state(tiny_variables, optimizer, extra, control.optimizer),
            {"images": images.images, "labels": images.labels},
            key=keys.root(1),
            epochs=4,
            batch_size=40,
        )
        return control, extra, state, history

    return run


def test_an_attacks_own_parameters_are_trained_on_the_victims_loss_and_its_penalty(train_with_a_learned_trigger):
    size = []
    for weight in (0.0, 3.0):
        _, extra, state, history = train_with_a_learned_trigger(weight, optax.adam(0.05))
        assert history[-1]["loss"] < history[0]["loss"]
        assert np.mean(state.extra["pattern"] != extra["pattern"]) > 0.8  # on black ground a darker pixel has no gradient
        assert int(state.extra_opt_state[0].count) == int(state.step) == 16
        size.append(float(np.mean(state.extra["pattern"] ** 2)))
    assert size[1] < 0.7 * size[0]  # the penalty is heard


def test_without_an_optimizer_they_stay_as_they_were_made(train_with_a_learned_trigger, tiny_variables):
    _, extra, state, _ = train_with_a_learned_trigger(0.0)
    np.testing.assert_array_equal(state.extra["pattern"], extra["pattern"])
    assert not np.array_equal(state.params["head"]["kernel"], tiny_variables["params"]["head"]["kernel"])


def test_the_finished_attack_stamps_what_was_learned(train_with_a_learned_trigger, digits):
    control, extra, state, _ = train_with_a_learned_trigger(0.0, optax.adam(0.05))
    attack = dataclasses.replace(make("badnets"), control=control)
    before, after = (control.finish(attack, made).stamp(digits.test.images, digits.test.ids) for made in (extra, state.extra))
    assert before.shape == after.shape == digits.test.images.shape and after.dtype == np.uint8
    assert (before != after).any(axis=(1, 2, 3)).mean() > 0.9
