"""Complete unlearning and Proposition 4.3's rates, on models whose answers are known."""

import jax
import numpy as np
import pytest

from bibau_jax import keys, models, train
from bibau_jax.errors import UserError
from bibau_jax.theory import complete_unlearning as complete
from tests.conftest import DIGITS


@pytest.fixture(scope="module")
def three(tiny, tiny_variables):
    """Three models on a line in weight space, the purified one a quarter of the way back."""
    other = jax.tree.map(lambda leaf: leaf * 1.3 + 0.05, tiny_variables["params"])
    mixed = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, tiny_variables["params"], other)
    return complete.Models(*(tiny_variables | {"params": params} for params in (tiny_variables["params"], other, mixed)))


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(3, 20, 10))


# --- Eq. 8-10


def test_a_model_purified_into_the_clean_one_is_complete_and_one_left_alone_is_not():
    clean, backdoored, _ = random_logits()
    done = complete.completeness(clean, backdoored, clean)
    assert (done.left, done.share, done.compensation, done.cosine) == pytest.approx((0, 0, 1, 1))
    idle = complete.completeness(clean, backdoored, backdoored)
    assert (idle.moved, idle.share, idle.compensation, idle.cosine) == (0, 1, 0, 0) and idle.left == idle.implanted > 1


def test_half_the_way_back_leaves_a_quarter_of_the_squared_drift():
    clean, backdoored, _ = random_logits()
    found = complete.completeness(clean, backdoored, (clean + backdoored) / 2)
    assert (found.share, found.compensation, found.cosine) == pytest.approx((0.25, 0.5, 1))


def test_it_equals_a_plain_loop():
    clean, backdoored, purified = random_logits()
    found = complete.completeness(clean, backdoored, purified)
    implanted = left = back = 0.0
    for c, b, u in zip(clean, backdoored, purified, strict=True):
        implanted += sum((b[k] - c[k]) ** 2 for k in range(10)) / 20
        left += sum((u[k] - c[k]) ** 2 for k in range(10)) / 20
        back -= sum((u[k] - b[k]) * (b[k] - c[k]) for k in range(10)) / 20
    assert (found.implanted, found.left, found.compensation) == pytest.approx((implanted, left, back / implanted))


def test_logits_of_different_images_are_refused():
    clean, backdoored, purified = random_logits()
    for wrong in ((clean[:1], backdoored, purified), (clean, backdoored, purified[:, :5]), (clean[:0],) * 3):
        with pytest.raises(UserError, match="logits of the same images, not by logits of shapes"):
            complete.completeness(*wrong)


def test_layers_are_those_of_the_main_path_and_end_at_the_clean_model(tiny, three, digits):
    images = digits.test.images[:9]
    found = complete.by_layer(tiny, three, images)
    assert list(found) == ["conv1", "layer1_0/conv1", "layer1_0/conv2"]
    assert all(0 < each["share"] < 1 and each["implanted"] > 0 for each in found.values())
    assert found["conv1"]["share"] == pytest.approx(0.75**2, rel=1e-3)  # the first layer is linear in its weights
    own = tiny.apply(three.clean, images, taps=True).taps["conv1"]
    off = tiny.apply(three.backdoored, images, taps=True).taps["conv1"] - own
    assert found["conv1"]["implanted"] == pytest.approx(float((off**2).sum() / (own**2).sum()), rel=1e-4)
    done = complete.by_layer(tiny, three._replace(purified=three.clean), images)
    assert all(each["left"] == 0 for each in done.values())


def test_layers_of_a_vit_are_what_each_half_of_a_block_adds(digits):
    vit = models.build("vit_b_32", width=8, stages=(2,), heads=2, patch=8, size=16, **DIGITS)
    three = complete.Models(*(jax.device_get(vit.init(keys.root(seed))) for seed in range(3)))
    images = digits.test.images[:5]
    found = complete.by_layer(vit, three, images)
    assert list(found) == ["block_0/out", "block_0/mlp2", "block_1/out", "block_1/mlp2"]
    taps = [vit.apply(each, images, taps=True).taps for each in three]
    for name, told in found.items():
        own, implanted, left = (np.asarray(tap[name], np.float64) for tap in taps)
        assert own.ndim == 3
        size = (own**2).sum()
        assert told["implanted"] == pytest.approx(((implanted - own) ** 2).sum() / size, rel=1e-4)
        assert told["left"] == pytest.approx(((left - own) ** 2).sum() / size, rel=1e-4)


def test_a_network_without_layers_to_compare_is_told(linear, digits):
    classifier, variables = linear
    with pytest.raises(UserError, match="names no layers that models are compared in"):
        complete.by_layer(classifier, complete.Models(*[variables] * 3), digits.test.images[:5])


# --- Proposition 4.3


def test_rates_of_adversarial_images_are_counted_over_the_attackable_ones(tiny, three, digits):
    images, rng = digits.test.images[:60], np.random.default_rng(0)
    seen = [train.predict(tiny, model, images) for model in (three.backdoored, three.clean)]
    labels, aims = np.where(rng.random(60) < 0.5, seen[1], rng.integers(0, 10, 60)), np.full(60, np.bincount(seen[0]).argmax())
    for targeted in (True, False):
        given = tiny, three.clean, three.backdoored
        found = complete.adversarial_rates(*given, images, labels, aims, targeted=targeted)
        rows = [row for row in range(60) if labels[row] != aims[row]]
        fooled = [seen[0][row] == aims[row] if targeted else seen[0][row] != labels[row] for row in rows]
        kept = [seen[1][row] == labels[row] for row in rows]
        assert found.fooled == pytest.approx(np.mean(fooled)) and 0 < found.kept == pytest.approx(np.mean(kept))
        assert found.target == pytest.approx(np.mean([seen[0][row] == aims[row] for row in rows]))
        assert found.both == pytest.approx(np.mean(np.logical_and(fooled, kept)))
        assert len(rows) < 60
    with pytest.raises(UserError, match="attacker's class already"):
        complete.adversarial_rates(tiny, three.clean, three.backdoored, images, labels, labels, targeted=False)
