"""Defences that train against what they take for the trigger: their bounds, gradients and fixed points."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bibau_jax import defenses, keys, models, parallel, train
from bibau_jax.defenses import bti_dbf, i_bau, nad, pam, sau
from bibau_jax.errors import NotApplicable, UserError
from bibau_jax.method import pgd
from bibau_jax.method.terms import cross_entropy
from bibau_jax.models import inside
from bibau_jax.models.unet import UNet, halvings


@pytest.fixture
def batch(digits):
    chosen = digits.train.take(slice(0, 8))
    return jnp.asarray(chosen.images, jnp.float32), jnp.asarray(chosen.labels)


# --- I-BAU


def test_the_hypergradient_is_the_finite_difference_through_the_minimum():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, b, c = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3), (3, 2), (3,)))

        def inner(delta, theta):
            return jnp.sum((delta - jnp.tanh(b @ theta)) ** 2) + 0.1 * jnp.sum(jnp.sin(a @ delta + theta[0]))

        def outer(delta, theta):
            return jnp.sum((delta - c) ** 2) + 0.1 * jnp.sum(theta**3)

        def solved(theta):
            return jax.lax.fori_loop(0, 500, lambda _, delta: delta - 0.2 * jax.grad(inner)(delta, theta), jnp.zeros(3))

        theta = jnp.array([0.4, -0.7])
        value, found = i_bau.hypergradient(outer, inner, solved(theta), theta, rate=0.2, terms=80)
        assert value == outer(solved(theta), theta)
        for place in range(2):
            step = jnp.zeros(2).at[place].set(1e-5)
            apart = outer(solved(theta + step), theta + step) - outer(solved(theta - step), theta - step)
            assert found[place] == pytest.approx(float(apart) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_the_hypergradient_takes_as_many_terms_of_the_neumann_series_as_it_is_told(terms):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        hessian, mixed = jnp.asarray(np.diag([0.5, 1.0, 3.0])), jnp.asarray(rng.normal(size=(3, 2)))
        delta, theta, rate = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=2)), 0.2

        def inner(delta, theta):
            return delta @ hessian @ delta / 2 + delta @ mixed @ theta

        def outer(delta, theta):
            return jnp.sum(jnp.sin(delta)) + jnp.sum(theta**2)

        _, found = i_bau.hypergradient(outer, inner, delta, theta, rate=rate, terms=terms)
        series = sum(np.linalg.matrix_power(np.eye(3) - rate * hessian, k) @ np.cos(delta) for k in range(terms))
        np.testing.assert_allclose(found, 2 * theta - rate * mixed.T @ series, rtol=1e-12)


def test_the_universal_perturbation_is_sought_from_zero_each_round(tiny, tiny_variables, digits, monkeypatch):
    seen, ascend = [], i_bau.inner_step

    def look(delta, *given, **options):
        jax.debug.callback(lambda value: seen.append(float(np.abs(value).max())), delta)
        return ascend(delta, *given, **options)

    monkeypatch.setattr(i_bau, "inner_step", look)
    i_bau.purify(keys.root(0), tiny, tiny_variables, digits.train.take(slice(0, 40)), epochs=3, batch_size=20)
    jax.effects_barrier()
    assert [value == 0 for value in seen] == [True, False] * 3


def test_the_universal_perturbation_goes_up_within_its_ball(tiny, tiny_variables, digits):
    images = digits.train.images[:20]
    labels = train.predict(tiny, tiny_variables, images)
    delta = jnp.zeros((1, 16, 16, 1))

    def loss(delta):
        return float(cross_entropy(tiny.apply(tiny_variables, i_bau.moved(images, delta)).logits, labels).mean())

    step = partial(i_bau.inner_step, classifier=tiny, inner_rate=10.0, penalty=1e-3)
    for _ in range(3):
        delta = step(delta, tiny_variables, images, radius=2.0)
    assert np.linalg.norm(delta) <= 2.0 + 1e-5 and loss(delta) > loss(0 * delta)
    free = step(delta, tiny_variables, images, radius=0.0)
    bound = np.linalg.norm(free) / 2
    assert np.linalg.norm(step(delta, tiny_variables, images, radius=bound)) == pytest.approx(bound, rel=1e-5)


def test_i_bau_leaves_running_statistics_alone(backdoored):
    given = (keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean)
    found = i_bau.purify(*given, epochs=1, batch_size=100)
    same = jax.tree.map(np.array_equal, found.variables["batch_stats"], backdoored.variables["batch_stats"])
    assert all(jax.tree.leaves(same)) and found.history[-1]["perturbation"] <= 10 + 1e-4


def test_i_bau_with_amsgrad_takes_pytorchs(tiny, tiny_variables, digits, monkeypatch):
    rates, real = [], train.amsgrad
    monkeypatch.setattr(train, "amsgrad", lambda rate: rates.append(rate) or real(rate))
    clean, settings = digits.train.take(slice(0, 40)), {"epochs": 1, "batch_size": 20}
    i_bau.purify(keys.root(0), tiny, tiny_variables, clean, **settings)
    assert rates == []
    i_bau.purify(keys.root(0), tiny, tiny_variables, clean, **settings, amsgrad=True, learning_rate=1e-4)
    assert rates == [1e-4]


def test_the_perturbation_is_charged_for_its_length():
    logits, labels, delta = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0]), jnp.full((1, 2, 2, 1), 0.5)
    mean = (np.log(1 + np.exp(-2.0)) + np.log(1 + np.exp(1.0))) / 2
    assert float(i_bau.misled(logits, labels, delta, 0.3)) == pytest.approx(-mean + 0.3 * 1.0, rel=1e-5)


def test_a_step_of_i_bau_is_the_fixed_points_gradient_of_its_first_batch(tiny, tiny_variables, digits):
    later, first = digits.train.take(slice(0, 8)), digits.train.take(slice(8, 16))
    statistics, rate, penalty = tiny_variables["batch_stats"], 0.1, 0.5
    delta = jnp.asarray(np.random.default_rng(0).normal(0, 0.05, (1, 16, 16, 1)), jnp.float32)

    def losses(params, images, labels, delta):
        pixels = images.astype(jnp.float32) + 255 * delta
        return cross_entropy(tiny.apply({"params": params, "batch_stats": statistics}, pixels).logits, labels)

    optimizer = optax.sgd(1.0)
    start = train.new_state(tiny_variables, optimizer)
    state = i_bau.State(start.step, start.params, start.statistics, start.opt_state, delta)
    options = {"classifier": tiny, "optimizer": optimizer, "share": 0.25, "terms": 5, "map_rate": rate, "penalty": penalty}
    batch = {"images": jnp.asarray(later.images), "labels": jnp.asarray(later.labels)}
    found, told = i_bau.step(state, (jnp.asarray(first.images), jnp.asarray(first.labels)), batch, keys.root(0), **options)

    # Two of the eight images carry it, and their places are told by the loss.
    params = tiny_variables["params"]
    plain, changed = (losses(params, batch["images"], batch["labels"], part) for part in (0 * delta, delta))
    pairs = list(itertools.combinations(range(8), 2))
    means = np.array([float(plain.sum() + sum(changed[n] - plain[n] for n in pair)) / 8 for pair in pairs])
    near = np.flatnonzero(np.abs(means - float(told["loss"])) < 1e-5)
    assert len(near) == 1
    chosen = np.zeros((8, 1, 1, 1), np.float32)
    chosen[list(pairs[near[0]])] = 1

    outer = lambda d, p: losses(p, batch["images"], batch["labels"], chosen * d).mean()  # noqa: E731
    inner = lambda d, p: -losses(p, first.images, first.labels, d).mean() + penalty * jnp.sum(d**2)  # noqa: E731
    _, back = jax.vjp(lambda d, p: d - rate * jax.grad(inner)(d, p), delta, params)
    v, upwards = 0 * delta, jax.grad(outer)(delta, params)
    for _ in range(5):
        v = back(v)[0] + upwards
    expected = jax.tree.map(jnp.add, jax.grad(outer, argnums=1)(delta, params), back(v)[1])
    moved = jax.tree.map(jnp.subtract, params, found.params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, other in zip(*map(jax.tree.leaves, (moved, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * largest)
    np.testing.assert_array_equal(found.delta, delta)


# --- SAU


def test_the_divergence_of_jensen_and_shannon():
    one, other = jnp.array([[0.0, 0.0], [50.0, 0.0], [1.0, 2.0]]), jnp.array([[0.0, 0.0], [0.0, 50.0], [2.0, 0.5]])
    p, q = (np.asarray(jax.nn.softmax(x))[2] for x in (one, other))
    middle = (p + q) / 2
    last = (np.sum(p * np.log(p / middle)) + np.sum(q * np.log(q / middle))) / 2
    np.testing.assert_allclose(sau.jensen_shannon(one, other), [0, np.log(2), last], atol=1e-5)


def test_what_the_search_raises_is_the_loop_over_images():
    rng = np.random.default_rng(0)
    both = [jnp.asarray(rng.normal(size=(40, 4)) * 3, jnp.float32) for _ in range(2)]
    labels = jnp.asarray(rng.integers(0, 4, 40))
    before = [jnp.asarray(rng.integers(0, 4, 40)) for _ in range(2)]
    found = sau.shared_objective(both, labels, before, lambda_adversarial=0.01, lambda_shared=1.0)
    divergences, kinds = sau.jensen_shannon(*both), set()
    for i in range(40):
        seen = [int(jnp.argmax(logits[i])) for logits in both]
        expected = 0.0
        for model in range(2):
            if seen[model] == before[model][i]:
                expected += 0.01 * -float(jax.nn.log_softmax(both[model][i])[labels[i]]) / 2
        done = all(seen[model] != before[model][i] for model in range(2)) and seen[0] == seen[1]
        kinds.add(done)
        expected -= 0.0 if done else float(divergences[i])
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)
    assert kinds == {True, False}


def test_only_images_that_the_backdoored_model_was_led_astray_by_are_unlearned():
    labels, was = jnp.array([0, 0, 1]), jnp.array([0, 2, 1])
    suspicious = jnp.eye(3)[jnp.array([2, 2, 1])] * 9  # led to 2, was there before, still right
    logits = jnp.array([[0.0, 0.0, 3.0], [0.0, 0.0, 3.0], [0.0, 3.0, 0.0]])
    loss, counted = sau.unlearning_loss(logits, suspicious, was, labels)
    chance = float(jax.nn.softmax(logits[0])[2])
    assert float(counted) == pytest.approx(1 / 3)
    assert float(loss) == pytest.approx((-np.log(1 - chance) - np.log(1 - chance)) / 2 / 3, rel=1e-3)


@pytest.mark.parametrize("clip", [True, False])
def test_the_shared_perturbation_stays_within_its_bound(clip, tiny, tiny_variables, batch, monkeypatch):
    images, labels = batch
    seen, search = [], pgd.adversarial_images

    def look(gradient, given, **options):
        assert np.asarray(options["start"]).min() == 51  # the search begins at the bound everywhere
        seen.append(search(gradient, given, **options))
        return seen[-1]

    monkeypatch.setattr(pgd, "adversarial_images", look)
    optimizer = optax.amsgrad(1e-4)
    state = train.new_state(tiny_variables, optimizer)
    sau.step(
        state,
        tiny_variables,
        {"images": images, "labels": labels},
        keys.root(0),
        classifier=tiny,
        optimizer=optimizer,
        attack={"epsilon": 51.0, "step_size": 51.0, "steps": 3, "clip": clip},
        train_mode=False,
        lambdas={"lambda_adversarial": 0.01, "lambda_shared": 1.0},
        lambda_unlearning=1.0,
    )
    assert np.abs(seen[0] - images).max() <= 51 + 1e-4
    within = seen[0].min() >= 0 and seen[0].max() <= 255
    assert within == clip  # digits are black and white, so that a free perturbation leaves the range


@pytest.mark.parametrize("train_mode", [False, True])
def test_a_step_of_sau_unlearns_what_the_backdoored_model_was_led_to(train_mode, tiny, tiny_variables, batch, monkeypatch):
    images, labels = batch
    rng = np.random.default_rng(3)

    def opinionated(variables):
        """With another end, which takes different images for different classes."""
        features = tiny.apply(variables, images).features
        kernel = rng.normal(0, 5, (features.shape[-1], 10)).astype(np.float32)
        return variables | {"params": variables["params"] | {"head": {"kernel": kernel, "bias": -features.mean(0) @ kernel}}}

    tiny_variables, backdoored = opinionated(tiny_variables), opinionated(tiny_variables)
    adversarial = jnp.concatenate([images[:2], images[:1:-1]])  # the first two lead nowhere
    seen = []
    monkeypatch.setattr(sau, "search", lambda *given, **options: seen.append(given) or adversarial)
    optimizer = optax.sgd(1.0)
    state, told = sau.step(
        train.new_state(tiny_variables, optimizer),
        backdoored,
        {"images": images, "labels": labels},
        keys.root(0),
        classifier=tiny,
        optimizer=optimizer,
        attack={},
        train_mode=train_mode,
        lambdas={},
        lambda_unlearning=0.7,
    )
    # The search is shown both models, the one that is purified first, and what each takes the clean images for.
    _, _, models_seen, before = seen[0]
    for variables, model, classes in zip((tiny_variables, backdoored), models_seen, before, strict=True):
        np.testing.assert_array_equal(model["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])
        np.testing.assert_array_equal(classes, tiny.apply(variables, images).logits.argmax(-1))

    led = np.asarray(tiny.apply(backdoored, adversarial).logits.argmax(-1))
    was = np.asarray(tiny.apply(backdoored, images).logits.argmax(-1))
    counted = (led != np.asarray(labels)) & (led != was)
    assert 0 < counted.sum() < len(counted)

    def loss(params):
        both = jnp.stack([images, adversarial], 1).reshape(-1, *images.shape[1:])
        logits = tiny.apply(tiny_variables | {"params": params}, both, train=train_mode).logits
        unlearned = 0.0
        for n in np.flatnonzero(counted):
            chance = jax.nn.softmax(logits[2 * n + 1])[led[n]]
            far = jnp.log(1e-6 + jnp.minimum(1 - chance, 0.999)) + jnp.log(1 + 1e-6 - jnp.maximum(chance, 0.001))
            unlearned -= far / 2 / len(images)
        return cross_entropy(logits[0::2], labels).mean() + 0.7 * unlearned, unlearned

    (value, unlearned), slopes = jax.value_and_grad(loss, has_aux=True)(tiny_variables["params"])
    assert float(told["loss"]) == pytest.approx(float(value), rel=1e-4) and float(unlearned) > 0.01
    moved = jax.tree.map(jnp.subtract, tiny_variables["params"], state.params)
    for one, expected in zip(*map(jax.tree.leaves, (moved, slopes)), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-4 * max(1.0, float(jnp.abs(expected).max())))
    rests = all(jax.tree.leaves(jax.tree.map(np.array_equal, state.statistics, tiny_variables["batch_stats"])))
    assert rests != train_mode


# --- NAD


def test_attention_maps_are_sums_of_squares_of_length_one():
    activation = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    found = nad.attention(jnp.asarray(activation))
    expected = (activation**2).sum(-1).reshape(3, 20)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-4)
    assert float(nad.distance(jnp.asarray(activation), jnp.asarray(3 * activation)).max()) < 1e-9
    assert np.isfinite(jax.grad(lambda x: nad.distance(x, jnp.ones((1, 2, 2, 1))).sum())(jnp.zeros((1, 2, 2, 1)))).all()


# --- BTI-DBF and PAM


def test_the_end_of_the_network_gives_the_same_logits_for_its_own_feature_map(tiny, tiny_variables, batch):
    images, _ = batch
    outputs, features = bti_dbf.feature_map(tiny, tiny_variables, images)
    again = bti_dbf.from_feature_map(tiny, tiny_variables, 0 * images, features)
    np.testing.assert_allclose(again, outputs.logits, atol=1e-5)
    np.testing.assert_allclose(features.mean((1, 2)), outputs.features, atol=1e-5)


def test_looking_inside_changes_no_output(tiny, tiny_variables, batch):
    images, _ = batch
    plain = tiny.apply(tiny_variables, images, train=True)
    outputs, found = inside.look(tiny, tiny_variables, images, [("bn1",), ("layer1_0",)], what="input", train=True)
    np.testing.assert_array_equal(outputs.logits, plain.logits)
    assert jax.tree.map(np.array_equal, outputs.statistics, plain.statistics)["bn1"] == {"mean": True, "var": True}
    assert list(found) == ["bn1", "layer1_0"] and found["layer1_0"].shape == (8, 16, 16, 4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 16, 1), (20, 33, 3)])
def test_the_generator_gives_images_of_the_size_that_it_is_given(shape):
    net = UNet(4)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    params = net.init(jax.random.key(0), images)["params"]
    made = net.apply({"params": params}, images)
    assert made.shape == images.shape
    alone = net.apply({"params": params}, images[:1])
    np.testing.assert_allclose(made[:1], alone, atol=1e-4)  # instance statistics: no image depends on the others


@pytest.mark.parametrize(("size", "times"), [(2, 0), (8, 2), (16, 3), (17, 4), (28, 4), (32, 4), (64, 4)])
def test_images_are_halved_until_two_places_are_left(size, times):
    assert halvings(size, 64) == halvings(64, size) == times


def test_nothing_within_the_generator_is_dead_on_small_images():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 1)), jnp.float32)
    net = UNet(2)
    params = net.init(jax.random.key(0), images)["params"]
    slopes = jax.grad(lambda params: jnp.sum(net.apply({"params": params}, images) ** 2))(params)
    kernels = {name: leaf["kernel"] for name, leaf in slopes.items() if "kernel" in leaf}
    assert "middle_conv1" in kernels and all(np.abs(leaf).max() > 0 for leaf in kernels.values())


def test_the_point_of_the_gradient_lies_rho_towards_the_backdoored_weights():
    here, there = {"a": jnp.array([1.0, 2.0]), "b": jnp.zeros(2)}, {"a": jnp.array([4.0, 2.0]), "b": jnp.array([0.0, 4.0])}
    moved = pam.towards(here, there, 0.5)
    np.testing.assert_allclose(moved["a"], [1.3, 2.0], rtol=1e-5)
    np.testing.assert_allclose(moved["b"], [0.0, 0.4], rtol=1e-5)
    same = pam.towards(here, here, 0.5)
    assert all(np.array_equal(same[name], here[name]) for name in here)


def test_with_rho_zero_a_step_is_plain_fine_tuning_on_the_mixed_images(tiny, tiny_variables, batch):
    images, labels = batch
    backdoored = {"params": jax.tree.map(lambda leaf: leaf + 1.0, tiny_variables["params"])}
    optimizer = optax.sgd(0.01, 0.1)
    made = {"images": images, "labels": labels}
    shared = {"classifier": tiny, "optimizer": optimizer}
    plain = {"prepare": lambda extra, batch, key: (255 - batch["images"], batch["labels"], 0.0, extra)}
    expected, _ = train.train_step(train.new_state(tiny_variables, optimizer), (), made, keys.root(0), **shared, **plain)
    options = {"generate": lambda params, pixels: 255 - pixels, "prepare": lambda key, batch: batch["images"], "share": 0.99}
    frozen = {"generator": {}, "backdoored": backdoored}
    step = partial(pam.path_step, **shared, **options)
    found, _ = step(train.new_state(tiny_variables, optimizer), frozen, made, keys.root(0), rho=0.0)
    other, _ = step(train.new_state(tiny_variables, optimizer), frozen, made, keys.root(0), rho=0.5)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found.variables, expected.variables)
    assert max(jax.tree.leaves(apart)) < 1e-5
    assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(*map(jax.tree.leaves, (found.params, other.params)), strict=True))


def test_as_many_images_are_replaced_as_the_share_says_and_one_more(batch):
    images, _ = batch
    mixed = bti_dbf.replaced(images, keys.root(0), {}, generate=lambda params, pixels: pixels - 7, share=0.3)
    changed = np.asarray((mixed != images).any((1, 2, 3)))
    assert changed.sum() == int(0.3 * 8) + 1


@pytest.mark.parametrize("name", ["bti_dbf", "pam"])
def test_rounds_go_on_from_each_other_but_look_back_at_the_backdoored_model(name, tiny, tiny_variables, digits, monkeypatch):
    """The path of PAM begins at the backdoored weights in every round; the class is asked for from the second round on."""
    given, real = [], train.fit

    def once(step, state, data, *, epochs, frozen=(), journal, **options):
        given.append((journal.stage.rpartition("/")[2], frozen))
        state, history = real(step, state, data, epochs=1, frozen=frozen, journal=journal, **options)
        return state, history

    monkeypatch.setattr(bti_dbf.train, "fit", once)
    monkeypatch.setattr(bti_dbf, "_mostly", lambda *rest: 3)
    images = digits.train.take(slice(0, 16))
    before = jax.tree.map(np.array, tiny_variables)
    defenses.get(name).purify(keys.root(0), tiny, tiny_variables, images, rounds=2, batch_size=8, width=4)
    told = dict(given)
    assert [told[f"round{n}_generator"][2] for n in (0, 1)] == [-1, 3]
    for number in (0, 1):
        anchor = told[f"round{number}_unlearn"]["backdoored"]
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, anchor, before)))
    now = told["round1_mask"]["params"]
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, now, before["params"])))


def mean_square(one, other) -> float:
    return float(((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2).mean())


def test_the_mask_keeps_what_the_labels_need_and_leaves_out_the_rest(tiny, tiny_variables, batch):
    images, labels = batch
    outputs, features = bti_dbf.feature_map(tiny, tiny_variables, images, train=True)
    raw = jnp.asarray(np.random.default_rng(0).normal(size=(1, *features.shape[1:])), jnp.float32)
    optimizer = optax.sgd(1e3)
    state = bti_dbf.MaskState(jnp.zeros((), jnp.int32), raw, optimizer.init(raw), tiny_variables["batch_stats"])

    def loss(raw):
        kept, rest = (
            cross_entropy(bti_dbf.from_feature_map(tiny, tiny_variables, images, part * features), labels).mean()
            for part in (bti_dbf.squashed(raw), 1 - bti_dbf.squashed(raw))
        )
        return float(kept), float(rest)

    options = {"classifier": tiny, "optimizer": optimizer, "prepare": lambda key, batch: batch["images"]}
    now, told = bti_dbf.mask_step(state, tiny_variables, {"images": images, "labels": labels}, keys.root(0), **options)
    (kept, rest), (later, left) = loss(raw), loss(now.params)
    assert float(told["loss"]) == pytest.approx(kept - rest, rel=1e-4) and rest > 0
    assert later < kept and left > rest  # on the way down, each by itself
    same = jax.tree.map(np.array_equal, now.statistics, outputs.statistics)
    assert all(jax.tree.leaves(same))  # the copy's statistics drift


@pytest.mark.parametrize(("shift", "weight"), [(3.0, 0.01), (60.0, 100.0)])
def test_the_generator_is_called_back_the_harder_the_farther_it_strays(shift, weight, tiny, tiny_variables, batch):
    images, labels = batch
    scale, optimizer = bti_dbf.scale_of(np.asarray(images)), optax.sgd(1.0)
    options = {"classifier": tiny, "optimizer": optimizer, "scale": scale, "prepare": lambda key, batch: batch["images"]}
    _, told = bti_dbf.likeness_step(
        train.new_state({"params": {"shift": shift}, "batch_stats": {}}, optimizer),
        tiny_variables,
        {"images": images, "labels": labels},
        keys.root(0),
        generate=lambda params, pixels: pixels + params["shift"],
        **options,
    )
    (plain, features), (changed, moved) = (
        bti_dbf.feature_map(tiny, tiny_variables, given) for given in (images, images + shift)
    )
    wanted, given = (np.asarray(jax.nn.softmax(outputs.logits), np.float64) for outputs in (changed, plain))
    answers = -(wanted * (given - np.log(np.exp(given).sum(-1, keepdims=True)))).sum(-1).mean()  # probabilities as logits
    apart = float(((shift / scale.std) ** 2).mean())
    assert (apart > 0.1) == (weight > 1)
    assert float(told["loss"]) == pytest.approx(answers + mean_square(features, moved) + weight * apart, rel=1e-4)


def reversal(classifier, frozen, batch, scale, shift) -> dict:
    """What a step of the generator tells that adds `shift` to every pixel."""
    optimizer = optax.sgd(1.0)
    _, told = bti_dbf.reversal_step(
        train.new_state({"params": {"shift": shift}, "batch_stats": {}}, optimizer),
        frozen,
        dict(zip(("images", "labels"), batch, strict=True)),
        keys.root(0),
        classifier=classifier,
        generate=lambda params, pixels: pixels + params["shift"],
        scale=scale,
        optimizer=optimizer,
        prepare=lambda key, batch: batch["images"],
    )
    return told


@pytest.mark.parametrize("shift", [3.0, 60.0])
def test_what_the_mask_leaves_out_is_moved_and_what_it_keeps_is_not(shift, tiny, tiny_variables, batch):
    images, _ = batch
    scale = bti_dbf.scale_of(np.asarray(images))
    _, features = bti_dbf.feature_map(tiny, tiny_variables, images)
    _, moved = bti_dbf.feature_map(tiny, tiny_variables, images + shift)
    mask = np.random.default_rng(0).uniform(0, 1, (1, *features.shape[1:])).astype(np.float32)
    told = reversal(tiny, (tiny_variables, mask, np.int32(-1)), batch, scale, shift)
    benign, rest = mean_square(mask * features, mask * moved), mean_square((1 - mask) * features, (1 - mask) * moved)
    apart = float(((shift / scale.std) ** 2).mean())
    assert (apart > 0.3) == (shift > 10) and benign < 3 and rest > 0
    assert float(told["loss"]) == pytest.approx(apart if apart > 0.3 else 0.01 * benign - rest, rel=1e-3)


def test_unlearning_asks_for_labels_and_for_features_that_stay(tiny, tiny_variables, batch):
    images, labels = batch
    optimizer = optax.sgd(0.1)
    options = {"classifier": tiny, "optimizer": optimizer, "prepare": lambda key, batch: batch["images"]}
    _, told = bti_dbf.unlearn_step(
        train.new_state(tiny_variables, optimizer),
        {"generator": {}},
        {"images": images, "labels": labels},
        keys.root(0),
        generate=lambda params, pixels: 255 - pixels,
        share=0.99,
        **options,
    )
    outputs, moved = bti_dbf.feature_map(tiny, tiny_variables, 255 - images, train=True)
    _, features = bti_dbf.feature_map(tiny, tiny_variables, images, train=True)
    apart = mean_square(features, moved)
    assert float(told["loss"]) == pytest.approx(float(cross_entropy(outputs.logits, labels).mean()) + apart, rel=1e-4)
    assert apart > 1e-3


def test_images_are_reversed_towards_the_class_that_is_asked_for(tiny, tiny_variables, batch):
    images, _ = batch
    scale = bti_dbf.scale_of(np.asarray(images))
    _, features = bti_dbf.feature_map(tiny, tiny_variables, images)
    mask = jnp.full((1, *features.shape[1:]), 0.5)

    def loss(target):
        return float(reversal(tiny, (tiny_variables, mask, target), batch, scale, 3.0)["loss"])

    towards = cross_entropy(tiny.apply(tiny_variables, images + 3.0).logits, jnp.full(len(images), 2)).mean()
    assert loss(np.int32(2)) - loss(np.int32(-1)) == pytest.approx(float(towards), rel=1e-4)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("bti_dbf", {"learning_rate": -1.0}),
        ("bti_dbf", {"mask_rate": 0.0}),
        ("bti_dbf", {"share": 1.0}),
        ("bti_dbf", {"rounds": 0}),
        ("pam", {"learning_rate": 0.0}),
        ("pam", {"momentum": 1.0}),
        ("pam", {"rho": -0.1}),
        ("i_bau", {"share": 0.0}),
        ("i_bau", {"radius": -1.0}),
        ("i_bau", {"terms": 0}),
        ("sau", {"epsilon": 0.0}),
        ("sau", {"lambda_shared": -1.0}),
        ("sau", {"steps": 0}),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, wrong, tiny, tiny_variables, digits):
    words = {
        "i_bau": "i_bau needs epochs and terms",
        "sau": "sau needs epochs and steps",
        "bti_dbf": "bti_dbf and pam need rounds",
    }
    with pytest.raises(UserError, match=words.get(name, "pam")):
        defenses.get(name).purify(keys.root(0), tiny, tiny_variables, digits.train.take(slice(0, 20)), **wrong)


@pytest.mark.parametrize(("options", "falls"), [({}, (8, 80)), ({"drops": (5,)}, (20,))])
def test_nads_rate_falls_to_a_tenth_after_two_and_twenty_epochs_or_those_asked_for(
    tiny, tiny_variables, digits, monkeypatch, options, falls
):
    rates, real = [], train.sgd

    def look(rate, **options):
        rates.append(rate)
        return real(rate, **options)

    monkeypatch.setattr(nad.train, "sgd", look)
    clean = digits.train.take(slice(0, 32))
    nad.purify(keys.root(0), tiny, tiny_variables, clean, epochs=1, teacher_epochs=1, batch_size=8, **options)
    for number, step in enumerate(falls):
        before, after = float(rates[-1](step - 1)), float(rates[-1](step))
        assert (before, after) == (pytest.approx(0.1 * 0.1**number), pytest.approx(0.01 * 0.1**number))
    assert float(rates[-1](1000)) == pytest.approx(0.1 * 0.1 ** len(falls))


def test_nad_cuts_squares_out_for_teacher_and_student(tiny, tiny_variables, digits):
    clean = digits.train.take(slice(0, 32))
    white = dataclasses.replace(clean, images=np.full_like(clean.images, 255))
    optimizer = train.sgd(0.1, momentum=0.9, weight_decay=0.0)
    state = train.new_state(tiny_variables, optimizer)
    batch = {"images": jnp.asarray(white.images), "labels": jnp.asarray(white.labels)}
    pixels, *_ = train.augmented((), batch, keys.root(1), padding=0, flip=False, holes=3)
    assert set(np.unique(np.sum(np.asarray(pixels) == 0, (1, 2, 3)))) <= {4, 6, 9}  # corners, edges, inside
    options = {"classifier": tiny, "optimizer": optimizer, "paths": tiny.stages[-1:], "betas": (1.0,), "padding": 0}
    options |= {"flip": False}
    found = [nad.step(state, tiny_variables, batch, keys.root(1), holes=holes, **options)[1]["loss"] for holes in (0, 3)]
    assert float(found[0]) != float(found[1])
    whole = {"epochs": 1, "teacher_epochs": 1, "batch_size": 32, "padding": 0, "flip": False}
    kept, cut = (nad.purify(keys.root(0), tiny, tiny_variables, white, cutout=size, **whole).history for size in (0, 3))
    assert all(one["loss"] != other["loss"] for one, other in zip(kept, cut, strict=True))


@pytest.mark.parametrize("wrong", [{"cutout": -1}, {"drops": (0,)}, {"drops": (3, 3)}])
def test_nads_wrong_settings_are_named(tiny, tiny_variables, digits, wrong):
    with pytest.raises(UserError, match="nad needs a cutout that is not negative, and drops"):
        nad.purify(keys.root(0), tiny, tiny_variables, digits.train.take(slice(0, 20)), **wrong)


def test_nad_looks_at_the_last_stages_the_deepest_with_the_last_beta(digits, monkeypatch):
    classifier = models.build("resnet18", width=2, stages=(1, 1, 1), num_classes=10, image_shape=(16, 16, 1))
    variables, seen, real = jax.device_get(classifier.init(keys.root(0))), [], train.fit
    monkeypatch.setattr(train, "fit", lambda step, *given, **options: seen.append(step) or real(step, *given, **options))
    options = {"epochs": 1, "teacher_epochs": 1, "batch_size": 20, "cutout": 2, "padding": 0, "flip": False}
    nad.purify(keys.root(0), classifier, variables, digits.train.take(slice(0, 20)), betas=(5.0, 7.0), **options)
    assert seen[-1].keywords["paths"] == (("layer2_0",), ("layer3_0",)) and seen[-1].keywords["betas"] == (5.0, 7.0)
    nad.purify(keys.root(0), classifier, variables, digits.train.take(slice(0, 20)), betas=(1.0, 2.0, 3.0, 4.0), **options)
    assert len(seen[-1].keywords["paths"]) == 3 and seen[-1].keywords["betas"] == (2.0, 3.0, 4.0)


def test_attention_is_not_applicable_to_a_network_without_stages(tiny, tiny_variables, digits):
    bare = dataclasses.replace(tiny, stages=())
    with pytest.raises(NotApplicable, match="this network has none"):
        nad.purify(keys.root(0), bare, tiny_variables, digits.train.take(slice(0, 20)))


def test_the_features_of_a_network_without_stages_are_what_its_head_takes(tiny, tiny_variables, digits):
    bare, pixels = dataclasses.replace(tiny, stages=()), jnp.asarray(digits.test.images[:4], jnp.float32)
    outputs, features = bti_dbf.feature_map(bare, tiny_variables, pixels)
    assert features.shape == outputs.features.shape and features.ndim == 2
    again = bti_dbf.from_feature_map(bare, tiny_variables, pixels, features)
    np.testing.assert_allclose(again, outputs.logits, rtol=1e-5, atol=1e-5)
    kernel = np.asarray(tiny_variables["params"]["head"]["kernel"], np.float64)
    halved = bti_dbf.from_feature_map(bare, tiny_variables, pixels, features / 2)
    np.testing.assert_allclose(outputs.logits - halved, np.asarray(features / 2, np.float64) @ kernel, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bti_dbf", "pam"])
def test_features_of_a_transformer_are_decoupled_too(name, digits):
    sizes = {"width": 16, "stages": (1,), "heads": 2, "patch": 4, "size": 16, "mean": (0.3,), "std": (0.4,)}
    vit = models.build("vit_b_32", num_classes=10, image_shape=(16, 16, 1), **sizes)
    start = vit.init(keys.root(0))
    quick = {"rounds": 1, "pretrain_epochs": 1, "mask_epochs": 1, "generator_epochs": 1, "epochs": 1, "width": 4}
    clean = digits.train.take(slice(0, 48))
    found = defenses.get(name).purify(keys.root(0), vit, start, clean, batch_size=24, **quick)
    moved = jax.tree.map(lambda one, other: float(np.abs(one - other).max()), start["params"], found.variables["params"])
    assert max(jax.tree.leaves(moved)) > 0 and np.isfinite(jax.tree.leaves(moved)).all()
    assert 0 <= found.told["reversed_target"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i_bau", "sau", "nad", "bti_dbf", "pam", "anp", "rnp"])
def test_one_device_and_eight_give_the_same_model(name, tiny, tiny_variables, digits):
    quick = {
        "i_bau": {"epochs": 1, "batch_size": 24},
        "sau": {"epochs": 1, "batch_size": 24, "steps": 2},
        "nad": {"epochs": 1, "teacher_epochs": 1, "batch_size": 24, "learning_rate": 0.01},
        "anp": {"iterations": 3, "batch_size": 24, "threshold": 0.5, "learning_rate": 0.01},
        "rnp": {"unlearn_epochs": 1, "recover_epochs": 1, "batch_size": 24, "threshold": 0.5},
    }
    rounds = {"rounds": 1, "pretrain_epochs": 1, "mask_epochs": 1, "generator_epochs": 1, "epochs": 1, "width": 2}
    options = quick.get(name) or rounds | {"batch_size": 24}
    given = (keys.root(0), tiny, tiny_variables, digits.train.take(slice(0, 48)))
    one = defenses.get(name).purify(*given, **options)
    with parallel.on_devices(8):
        eight = defenses.get(name).purify(*given, **options)
    if one.evidence and "bn1" in one.evidence:
        pairs = [(one.evidence[key], eight.evidence[key]) for key in one.evidence]
    else:
        pairs = zip(*map(jax.tree.leaves, (one.variables, eight.variables)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=3e-3, rtol=1e-3)
