"""Defences that train against what they take for the trigger: their bounds, gradients and fixed points."""

import dataclasses
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
from bibau_jax.models.unet import UNet


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


def test_images_are_reversed_towards_the_class_that_is_asked_for(tiny, tiny_variables, batch):
    images, labels = batch
    scale, optimizer = bti_dbf.scale_of(np.asarray(images)), optax.sgd(1.0)
    _, features = bti_dbf.feature_map(tiny, tiny_variables, images)
    mask, state = (
        jnp.full((1, *features.shape[1:]), 0.5),
        train.new_state({"params": {"shift": 3.0}, "batch_stats": {}}, optimizer),
    )

    def loss(target):
        _, told = bti_dbf.reversal_step(
            state,
            (tiny_variables, mask, target),
            {"images": images, "labels": labels},
            keys.root(0),
            classifier=tiny,
            generate=lambda params, pixels: pixels + params["shift"],
            scale=scale,
            optimizer=optimizer,
            prepare=lambda key, batch: batch["images"],
        )
        return float(told["loss"])

    towards = cross_entropy(tiny.apply(tiny_variables, images + 3.0).logits, jnp.full(len(images), 2)).mean()
    assert loss(np.int32(2)) - loss(np.int32(-1)) == pytest.approx(float(towards), rel=1e-4)


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
