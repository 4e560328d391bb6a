"""Trigger inversion: a planted patch is found where it lies, the schedule does what it says, and outliers are told."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from bibau_jax import keys, limits, models, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import inversion, nc
from bibau_jax.errors import UserError

QUICK = {"batch_size": 50, "padding": 0, "flip": False}


class Linear(nn.Module):
    """Logits that are linear in the pixels: every class has its own places."""

    @nn.compact
    def __call__(self, pixels, train=False):
        flat = pixels.reshape(len(pixels), -1) / 255
        return nn.Dense(10, name="head")(flat), flat


@pytest.fixture(scope="module")
def found(backdoored):
    given = (keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    return inversion.invert(*given, epochs=60, enough=0.9, patience=2, **QUICK)


def linear(**planted):
    """Variables of `Linear` that answer with class 3 to what is planted: the corner "trigger", or the stronger "quirk"."""
    weights = np.random.default_rng(0).normal(0, 0.3, (16, 16, 10))
    weights[13:, 13:, 3] += planted.get("trigger", 0.0)
    weights[:2, :2, 3] += planted.get("quirk", 0.0)
    return {"params": {"head": {"kernel": weights.reshape(256, 10), "bias": np.zeros(10)}}, "batch_stats": {}}


def inverted(digits, variables, **options) -> inversion.Triggers:
    classifier, clean = models.Classifier(Linear(), 10, (16, 16, 1)), digits.train.take(slice(0, 100))
    settings = {"epochs": 60, "enough": 0.9, "patience": 2} | QUICK
    return inversion.invert(keys.root(0), classifier, variables, clean, **settings, **options)[0]


def test_a_planted_patch_is_found_where_it_lies(digits):
    triggers = inverted(digits, linear(trigger=6.0))
    mask = triggers.masks[3, ..., 0]
    assert mask[13:, 13:].sum() / mask.sum() > 0.8 and triggers.reached[3] > 0.8
    assert inversion.anomaly(triggers.sizes).argmax() == 3


def test_what_must_work_on_two_models_is_what_they_share(digits):
    both, one = linear(trigger=6.0, quirk=20.0), linear(trigger=6.0)
    alone, shared = (inverted(digits, both, classes=(3,), also=also) for also in ((), (one,)))
    assert alone.masks.shape == shared.masks.shape == (1, 16, 16, 1)
    in_quirk, in_trigger = (
        [triggers.masks[0, place, place].sum() / triggers.masks.sum() for triggers in (alone, shared)]
        for place in (slice(0, 2), slice(13, 16))
    )
    assert in_quirk[0] > 0.8 > 0.2 > in_quirk[1] and in_trigger[1] > 0.8 > 0.2 > in_trigger[0]
    assert alone.sizes[0] < shared.sizes[0] and shared.reached[0] > 0.8


def test_of_several_models_the_loss_is_the_mean_and_the_share_the_least(digits):
    classifier, images = models.Classifier(Linear(), 10, (16, 16, 1)), digits.train.images[:50].astype(np.float32)
    rng = np.random.default_rng(0)
    raw = {"mask": rng.normal(-1, 1, (2, 16, 16, 1)), "pattern": rng.normal(0, 1, (2, 16, 16, 1))}

    def told(*of):
        return inversion.objective(raw, np.zeros(2), np.array([3, 5]), images, of, classifier=classifier)[1]

    quirky, plain = linear(quirk=200.0), linear()
    first, second, both = told(quirky), told(plain), told(quirky, plain)
    np.testing.assert_allclose(both[0], (first[0] + second[0]) / 2, rtol=1e-5)
    np.testing.assert_array_equal(both[2], np.minimum(first[2], second[2]))
    assert (first[2] != second[2]).any()


@pytest.mark.slow
def test_the_attackers_class_needs_the_smallest_trigger_by_far(found):
    triggers, _ = found
    assert triggers.sizes.argmin() == 0 and triggers.reached[0] > 0.9
    assert inversion.anomaly(triggers.sizes)[0] > 2 > inversion.anomaly(triggers.sizes)[1:].max()


@pytest.mark.slow
def test_what_is_found_has_the_shapes_and_ranges_that_it_says(found):
    triggers, history = found
    assert triggers.masks.shape == (10, 16, 16, 1) and triggers.patterns.shape == (10, 16, 16, 1)
    assert triggers.masks.min() >= 0 and triggers.masks.max() <= 1
    assert triggers.patterns.min() >= 0 and triggers.patterns.max() <= 255
    np.testing.assert_array_less(triggers.sizes[np.isfinite(triggers.sizes)], 256)
    assert history[-1]["size"] < history[0]["size"]


def test_all_classes_at_once_are_each_class_alone(tiny, tiny_variables, digits):
    clean = digits.train.take(slice(0, 40))
    both, _ = inversion.invert(keys.root(3), tiny, tiny_variables, clean, epochs=2, batch_size=20, padding=0, flip=False)
    label = int(np.flatnonzero(np.isinf(both.sizes))[0])
    optimizer = optax.adam(0.1, b1=0.5, b2=0.9)
    state = jax.device_get(inversion.start(keys.stream(keys.root(3), "start"), tiny, optimizer))
    raw = jax.tree.map(lambda leaf: leaf[label], state.raw)
    opt_state = optimizer.init(raw)
    sizes = []
    for epoch in range(2):
        order = np.asarray(train._order(keys.root(3), epoch, 40, 2, 20))
        for rows in order:
            images = clean.images[rows].astype(np.float32)

            def loss(raw, images=images):
                mask, pattern = inversion.shown(raw)
                logits = tiny.apply(tiny_variables, inversion.stamped(images, mask, pattern)).logits
                wanted = -jax.nn.log_softmax(logits)[:, label].mean()
                return wanted + 1e-3 * mask.sum()

            sizes.append(float(inversion.shown(raw)[0].sum()))
            updates, opt_state = optimizer.update(jax.grad(loss)(raw), opt_state, raw)
            raw = jax.tree.map(lambda a, b: a + b, raw, updates)
        if epoch == 0:  # this class is not reached so soon: what is kept is the first epoch's
            first = jax.tree.map(np.asarray, inversion.shown(raw))
    np.testing.assert_allclose(both.masks[label], first[0], atol=2e-4)
    np.testing.assert_allclose(both.patterns[label], first[1], atol=0.05)


def test_one_device_and_eight_find_the_same(tiny, tiny_variables, digits):
    clean = digits.train.take(slice(0, 48))
    options = {"epochs": 2, "batch_size": 24, "padding": 1, "flip": True, "enough": 0.01}
    one, _ = inversion.invert(keys.root(3), tiny, tiny_variables, clean, **options)
    with parallel.on_devices(8):
        eight, _ = inversion.invert(keys.root(3), tiny, tiny_variables, clean, **options)
    np.testing.assert_allclose(one.masks, eight.masks, atol=1e-3)
    np.testing.assert_allclose(one.sizes, eight.sizes, rtol=1e-3)


def test_the_weight_rises_while_triggers_reach_their_class_and_falls_while_they_do_not():
    optimizer = optax.sgd(0.1)

    class Two:
        num_classes, image_shape = 2, (2, 2, 1)

    state = inversion.start(keys.root(0), Two, optimizer)
    weights = []
    for _ in range(4):
        state = state.replace(step=state.step + 3, hits=np.array([3.0, 0.0]), sizes=np.array([6.0, 6.0]))
        state = inversion._end_of_epoch(state, per_epoch=3, enough=0.9, patience=2, stop_after=5, least=0.0)
        weights.append(np.asarray(state.weight).tolist())
    up, down = inversion.RAISE, inversion.LOWER
    first = inversion.FIRST_WEIGHT
    np.testing.assert_allclose(
        weights,
        [[first, first], [up * first, first / down]] + [[up * first, first / down], [up**2 * first, first / down**2]],
        rtol=1e-6,
    )
    assert np.asarray(state.best_size).tolist() == [2.0, inversion.NEVER] and not np.asarray(state.hits).any()


def test_a_search_goes_the_way_of_a_plain_loop_until_it_ends():
    patience, stop_after, count, rng = 2, 3, 6, np.random.default_rng(0)

    class Some:
        num_classes, image_shape = count, (2, 2, 1)

    rates = (rng.uniform(size=(60, count)) < np.linspace(0.3, 1.0, count)).astype(float)  # which epochs reach enough images
    sizes = np.linspace(40, 20, 60)[:, None] + rng.uniform(0, 12, (60, count))
    state, ends = inversion.start(keys.root(0), Some, optax.sgd(0.1)), []
    seen = []
    for rate, size in zip(rates, sizes, strict=True):
        state = state.replace(step=state.step + 1, hits=rate, sizes=size)
        state = inversion._end_of_epoch(state, per_epoch=1, enough=0.9, patience=patience, stop_after=stop_after, least=0.0)
        seen.append(jax.device_get((state.best_size, state.weight, state.ended)))
    for label in range(count):
        best = before = np.inf
        weight, up, down, waited, raised, lowered, ended = inversion.FIRST_WEIGHT, 0, 0, 0, False, False, False
        for epoch in range(60):
            if not ended:
                good = rates[epoch, label] >= 0.9
                best = min(best, sizes[epoch, label]) if good else best
                waited = waited + 1 if np.isfinite(best) and best >= 0.99 * before else 0
                before = min(before, best)
                ended = waited >= stop_after and raised and lowered
                up, down = (up + 1, 0) if good else (0, down + 1)
                if up == patience:
                    weight, up, raised = 2 * weight, 0, True
                if down == patience:
                    weight, down, lowered = weight / 2**1.5, 0, True
            found = [part[label] for part in seen[epoch]]
            assert bool(found[2]) == ended, (label, epoch)
            np.testing.assert_allclose(found[:2], [min(best, inversion.NEVER), weight], rtol=1e-4)
        ends.append(ended)
    assert any(ends) and not all(ends)


def test_groups_of_classes_share_the_time(tiny, tiny_variables, digits, monkeypatch):
    seen, real = [], inversion.together

    def look(*given, **options):
        seen.append(options["journal"].clock.limit)
        options["journal"].clock.take(1.0)
        return real(*given, **options | {"journal": train.Journal()})

    monkeypatch.setattr(inversion, "together", look)
    clean, options = digits.train.take(slice(0, 20)), {"epochs": 1, "batch_size": 20, "memory": 1e-9, "classes": (0, 1, 2)}
    given = (keys.root(0), tiny, tiny_variables, clean)
    inversion.invert(*given, **options, journal=train.Journal(clock=limits.Clock(12.0)))
    assert seen == [4.0, 5.5, 10.0]


def test_a_class_for_which_no_time_was_left_is_no_finding(tiny, tiny_variables, digits):
    clean = digits.train.take(slice(0, 40))
    clock = limits.Clock(1e-6)  # over after one epoch of the first class
    found = nc.purify(
        keys.root(0),
        tiny,
        tiny_variables,
        clean,
        inversion_epochs=1,
        memory=1e-9,
        batch_size=20,
        padding=0,
        flip=False,
        journal=train.Journal(clock=clock),
    )
    sizes = found.evidence["sizes"]
    assert np.isfinite(sizes[0]) and np.isinf(sizes[1:]).all() and clock.has_cut
    assert found.told["flagged"] == [] and found.told["suspected"] == 0 and found.told["relative_size"] == 1.0


@pytest.mark.parametrize(("least", "then"), [(0.0, 2e-5), (1e-3, 1e-3)])
def test_a_weight_that_was_lowered_is_doubled_from_where_it_is(least, then):
    class Two:
        num_classes, image_shape = 2, (2, 2, 1)

    state = inversion.start(keys.root(0), Two, optax.sgd(0.1))
    state = state.replace(step=state.step + 3, weight=np.full(2, 1e-5, np.float32), hits=np.array([3.0, 3.0]))
    state = inversion._end_of_epoch(state, per_epoch=3, enough=0.9, patience=1, stop_after=5, least=least)
    np.testing.assert_allclose(np.asarray(state.weight), then, rtol=1e-6)


def test_the_anomaly_index_counts_scaled_deviations_below_the_median():
    sizes = np.array([10.0, 52, 50, 48, 49, 51, 50, 53, 47, 50])
    found = inversion.anomaly(sizes)
    spread = 1.4826 * np.median(np.abs(sizes - 50))
    np.testing.assert_allclose(found, (50 - sizes) / spread)
    assert (found > 2).nonzero()[0].tolist() == [0]
    assert not inversion.anomaly(np.full(5, 3.0)).any()
    missing = inversion.anomaly(np.array([np.inf, 5.0, 6.0, 7.0]))
    assert missing[0] == -np.inf and np.isfinite(missing[1:]).all()
    assert (inversion.anomaly(np.full(3, np.inf)) == -np.inf).all()


def test_flagged_triggers_are_stamped_on_a_share_of_the_images_under_their_true_labels(digits):
    clean = digits.train.take(slice(0, 50))
    whole = (np.ones((16, 16, 1), np.float32), np.full((16, 16, 1), 200.0, np.float32))
    half = (np.full((16, 16, 1), 0.5, np.float32), np.zeros((16, 16, 1), np.float32))
    made = nc.with_trigger(keys.root(0), clean, 0.2, [whole, half])
    changed = (made.images != clean.images).any((1, 2, 3))
    assert changed.sum() == 10 and (made.labels == clean.labels).all()
    assert sum((image == 200).all() for image in made.images) == 5


def test_a_model_in_which_no_class_stands_out_is_given_back(backdoored, monkeypatch):
    even = inversion.Triggers(np.ones((10, 16, 16, 1)), np.ones((10, 16, 16, 1)), np.arange(50.0, 60), np.ones(10))
    monkeypatch.setattr(nc, "invert", lambda *given, **options: (even, []))
    result = nc.purify(keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    assert result.told["flagged"] == [] and result.told["anomaly_index"] < 2
    same = jax.tree.map(np.array_equal, result.variables, backdoored.variables)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("smallest, at_most, flagged", [(35.0, 0.0, [4]), (35.0, 0.5, []), (20.0, 0.5, [4])])
def test_a_mask_may_have_to_be_much_smaller_than_the_others(smallest, at_most, flagged, backdoored, monkeypatch):
    sizes = np.array([50.0, 51, 52, 53, smallest, 54, 55, 50, 51, 52])
    masks = np.ones((10, 16, 16, 1)) * sizes[:, None, None, None] / 256
    found = inversion.Triggers(masks, np.ones((10, 16, 16, 1)), sizes, np.ones(10))
    monkeypatch.setattr(nc, "invert", lambda *given, **options: (found, []))
    given = (keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    told = nc.purify(*given, at_most=at_most, epochs=1).told
    assert told["flagged"] == flagged and told["suspected"] == 4
    assert told["relative_size"] == pytest.approx(smallest / 51.5)
    assert told["anomaly_index"] > 2


@pytest.mark.parametrize(
    "options", [{"enough": 0.0}, {"inversion_epochs": 0}, {"stop_after": 0}, {"share": 0.0}, {"limit": -1.0}, {"memory": -1.0}]
)
def test_settings_that_mean_nothing_are_refused(options, backdoored):
    with pytest.raises(UserError, match="needs"):
        nc.purify(keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean, **options)


def test_a_class_without_images_is_inverted_all_the_same(tiny, tiny_variables, digits):
    few = digits.train.take(np.flatnonzero(digits.train.labels < 3)[:20])
    triggers, _ = inversion.invert(
        keys.root(0), tiny, tiny_variables, ImageSet(few.images, few.labels, few.ids), epochs=1, **QUICK
    )
    assert triggers.masks.shape[0] == 10 and (triggers.reached <= 1).all()
