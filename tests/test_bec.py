"""BEC: what it is of known models, and that its parts are what their formulas say."""

import jax
import numpy as np
import pytest

from bibau_jax import keys, models, parallel
from bibau_jax.metrics import bec


def naive_cka(one, other):
    """Linear CKA from the features themselves, in float64."""
    one, other = (np.asarray(features, np.float64) - np.mean(features, 0, dtype=np.float64) for features in (one, other))
    return np.linalg.norm(other.T @ one) ** 2 / (np.linalg.norm(one.T @ one) * np.linalg.norm(other.T @ other))


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(60, 12)).astype(np.float32)
    return first, (first @ rng.normal(size=(12, 9)) + rng.normal(size=(60, 9))).astype(np.float32)


def cka(one, other):
    return bec.linear_cka(bec.centred_gram(one), bec.centred_gram(other))


def test_cka_from_gram_matrices_is_cka_from_features(features):
    assert cka(*features) == pytest.approx(naive_cka(*features), rel=1e-5)


def test_cka_is_one_with_itself_and_does_not_see_turns_sizes_and_shifts(features):
    one, other = features
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0].astype(np.float32)
    assert cka(one, one) == pytest.approx(1)
    assert cka(one @ turn * 7 + 3, other) == pytest.approx(cka(one, other), rel=1e-4)
    assert cka(one * np.arange(1, 13), other) != pytest.approx(cka(one, other), rel=1e-2)


def test_features_that_are_all_the_same_are_like_nothing(features):
    assert cka(np.ones((60, 4), np.float32), features[0]) == 0.0


@pytest.fixture(scope="module")
def images(digits):
    chosen = digits.test.take(np.flatnonzero(digits.test.labels != 0)[:90])
    marked = chosen.images.copy()
    marked[:, -3:, -3:] = 255
    return chosen.images, marked


def test_tac_is_that_of_a_loop_in_float64(tiny, tiny_variables, images):
    taps = [tiny.apply(tiny_variables, pixels, taps=True).taps for pixels in images]
    found = bec.trigger_activated_change(tiny, tiny_variables, *images)
    assert found.keys() == taps[0].keys()
    for name in found:
        clean, marked = (np.asarray(tap[name], np.float64) for tap in taps)

        def size(activation):
            return np.array([[np.sqrt((row[..., c] ** 2).sum()) for c in range(row.shape[-1])] for row in activation])

        expected = size(clean - marked).mean(0) / np.concatenate([size(clean), size(marked)]).mean(0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)


def test_tac_finds_a_planted_channel(tiny, tiny_variables, images):
    """Of one channel the kernel answers nothing but the lower right corner of a black image: the mark moves it the most."""
    variables = jax.tree.map(np.array, tiny_variables)
    kernel = variables["params"]["conv1"]["kernel"]
    kernel[...] = 0
    kernel[1, 1, 0, :] = 1.0  # all channels see the image as it is, and
    kernel[0, 0, 0, 2], kernel[2, 2, 0, 2] = -1.0, 1.0  # this one edges along the diagonal instead
    kernel[1, 1, 0, 2] = 0.0
    flat = np.full_like(images[0], 200)
    marked = flat.copy()
    marked[:, -3:, -3:] = 255
    tac = bec.trigger_activated_change(tiny, variables, flat, marked)
    others = np.delete(tac["conv1"], 2)
    np.testing.assert_allclose(others, others[0], rtol=1e-5)
    assert bec.top_channels(tac["conv1"], 0.25).tolist() == [int(tac["conv1"].argmax())]


@pytest.mark.parametrize("count, share, kept", [(64, 0.1, 6), (128, 0.1, 12), (256, 0.1, 25), (512, 0.1, 51), (4, 0.1, 1)])
def test_a_tenth_of_the_channels_is_rounded_down_and_at_least_one(count, share, kept):
    tac = np.random.default_rng(count).permutation(count).astype(float)
    chosen = bec.top_channels(tac, share)
    assert len(chosen) == kept and set(tac[chosen]) == set(range(count - kept, count))


def test_the_last_ten_convolutions_of_a_resnet18_are_compared_without_shortcuts(digits):
    classifier = models.build("resnet18", num_classes=10, image_shape=(16, 16, 1), width=4, mean=(0.3,), std=(0.4,))
    variables = classifier.init(keys.root(0))
    taps = jax.eval_shape(lambda: classifier.apply(variables, digits.test.images[:1], taps=True).taps)
    names = ["/".join(pair.conv) for pair in classifier.main_path]
    assert set(names) <= taps.keys()
    assert len(names) == 17 and names[0] == "conv1"
    assert names[-10:] == [f"layer{s}_{b}/conv{c}" for s in (2, 3, 4) for b in (0, 1) for c in (1, 2)][2:]


@pytest.fixture(scope="module")
def scale(tiny, tiny_variables, images):
    twin = jax.device_get(tiny.init(keys.root(99)))
    return twin, bec.reference(tiny, tiny_variables, twin, *images, share=0.25, layers=0)


def test_the_backdoored_model_is_one_and_the_twin_zero(tiny, tiny_variables, images, scale):
    twin, ends = scale
    same, none = (bec.existence(tiny, ends, variables, images[1]) for variables in (tiny_variables, twin))
    assert same.value == pytest.approx(1, abs=1e-6) and none.value == pytest.approx(0, abs=1e-6)
    assert all(value == pytest.approx(1, abs=1e-6) for value in same.similarity.values())
    assert same.layers.keys() == none.layers.keys() <= same.similarity.keys() == ends.channels.keys()
    assert len(same.similarity) == 3


def test_between_the_two_the_value_is_the_mean_of_scaled_layers(tiny, tiny_variables, images, scale):
    twin, ends = scale
    half = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, tiny_variables, twin)
    found = bec.existence(tiny, ends, half, images[1])
    for name, channels in ends.channels.items():
        taps = [np.asarray(tiny.apply(v, images[1], taps=True).taps[name])[..., channels] for v in (half, tiny_variables, twin)]
        one, base, floor = (tap.reshape(len(tap), -1) for tap in taps)
        assert found.similarity[name] == pytest.approx(naive_cka(one, base), rel=1e-3)
        low = naive_cka(floor, base)
        if name in found.layers:
            assert found.layers[name] == pytest.approx((found.similarity[name] - low) / (1 - low), rel=2e-3)
        else:
            assert 1 - low < bec.LEAST_RANGE
    assert found.value == pytest.approx(np.mean(list(found.layers.values())))


def test_a_layer_in_which_the_twin_is_like_the_backdoored_model_does_not_count(tiny, tiny_variables, images, scale):
    twin, ends = scale
    floor = dict(zip(ends.floor, (0.99, 0.5, 0.2), strict=True))
    kept = bec.existence(tiny, ends._replace(floor=floor), twin, images[1]).layers
    assert list(kept) == list(floor)[1:]
    nearly = dict(zip(ends.floor, (0.99, 0.98, 0.97), strict=True))
    assert list(bec.existence(tiny, ends._replace(floor=nearly), twin, images[1]).layers) == list(floor)[2:]


def test_eight_devices_find_what_one_finds(tiny, tiny_variables, images, scale):
    twin, _ = scale
    half = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, tiny_variables, twin)

    def value():
        return bec.existence(tiny, bec.reference(tiny, tiny_variables, twin, *images, layers=0), half, images[1]).value

    alone = value()
    with parallel.on_devices(8):
        assert value() == pytest.approx(alone, abs=1e-5)


def test_the_codes_form_spans_the_models_that_are_compared():
    assert bec.code_form({"a": 0.9, "b": 0.5, "c": 0.7}, twin=0.6) == pytest.approx({"a": 1.0, "b": 0.0, "c": 0.5})
    assert bec.code_form({"a": 0.6}, twin=0.6) == {"a": 0.0}


def test_the_sigmoid_is_a_half_at_its_centre_and_rises():
    assert bec.squashed(0.5, 10, 0.5) == 0.5
    assert bec.squashed(0.0, 10, 0.5) < 0.01 < 0.99 < bec.squashed(1.0, 10, 0.5)
