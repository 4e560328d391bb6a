"""What holds for every attack there is, each trigger by hand, and an attack that takes a hand in training."""

import dataclasses
import inspect
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from bibau_jax import attacks, keys, train
from bibau_jax.attacks import adap_patch, blended, coupling, iad, issba, narcissus, networks, protocol, refool, wanet
from bibau_jax.data import ImageSet
from bibau_jax.errors import UserError
from bibau_jax.metrics import rates
from tests import regenerate

EVERY = pytest.mark.parametrize("name", attacks.names())
MODES = pytest.mark.parametrize("mode", protocol.MODES)
RNG = np.random.default_rng(0)
CLEAN_LABEL = {"sig", "narcissus"}  # change no label, and so poison the target class alone
DIRTY_LABEL = pytest.mark.parametrize("name", [name for name in attacks.names() if name not in CLEAN_LABEL])
OTHER_IN_TRAINING = {"refool", "narcissus", "adap_blend", "adap_patch", "enhanced_adap_blend", "enhanced_adap_patch"}


@pytest.fixture(scope="module")
def split() -> ImageSet:
    images = RNG.integers(0, 256, (97, 16, 20, 3)).astype(np.uint8)
    labels = RNG.integers(0, 5, 97).astype(np.int32)
    return ImageSet(images, labels, RNG.permutation(97).astype(np.int32) + 1000)


LEARNED, make = regenerate.LEARNED, regenerate.attack


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
    rounding = 1 if name in ("iad", "issba") else 0  # a convolution may sum in another order for fewer images
    for chosen in ([5], [9, 3, 60]):
        alone = attack.stamp(split.images[chosen], split.ids[chosen])
        np.testing.assert_allclose(alone.astype(int), stamped[chosen], atol=rounding)


@EVERY
def test_a_trigger_can_be_stamped_within_a_jitted_function(name, split):
    stamp, index = make(name).stamp, split.ids[:12]
    images = split.images[:12]
    inside = jax.jit(lambda pixels, index: stamp(pixels, index))(images, index)
    assert inside.dtype == np.uint8
    rounding = 0 if name in ("badnets", "sig", "adap_patch", "enhanced_adap_patch") else 1
    np.testing.assert_allclose(np.asarray(inside).astype(int), stamp(images, index), atol=rounding)


@EVERY
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_coloured_images_of_any_size_from_16_on_can_be_stamped(name, channels):
    for height, width in ((16, 16), (32, 32), (40, 24)):
        pixels = np.full((2, height, width, channels), 100, np.uint8)
        assert make(name, shape=pixels.shape[1:]).stamp(pixels, np.arange(2)).shape == pixels.shape


def modes_of(name):
    return ("all_to_one",) if name in CLEAN_LABEL else protocol.MODES


@pytest.mark.parametrize("name, mode", [(name, mode) for name in attacks.names() for mode in modes_of(name)])
def test_only_flagged_samples_change_and_they_get_the_labels_that_the_attacker_wants(name, mode, split):
    attack = make(name, mode=mode, target_label=3, poison_ratio=0.1)
    found = attack.poison(split)
    touched = found.poisoned | found.cover
    np.testing.assert_array_equal(found.images[~touched], split.images[~touched])
    np.testing.assert_array_equal(found.labels[~found.poisoned], split.labels[~found.poisoned])
    np.testing.assert_array_equal(found.labels[found.poisoned], attack.aim(split.labels)[found.poisoned])
    assert (found.images[touched] != split.images[touched]).any(axis=(1, 2, 3)).all()
    if name not in OTHER_IN_TRAINING:
        stamped = attack.stamp(split.images, split.ids)
        rounding = 1 if name in ("iad", "issba") else 0
        np.testing.assert_allclose(found.images[found.poisoned].astype(int), stamped[found.poisoned], atol=rounding)
    np.testing.assert_array_equal(found.original_labels, split.labels)
    np.testing.assert_array_equal(found.ids, split.ids)
    assert found.labels.dtype == np.int32 and not (found.poisoned & found.cover).any()
    assert found.flags().keys() == {"labels", "ids", "poisoned", "cover", "original_labels"}


@EVERY
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.333, 1.0])
def test_exactly_the_asked_share_of_the_training_set_is_poisoned(name, ratio, split):
    if name in CLEAN_LABEL and ratio > 0.1:
        with pytest.raises(UserError, match=rf"asks for {round(ratio * 97)} of 97 training images; \d+ can be poisoned"):
            make(name, poison_ratio=ratio).poison(split)
    elif ratio == 1.0 and name not in ("badnets", "blended", "refool", "issba", "patch"):
        with pytest.raises(UserError, match="covers|cross images"):
            make(name, poison_ratio=ratio).poison(split)
    else:
        found = make(name, poison_ratio=ratio).poison(split)
        assert found.poisoned.sum() == round(ratio * 97)


@EVERY
def test_poisoned_are_only_images_that_may_be(name, split):
    attack = make(name, target_label=3, poison_ratio=0.1)
    allowed = attack.may_poison(split.labels)
    assert allowed[attack.poison(split).poisoned].all() and allowed.dtype == bool
    np.testing.assert_array_equal(allowed, split.labels == 3 if name in CLEAN_LABEL else np.ones(97, bool))


@pytest.mark.parametrize("name", sorted(CLEAN_LABEL))
def test_an_attack_that_changes_no_label_has_one_target(name):
    with pytest.raises(UserError, match='one target: attack mode "all_to_all" cannot be had'):
        make(name, mode="all_to_all")


COVERED = [("wanet", 2), ("adap_blend", 1), ("adap_patch", 2), ("enhanced_adap_blend", 1), ("enhanced_adap_patch", 2)]


@pytest.mark.parametrize("name, covers", COVERED)
def test_covers_are_other_images_as_many_as_asked(name, covers, split):
    found = make(name, poison_ratio=0.1).poison(split)
    assert found.poisoned.sum() == 10 and found.cover.sum() == covers * 10
    assert not make(name, poison_ratio=0.1, covers_per_poison=0.0).poison(split).cover.any()
    with pytest.raises(UserError, match="covers"):
        make(name, poison_ratio=0.1, covers_per_poison=9.5).poison(split)


@EVERY
def test_the_same_key_poisons_the_same_samples_and_another_key_others(name, split):
    first, same, other = (make(name, seed, poison_ratio=0.1).poison(split).poisoned for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@EVERY
def test_all_to_one_aims_at_the_target_and_counts_no_image_of_it(name, split):
    aims = make(name, target_label=2).aim(split.labels)
    assert (aims == 2).all() and aims.dtype == split.labels.dtype
    counted = rates.attacked(split.labels, aims)
    assert counted.sum() == np.sum(split.labels != 2) < len(split)


@DIRTY_LABEL
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
        (np.zeros((2, 16, 16, 4), np.uint8), "grey or coloured images, not on 4 channels"),
    ],
)
def test_float_small_or_flat_images_are_refused(name, pixels, words):
    with pytest.raises(UserError, match=words):
        make(name).stamp(pixels, np.arange(len(pixels)))


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_a_trigger_that_has_not_been_trained_cannot_be_stamped(name, split):
    with pytest.raises(UserError, match=f"the trigger of {name} is trained while a model is implanted"):
        attacks.get(name).make(keys.root(0), num_classes=5).stamp(split.images, split.ids)


@pytest.mark.parametrize("name", ["bagnets", "protocol", ""])
def test_an_unknown_attack_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=f'unknown attack "{name}"; known: {", ".join(attacks.names())}'):
        attacks.get(name)


def crop_of_the_corner(key, pixels):
    """An augmentation whose doing can be told: everything moves two rows up, the last rows turn black."""
    return jnp.concatenate([pixels[:, 2:], 0 * pixels[:, :2]], axis=1)


@pytest.mark.parametrize("name", ["wanet", "iad", "enhanced_adap_blend"])
def test_a_trigger_is_stamped_before_the_crop_and_iads_after_it(name, split):
    images = ImageSet(split.images[:40, :, :16], split.labels[:40], split.ids[:40])
    attack, found = make(name, poison_ratio=0.1, shape=(16, 16, 3)), None
    batch = {"images": images.images, "labels": images.labels}
    if not attack.control.stamps:
        found = attack.poison(images)
        batch = {flag: getattr(found, flag) for flag in ("images", "labels", "poisoned", "cover")}
    extra = LEARNED[name]((16, 16, 3)) if name in LEARNED else ()
    pixels, *_ = attack.control.prepare(extra, batch, keys.root(1), augment=crop_of_the_corner)
    if name == "iad":
        assert np.asarray(pixels[:4, -2:]).max() > 0  # the trigger covers what the crop left black
    else:
        stamped = attack.stamp(images.images, images.ids) if found is None else found.images
        assert not np.asarray(pixels[:, -2:]).any()
        np.testing.assert_array_equal(np.asarray(pixels[:4, :-2]).astype(np.uint8), stamped[:4, 2:])


# --- the triggers by hand


@EVERY
def test_a_stamped_ramp_is_the_one_that_was_looked_at(name):
    with np.load(regenerate.FOLDER / "stamps.npz") as golden:
        then = golden[name]
    rounding = 0 if name in ("badnets", "sig", "blended", "adap_patch", "enhanced_adap_patch") else 1
    apart = np.abs(regenerate.stamps()[name].astype(int) - then)
    assert apart.max() <= rounding, regenerate.HOW


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


def test_the_random_pattern_is_uniform_noise_at_32_pixels():
    noise = blended.picture("noise", 32, 32, 3).astype(float)
    np.testing.assert_allclose(noise.mean((0, 1)), 127.5, atol=5)
    np.testing.assert_allclose(noise.std((0, 1)), 255 / 12**0.5, atol=5)
    np.testing.assert_array_equal(blended.picture("noise", 64, 64, 3)[::2, 1::2], noise)


@pytest.mark.parametrize("alpha", [0.0, 1.2])
def test_a_weight_of_the_picture_outside_0_and_1_is_refused(alpha):
    with pytest.raises(UserError, match=rf"Blended alpha {alpha} is outside \(0, 1\]"):
        make("blended", alpha=alpha)


def test_sig_is_a_sinusoid_along_the_columns():
    pixels = np.full((1, 16, 32, 3), 100, np.uint8)
    stamped = make("sig").stamp(pixels, np.zeros(1, int))[0]
    assert stamped[0, :5, 0].tolist() == [100, 136, 128, 84, 60]  # 0, 36.96, 28.28, -15.31, -40, rounded down
    assert (stamped == stamped[:1, :, :1]).all()
    dark, bright = (make("sig").stamp(np.full((1, 16, 32, 1), value, np.uint8), np.zeros(1, int)) for value in (0, 255))
    assert dark[0, 0, 4] == 0 and dark[0, 0, 1] == 36 and bright[0, 0, 1] == 255 and bright[0, 0, 4] == 215


def test_sig_can_count_over_the_target_class(split):
    found = make("sig", target_label=2, class_share=0.9).poison(split)
    assert found.poisoned.sum() == round(0.9 * np.sum(split.labels == 2)) and (split.labels[found.poisoned] == 2).all()
    for share, words in ((1.2, r"class_share 1.2 is outside \(0, 1\]"), (0.001, "class_share 0.001 asks for 0 of")):
        with pytest.raises(UserError, match=words):
            make("sig", class_share=share).poison(split)


def float64_reflection(image, scene, drawn, alpha):
    """The blend of `refool` for one image and scene, in loops."""
    image, scene = (image / 255.0) ** 2.2, (scene / 255.0) ** 2.2
    height, width, channels = image.shape
    if drawn["kind"] < 0.49:
        down, right = (3 + int(6 * u) for u in drawn["shifts"])
        share = abs(round(float(drawn["side"])) - (0.15 + 0.35 * drawn["share"]))
        padded = np.zeros((2, height + down, width + right, channels))
        padded[0, :height, :width], padded[1, down:, right:] = scene, scene
        mixed = (share * padded[0] + (1 - share) * padded[1])[down:-down, right:-right]
        reflected, tall, wide = np.zeros_like(scene), height - down, width - right
        for row, column in np.ndindex(height, width):
            r, c = ((place + 0.5) * small / size - 0.5 for place, small, size in ((row, tall, height), (column, wide, width)))
            r, c = np.clip(r, 0, tall - 1), np.clip(c, 0, wide - 1)
            top, left = min(int(r), tall - 2), min(int(c), wide - 2)
            for y, x in np.ndindex(2, 2):
                weight = abs(1 - y - (r - top)) * abs(1 - x - (c - left))
                reflected[row, column] += weight * mixed[top + y, left + x]
        return alpha * image + (1 - alpha) * reflected
    sigma, contrast = 1 + 4 * drawn["sigma"], 1.08 + drawn["contrast"] / 10
    radius = int(np.ceil(2 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    wide_scene = np.pad(scene, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    blurred = np.zeros_like(scene)
    for row, column in np.ndindex(height, width):
        window = wide_scene[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
        blurred[row, column] = (window * kernel[..., None]).sum((0, 1))
    for channel in range(channels):
        total = (blurred + image)[..., channel]
        level = max(1.0, total[total > 1].mean()) if (total > 1).any() else 1.0
        blurred[..., channel] = np.clip(blurred[..., channel] - (level - 1) * contrast, 0, 1)
    return alpha * image + (1 - alpha / 2) * blurred * refool.vignette(height, width)[..., None]


def test_refool_blends_a_ghost_or_a_blurred_scene_in_linear_light():
    pixels = RNG.integers(0, 256, (12, 16, 20, 3)).astype(np.uint8)
    attack, key = make("refool"), keys.root(0)
    stamped = attack.stamp(pixels, np.arange(12))
    names = ("scene", "kind", "side", "share", "sigma", "contrast")
    drawn = protocol.draws(key, np.arange(12), shifts=(2,), **dict.fromkeys(names, ()))
    pool, ghosts = refool.drawn_pool(16, 20, 3), 0
    for i in range(12):
        one = {name: values[i] for name, values in drawn.items()}
        light = float64_reflection(pixels[i], pool[int(one["scene"] * len(pool))], one, 0.4)
        np.testing.assert_allclose(stamped[i], np.floor(255 * np.clip(light, 0, 1) ** (1 / 2.2)), atol=1)
        ghosts += one["kind"] < 0.49
    assert 0 < ghosts < 12


def test_the_fade_of_a_blurred_reflection_has_the_values_of_the_original():
    fade = refool.vignette(32, 32)
    assert fade.max() == 1.0 and abs(fade.mean() - 0.31) < 0.01
    assert abs(fade[0, 16] - 0.104) < 0.01 and abs(fade[0, 0] - 0.011) < 0.002


def test_drawn_reflections_are_as_dark_smooth_and_varied_as_the_usual_photographs():
    pool = refool.drawn_pool(32, 32, 3)
    assert pool.shape == (200, 32, 32, 3) and pool.dtype == np.uint8
    values = pool.astype(float)
    np.testing.assert_allclose(values.mean((0, 1, 2)), refool.MEAN, atol=2)
    assert abs(values.mean((1, 2, 3)).std() - 42) < 2 and abs(values.std((1, 2)).mean() - 23) < 3
    grey = values.mean(-1) - values.mean((1, 2, 3))[:, None, None]
    power = np.abs(np.fft.fft2(grey)) ** 2
    low = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32))) < 0.125
    assert 0.6 < power[:, low].sum() / power.sum() < 0.95


def test_pictures_of_a_folder_can_be_reflected(tmp_path):
    Image.fromarray(np.full((40, 50, 3), 255, np.uint8)).save(tmp_path / "white.png")
    (tmp_path / "notes.txt").write_text("no picture")
    stamped = make("refool", pool=str(tmp_path)).stamp(np.zeros((8, 16, 16, 3), np.uint8), np.arange(8))
    assert (stamped > 20).any(axis=(1, 2, 3)).all()
    with pytest.raises(UserError, match="is no folder with pictures"):
        make("refool", pool=str(tmp_path / "nowhere")).stamp(np.zeros((1, 16, 16, 3), np.uint8), np.zeros(1, int))


def test_wanet_upsamples_as_pytorch_does():
    # torch.nn.functional.interpolate(mode="bicubic", align_corners=True) of [0, 1, 0, 0] from 4 to 7 values.
    found = wanet.cubic_weights(4, 7) @ [0.0, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(found, [0.0, 0.59375, 1.0, 0.59375, 0.0, -0.09375, 0.0], atol=1e-7)
    np.testing.assert_allclose(wanet.cubic_weights(4, 32).sum(1), 1.0)


def test_wanet_shifts_by_less_than_a_pixel():
    fields = np.stack([wanet.warping_field(keys.root(seed), 32, 32, 4) for seed in range(20)])
    pixels = 0.5 * fields * 31 / 32 / 2  # strength 0.5, in pixels: a grid unit is (32 - 1) / 2 of them
    assert 0.15 < np.abs(pixels).mean() < 0.21
    assert 0.4 < np.hypot(*np.moveaxis(pixels, 1, 0)).max(axis=(1, 2)).mean() < 0.8


def test_no_field_is_the_image_itself_and_half_a_pixel_the_mean_of_two():
    pixels = RNG.integers(0, 256, (2, 16, 20, 3)).astype(np.float32)
    np.testing.assert_allclose(wanet.warp(pixels, np.zeros((2, 16, 20))), pixels, atol=1e-2)
    right = np.stack([np.full((16, 20), 1 / 19), np.zeros((16, 20))])  # columns come first; 2 grid units are 19 pixels
    half = np.asarray(wanet.warp(pixels, right))
    np.testing.assert_allclose(half[:, :, :-1], (pixels[:, :, :-1] + pixels[:, :, 1:]) / 2, atol=1e-2)
    np.testing.assert_allclose(half[:, :, -1], pixels[:, :, -1], atol=1e-2)  # clamped at the edge
    each = np.broadcast_to(right, (2, 2, 16, 20))
    np.testing.assert_allclose(wanet.warp(pixels, each), half, atol=1e-3)


def test_a_batch_of_wanet_holds_poison_covers_and_clean_images_in_this_order():
    attack = make("wanet", target_label=3)
    batch = {
        "images": RNG.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8),
        "labels": RNG.integers(0, 5, 40).astype(np.int32),
    }
    run = jax.jit(partial(attack.control.prepare, augment=lambda key, pixels: pixels))
    pixels, labels, penalty, _ = run((), batch, keys.root(1))
    again, *_ = run((), batch, keys.root(2))
    np.testing.assert_array_equal(np.asarray(pixels[:4]).astype(np.uint8), attack.stamp(batch["images"][:4], np.arange(4)))
    np.testing.assert_array_equal(pixels[12:], batch["images"][12:])
    assert (labels[:4] == 3).all() and (labels[4:] == batch["labels"][4:]).all() and penalty == 0
    for covers in (pixels[4:12], again[4:12]):  # a jitter of their own, new every time
        warped = attack.stamp(batch["images"][4:12], np.arange(8))
        assert (np.abs(np.asarray(covers) - warped).max(axis=(1, 2, 3)) > 5).all()
    assert (np.asarray(pixels[4:12]) != np.asarray(again[4:12])).any() and (pixels[:4] == again[:4]).all()


def test_a_batch_too_small_for_a_poison_gets_one_now_and_then():
    counted = [protocol.counts_of_batch(keys.root(seed), 10, 0.05, 2.0) for seed in range(200)]
    assert {pair[:2] for pair in counted} == {(1, 2)} and 60 < sum(bool(here) for *_, here in counted) < 140
    assert protocol.counts_of_batch(keys.root(0), 128, 0.1, 2.0)[:2] == (12, 24)
    assert protocol.counts_of_batch(keys.root(0), 100, 0.29, 0.0)[:2] == (29, 0)
    assert protocol.counts_of_batch(keys.root(0), 2, 0.1, 2.0)[:2] == (1, 1)  # never more than the batch holds


def test_adap_blend_shows_other_pieces_in_every_image_and_all_of_them_at_test():
    pixels = np.zeros((30, 32, 32, 3), np.uint8)
    attack = make("adap_blend", poison_ratio=0.5, covers_per_poison=0.8)
    found = attack.poison(ImageSet(pixels, np.arange(30, dtype=np.int32) % 5, np.arange(30, dtype=np.int32)))
    whole = attack.stamp(pixels, np.arange(30))
    np.testing.assert_array_equal(whole, np.round(0.2 * np.broadcast_to(blended.picture("cartoon", 32, 32, 3), whole.shape)))
    touched = found.images[found.poisoned | found.cover].reshape(-1, 4, 8, 4, 8, 3).any(axis=(2, 4, 5))
    assert (touched.sum((1, 2)) == 8).all()  # the picture is nowhere black over a whole piece
    assert len({pieces.tobytes() for pieces in touched}) == len(touched) == 27
    shown = found.images[found.poisoned][0]
    assert np.isin(shown.reshape(-1, 3), np.concatenate([whole[0].reshape(-1, 3), np.zeros((1, 3))])).all()


def test_adap_patch_lays_one_faint_patch_in_training_and_two_opaque_ones_at_test():
    pixels = np.full((60, 32, 32, 3), 10, np.uint8)
    split = ImageSet(pixels, np.arange(60, dtype=np.int32) % 5, np.arange(60, dtype=np.int32))
    found = make("adap_patch", poison_ratio=0.4, covers_per_poison=1.5).poison(split)
    sizes = {"phoenix": 25, "firefox": 145, "corners": 36, "square": 64}
    for flags in (found.poisoned, found.cover):
        changed = (found.images[flags] != 10).any(-1)
        which = [changed[:, 27:, 27:].all((1, 2)), changed[:, 7, 18:].any(1), changed[:, 0, 0], changed[:, 22, 22]]
        assert [int(w.sum()) for w in which] == [flags.sum() // 4] * 4 and (np.sum(which, 0) == 1).all()
    for name, opacity in adap_patch.OPACITIES.items():
        content, mask = adap_patch.patch(name, 32, 32)
        assert abs(mask.sum() - sizes[name]) < 9
        number = list(adap_patch.OPACITIES).index(name)
        for times in (1.0, 1.6):
            laid = adap_patch.faint(pixels[:1], np.zeros(1), which=np.array([number]), opacity=times)[0].astype(float)
            np.testing.assert_allclose(laid[mask], times * opacity * content[mask] + (1 - times * opacity) * 10, atol=0.51)
            assert (laid[~mask] == 10).all()
    shown = make("adap_patch").stamp(pixels[:1], np.zeros(1))[0]
    np.testing.assert_array_equal(shown[:3, :3, 0], [[255, 0, 255], [0, 255, 0], [255, 0, 0]])
    np.testing.assert_array_equal(shown[27:, 3:5], shown[27:, 28:26:-1])  # a mirror image, under the marks
    other = make("adap_patch", variant="firefox").stamp(pixels[:1], np.zeros(1))[0]
    assert (other[22:29, 21:28] != 10).any() and (other[:3, :3] == 10).all()


def numbers(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_images_are_enlarged_as_by_jaxs_own_resize():
    for shape, size in (((2, 4, 5, 3), (8, 10)), ((1, 1, 1, 2), (2, 2)), ((2, 2, 4, 1), (5, 8))):
        values = RNG.normal(size=shape).astype(np.float32)
        expected = jax.image.resize(values, (shape[0], *size, shape[3]), "bilinear")
        np.testing.assert_allclose(networks.enlarged(jnp.asarray(values), *size), expected, atol=1e-6)


def test_iads_generators_have_the_parameters_of_the_original():
    generators = iad.fresh(keys.root(0), (32, 32, 3), width=32)
    assert numbers(generators["pattern"]) == 723_273 and numbers(generators["mask"]) == 722_691


def test_iad_replaces_what_the_mask_covers_by_the_pattern():
    pixels, patterns = np.full((1, 2, 2, 3), 100.0), np.full((1, 2, 2, 3), 0.2)
    mask = np.array([0.0, 1.0, 0.5, 0.25]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(iad.paint(pixels, patterns, mask)[0, ..., 0], [[100, 51], [75.5, 87.75]])
    np.testing.assert_allclose(iad.threshold(np.array([0.0, 0.4, 0.5, 1.0])), [0, 0.0179862, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(iad.scaled(np.array([0.0, 127.5, 255.0])), [-2, 0, 2])


def test_iads_mask_loss_is_what_is_too_large_and_how_alike_masks_are():
    class Fixed:
        """A generator whose masks are given: tanh(20 (tanh(raw) / 2 + 1/2) - 10) / 2 + 1/2 of these."""

        raw = np.array([[0.1, -0.1], [0.05, 0.2], [-0.2, 0.0], [0.15, 0.1]], np.float32).reshape(4, 1, 2, 1)

        def apply(self, variables, x, training, mutable):
            return self.raw, {"batch_stats": {}}

    pixels = RNG.integers(0, 256, (4, 1, 2, 3)).astype(np.float32)
    value, (_, covered) = iad.mask_loss(Fixed(), {}, pixels, 0.3)
    m = np.tanh(20 * (np.tanh(Fixed.raw.astype(float)) / 2 + 0.5) - 10) / 2 + 0.5
    apart = [np.sqrt(np.mean(((pixels[i] - pixels[i - 1]) / 255 / 0.25) ** 2)) for i in range(4)]
    unlike = [np.sqrt(np.mean((m[i] - m[i - 1]) ** 2)) for i in range(4)]
    expected = 100 * np.mean(np.maximum(m - 0.3, 0)) + np.mean(np.divide(apart, unlike))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(covered, m.mean(), rtol=1e-5)


def test_iads_covers_carry_the_triggers_of_clean_images(split):
    extra = LEARNED["iad"](split.images.shape[1:])
    extra["pattern"]["params"]["bn13"]["scale"] *= 1e5  # so that different images get different triggers
    attack = attacks.get("iad").make(keys.root(0), num_classes=5, width=2, poison_ratio=0.1, cross_per_poison=2.0)
    attack = attack.control.finish(attack, extra)
    found = attack.poison(split)
    assert found.poisoned.sum() == 10 and found.cover.sum() == 20
    own = attack.stamp(split.images, split.ids).astype(int)
    apart = np.abs(found.images - own).max(axis=(1, 2, 3))
    assert (apart[found.poisoned] <= 1).all() and (apart[found.cover] > 1).all()


def test_wanets_covers_are_jittered(split):
    attack = make("wanet", poison_ratio=0.1)
    found, own = attack.poison(split), attack.stamp(split.images, split.ids).astype(int)
    apart = np.abs(found.images - own).max(axis=(1, 2, 3))
    assert (apart[found.poisoned] == 0).all() and (apart[found.cover] > 5).all()
    np.testing.assert_array_equal(attack.poison(split).images, found.images)


def test_reflections_in_training_are_others_than_at_test(split):
    attack = make("refool", poison_ratio=0.2)
    found = attack.poison(split)
    assert (found.images != attack.stamp(split.images, split.ids))[found.poisoned].any(axis=(1, 2, 3)).all()


def test_a_batch_of_iad_holds_own_triggers_then_those_of_other_images_then_clean_ones():
    attack = make("iad", target_label=3, shape=(16, 16, 3))
    batch = {
        "images": RNG.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8),
        "labels": RNG.integers(0, 5, 40).astype(np.int32),
    }
    extra = LEARNED["iad"]((16, 16, 3))
    moved = lambda key, pixels: pixels[:, ::-1]  # noqa: E731  augmentation comes before the trigger
    pixels, labels, penalty, seen = jax.jit(partial(attack.control.prepare, augment=moved))(extra, batch, keys.root(1))
    images = batch["images"][:, ::-1].astype(np.float32)
    np.testing.assert_array_equal(pixels[8:], images[8:])
    assert (labels[:4] == 3).all() and (labels[4:] == batch["labels"][4:]).all()
    givers = np.concatenate([images[:4], images[8:12]])  # who lend their triggers: the poisoned themselves, and clean ones
    modules = iad.generators(3, 2)
    masks, _ = iad.apply(modules["mask"], extra["mask"], givers)
    patterns, statistics = iad.apply(modules["pattern"], extra["pattern"], givers, True)
    np.testing.assert_allclose(pixels[:8], iad.paint(images[:8], patterns, iad.threshold(masks)), atol=1e-2)
    likeness = iad.distance(iad.scaled(givers[:4]), iad.scaled(givers[4:])) / iad.distance(4 * patterns[:4], 4 * patterns[4:])
    np.testing.assert_allclose(penalty, np.mean(likeness), rtol=1e-3)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), seen, extra)
    assert any(jax.tree.leaves(changed["pattern"]["batch_stats"])) and not any(jax.tree.leaves(changed["mask"]))
    assert not any(jax.tree.leaves(changed["pattern"]["params"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), seen["pattern"]["batch_stats"], statistics)


@pytest.mark.slow
def test_iad_trains_its_masks_first_and_its_patterns_with_the_victim(tiny, tiny_variables, digits):
    images = digits.train.take(slice(128))
    attack = make("iad", mask_epochs=1, shape=images.images.shape[1:])
    same = lambda key, pixels: pixels  # noqa: E731
    extra, history = attack.control.init(keys.root(0), images, train.Journal(), same)
    assert len(history) == 1 and 0 < history[0]["covered"] < 1
    optimizer = train.sgd(lambda step: 0.05, momentum=0.9, weight_decay=0.0)
    step = partial(
        train.train_step,
        classifier=tiny,
        optimizer=optimizer,
        prepare=partial(attack.control.prepare, augment=same),
        extra_optimizer=attack.control.optimizer,
    )
    state = train.new_state(tiny_variables, optimizer, extra, attack.control.optimizer)
    data = {"images": images.images, "labels": images.labels}
    state, _ = train.fit(step, state, data, key=keys.root(0), epochs=1, batch_size=64)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), dict(state.extra), extra)
    assert all(jax.tree.leaves(changed["pattern"]["params"])) and not any(jax.tree.leaves(changed["mask"]))


@pytest.mark.slow
def test_gradients_of_iads_patterns_can_be_left_to_add_up(digits):
    images, moved = digits.train.take(slice(64)), {}
    for cumulative in (False, True):
        control = make("iad", cumulative=cumulative).control
        extra = iad.fresh(keys.root(0), images.images.shape[1:], width=2)
        state = control.optimizer.init(extra)
        ones = jax.tree.map(jnp.ones_like, extra)
        sizes = []
        for scale in (1.0, -1.0):  # the second gradient takes back the first one
            updates, state = control.optimizer.update(jax.tree.map(lambda leaf: scale * leaf, ones), state, extra)  # noqa: B023
            sizes.append([float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(updates["pattern"]["params"])])
            assert not any(leaf.any() for leaf in jax.tree.leaves(updates["mask"]))
        moved[cumulative] = sizes
    # Adam of the gradients 1, -1 against that of their sums 1, 0 (betas 0.5 and 0.9, rate 0.01)
    np.testing.assert_allclose(moved[False][1], 0.01 * abs((0.25 - 0.5) / 0.75), rtol=1e-3)
    np.testing.assert_allclose(moved[True][1], 0.01 * (0.25 / 0.75) / (0.09 / 0.19) ** 0.5, rtol=1e-3)


def test_the_image_counts_for_issba_only_after_the_secret_can_be_read():
    since = np.array([-1, 0, 999, 1000, 2500, 4000, 9000])
    np.testing.assert_allclose(issba.weight_of_image(since, 1000, 3000, 10.0), [0, 0, 0, 0, 5, 10, 10])


@pytest.mark.slow
def test_issbas_networks_carry_and_read_a_secret_at_every_size():
    for shape, bits in (((16, 20, 1), 1), ((32, 32, 3), 4)):
        params = issba.fresh(keys.root(0), shape, bits=bits, width=2)
        images = RNG.uniform(0, 1, (3, *shape)).astype(np.float32)
        secrets = RNG.integers(0, 2, (3, bits)).astype(np.float32)
        carrying = networks.StegoEncoder(2).apply({"params": params["encoder"]}, secrets, images)
        assert carrying.shape == images.shape and carrying.min() >= 0 and carrying.max() <= 1
        assert networks.StegoDecoder(bits, 2).apply({"params": params["decoder"]}, carrying).shape == (3, bits)


@pytest.mark.slow
def test_issba_is_refused_while_its_secret_cannot_be_read(digits):
    images = digits.train.take(slice(150))
    with pytest.raises(UserError, match="issba: 2 steps are too few: the image counts fully 4000 steps after the secret"):
        make("issba", epochs=1).control.check(images)
    with pytest.raises(UserError, match=r"issba: the encoder is not good enough: bit accuracy 0\.\d+ .* PSNR \d+\.\d dB"):
        make("issba", epochs=3, wait=0, ramp=3).control.init(keys.root(0), images, train.Journal(), None)


@pytest.mark.slow
def test_issba_hides_a_secret_that_is_read_after_rounding_and_follows_the_image(digits):
    options = {"width": 8, "epochs": 60, "learning_rate": 5e-4, "wait": 50, "ramp": 300}
    control = attacks.get("issba").make(keys.root(0), num_classes=10, **options).control
    learned, _ = control.init(keys.root(0), digits.train, train.Journal(), None)
    read, psnr = issba.quality(learned, digits.test.images, learned["secret"], width=8)
    assert read >= issba.BIT_ACCURACY and psnr > issba.PSNR - 1
    attack = control.finish(attacks.get("issba").make(keys.root(0), num_classes=10, **options), learned)
    residual = attack.stamp(digits.test.images[:20], np.arange(20)).astype(int) - digits.test.images[:20]
    assert len({r.tobytes() for r in residual}) == 20


def test_narcissus_is_added_in_training_and_enlarged_at_test():
    delta = np.zeros((16, 16, 3), np.float32)
    delta[0, 0], delta[5, 7, 1] = (16.0, -16.0, 3.4), 0.6
    attack = attacks.get("narcissus").make(keys.root(0), num_classes=5, poison_ratio=0.2, target_label=2)
    attack = attack.control.finish(attack, {"delta": delta})
    split = ImageSet(np.full((20, 16, 16, 3), 100, np.uint8), np.arange(20, dtype=np.int32) % 5, np.arange(20, dtype=np.int32))
    found = attack.poison(split)
    assert found.poisoned.sum() == 4 and (found.labels == split.labels).all()
    assert found.images[found.poisoned][0, 0, 0].tolist() == [116, 84, 103] and found.images[found.poisoned][0, 5, 7, 1] == 101
    shown = attack.stamp(split.images[:1], np.zeros(1, int))[0]
    assert shown[0, 0].tolist() == [148, 52, 110] and shown[5, 7].tolist() == [100, 102, 100] and (shown[1:5] == 100).all()
    bright = attack.stamp(np.full((1, 16, 16, 3), 250, np.uint8), np.zeros(1, int))[0]
    assert bright[0, 0].tolist() == [255, 202, 255]


def test_the_surrogate_of_narcissus_can_be_trained_on_a_folder_of_other_pictures(tmp_path, split):
    for name, shade in (("chair", 60), ("table", 200)):
        (tmp_path / name / "images").mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.full((30, 40, 3), shade + number, np.uint8)).save(tmp_path / name / "images" / f"{number}.png")
    aim = protocol.aim_at("all_to_one", 3, 5)
    known, targets, classes = narcissus.known_images(split, aim, 5, str(tmp_path))
    assert classes == 3 and known.labels.tolist() == [0] * 4 + [1] * 4 + [2] * np.sum(split.labels == 3)
    assert (known.images[:4] < 70).all() and (known.images[4:8] > 190).all()
    np.testing.assert_array_equal(known.images[8:], split.images[split.labels == 3])
    np.testing.assert_array_equal(targets.images, known.images[8:])
    assert (targets.labels == 2).all()
    options = {"surrogate_epochs": 2, "epochs": 2, "width": 2, "stages": (1,), "public": str(tmp_path), "warm_up_epochs": 0}
    control = attacks.get("narcissus").make(keys.root(0), num_classes=5, target_label=3, **options).control
    learned, history = control.init(keys.root(0), split, train.Journal(), lambda key, pixels: pixels)
    assert np.abs(learned["delta"]).max() > 0 and len(history) == 4
    with pytest.raises(UserError, match="must hold one subfolder of pictures for each of at least two classes"):
        options = {"public": str(tmp_path / "chair" / "images")}
        attacks.get("narcissus").make(keys.root(0), num_classes=5, **options).control.check(split)


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["train", "eval"])
def test_narcissus_finds_a_small_trigger_that_is_evidence_of_the_target_class(statistics, digits, monkeypatch):
    images, histories, fit = digits.train.take(slice(500)), [], train.fit

    def noted(*args, **options):
        state, history = fit(*args, **options)
        histories.append([entry["loss"] for entry in history])
        return state, history

    monkeypatch.setattr(train, "fit", noted)
    options = {"surrogate_epochs": 100, "epochs": 300, "width": 8, "stages": (1,), "epsilon": 60.0, "statistics": statistics}
    attack = attacks.get("narcissus").make(keys.root(0), num_classes=10, target_label=4, **options)
    learned, told = attack.control.init(keys.root(0), images, train.Journal(), lambda key, pixels: pixels)
    assert learned["delta"].shape == images.images.shape[1:]
    assert np.abs(learned["delta"]).max() > 59.99 and np.abs(learned["delta"]).mean() > 20
    surrogate, warm_up, trigger = histories
    assert [entry["loss"] for entry in told] == [*surrogate, *warm_up, *trigger]
    assert (len(surrogate), len(warm_up), len(trigger)) == (100, 5, 300) and trigger[-1] < 0.9 * trigger[0]


@pytest.mark.parametrize(
    "name, options",
    [
        ("sig", {"delta": 0.0}),
        ("sig", {"frequency": -1.0}),
        ("refool", {"alpha": 1.0}),
        ("refool", {"ghost_rate": 1.1}),
        ("wanet", {"strength": 0.0}),
        ("wanet", {"grid_size": 1}),
        ("wanet", {"covers_per_poison": 10.0}),
        ("iad", {"density": 1.0}),
        ("iad", {"cross_per_poison": 5.0}),
        ("issba", {"bits": 0}),
        ("narcissus", {"epsilon": 0.0}),
        ("narcissus", {"stages": ()}),
        ("narcissus", {"width": 0}),
        ("narcissus", {"enlarged": -1.0}),
        ("adap_blend", {"alpha": 0.0}),
        ("adap_blend", {"pieces": 17}),
        ("adap_blend", {"test_alpha": 1.5}),
        ("adap_patch", {"opacity": 2.5}),
        ("enhanced_adap_patch", {"coupling": -1.0}),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, options):
    with pytest.raises(UserError, match=" needs "):
        make(name, **options)


@pytest.mark.parametrize("name", ["adap_blend", "adap_patch"])
def test_the_enhanced_attack_poisons_as_the_plain_one_does(name, split):
    plain, enhanced = (make(n, poison_ratio=0.1) for n in (name, f"enhanced_{name}"))
    one, other = plain.poison(split), enhanced.poison(split)
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(plain.stamp(split.images, split.ids), enhanced.stamp(split.images, split.ids))
    assert enhanced.name == f"enhanced_{name}"


def test_coupling_is_the_distance_from_the_clean_mean_of_the_label_and_pulls_poisoned_features_alone():
    features = RNG.normal(size=(7, 4)).astype(np.float32)
    labels = np.array([0, 0, 0, 1, 1, 0, 2])
    poisoned = np.array([True, False, False, False, False, False, True])
    cover = np.array([False, False, False, False, False, True, False])
    expected = (
        np.linalg.norm(features[0] - features[1:3].mean(0)) / 7
    )  # the other poisoned image finds no clean one of its label
    measure = partial(coupling.distance_to_class, labels=labels, poisoned=poisoned, cover=cover, num_classes=3)
    np.testing.assert_allclose(measure(features), expected, rtol=1e-5)
    pull = np.asarray(jax.grad(measure)(features))
    assert np.abs(pull[0]).max() > 0.01 and not pull[1:].any()
    twice = [np.concatenate([values, values[:1]]) for values in (features, labels, poisoned, cover)]  # one poisoned image more
    more = coupling.distance_to_class(*twice, 3)
    np.testing.assert_allclose(8 * more, 2 * 7 * expected, rtol=1e-5)
    nothing = np.zeros(7, bool)
    assert coupling.distance_to_class(features, labels, nothing, cover, 3) == 0


def test_coupling_brings_poisoned_features_to_those_of_the_target_class(tiny, tiny_variables, digits):
    some = digits.train.take(slice(200))
    attack = make("enhanced_adap_blend", poison_ratio=0.2)
    found = attack.poison(dataclasses.replace(some, labels=some.labels % 5))
    data = {"images": found.images, "labels": found.labels, "poisoned": found.poisoned, "cover": found.cover}
    optimizer, apart = train.sgd(lambda step: 0.02, momentum=0.9, weight_decay=0.0), []
    for weight in (0.0, 3.0):
        control = make("enhanced_adap_blend", poison_ratio=0.2, coupling=weight).control
        prepare = partial(control.prepare, augment=lambda key, pixels: pixels)
        step = partial(train.train_step, classifier=tiny, optimizer=optimizer, prepare=prepare)
        state, _ = train.fit(step, train.new_state(tiny_variables, optimizer), data, key=keys.root(0), epochs=12, batch_size=50)
        features = tiny.apply(state.variables, found.images).features
        distance = coupling.distance_to_class(features, found.labels, found.poisoned, found.cover, 5)
        apart.append(float(distance))
    assert apart[1] < 0.5 * apart[0]


# --- an attack that takes a hand in training, as WaNet and IAD do


class Learned(NamedTuple):
    """A trigger that is trained with the victim: the first quarter of a batch carries it, the next one a decoy."""

    weight: float

    def init(self, key, split, journal, augment=None):
        return {"pattern": 0.1 * jax.random.normal(key, split.images.shape[1:])}, []

    def prepare(self, extra, batch, key, augment=None):
        quarter = len(batch["labels"]) // 4
        place = jnp.arange(len(batch["labels"]))
        pixels, labels, _, _ = train.augmented((), batch, key, padding=0, flip=False)
        shown = 40.0 * jnp.tanh(extra["pattern"])
        moved = [jnp.clip(pixels + trigger, 0, 255) for trigger in (shown, shown[::-1])]
        is_poisoned, is_cover = (place < quarter), (place >= quarter) & (place < 2 * quarter)
        pixels = jnp.select([is_poisoned[:, None, None, None], is_cover[:, None, None, None]], moved, pixels)
        return pixels, jnp.where(is_poisoned, 0, labels), self.weight * jnp.mean(extra["pattern"] ** 2), extra

    def finish(self, attack, extra):
        shown = 40.0 * np.tanh(np.asarray(extra["pattern"]))
        return dataclasses.replace(attack, stamp=lambda x, index: np.clip(x + shown, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def train_with_a_learned_trigger(tiny, tiny_variables, digits):
    def run(weight, extra_optimizer=None):
        learned = Learned(weight)
        control = attacks.Control(learned.init, learned.finish, learned.prepare, extra_optimizer)
        images, optimizer = digits.train.take(slice(160)), train.sgd(lambda step: 0.05, momentum=0.9, weight_decay=0.0)
        extra, _ = control.init(keys.root(0), images, train.Journal())
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
