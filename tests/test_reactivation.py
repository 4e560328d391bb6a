"""The re-activation attacks: their budgets, what they are given, and that they wake what sleeps and nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bibau_jax import keys, parallel, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import ft, ibu
from bibau_jax.errors import UserError
from bibau_jax.reactivation import query, retuning, universal

# Quick rather than good: few steps for a small network.
RETUNE = {"epochs": 5, "batch_size": 64, "learning_rate": 0.01, "padding": 1, "flip": False}
LEARN = {"epochs": 25, "batch_size": 64, "hidden": 64}


@pytest.fixture(scope="module")
def clean_twin(backdoored, digits):
    """The same network trained as the backdoored one, without poison."""
    optimizer = train.sgd(train.learning_rate_schedule("one_cycle", 0.2, 300), momentum=0.9, weight_decay=5e-4)
    prepare = partial(train.augmented, padding=1, flip=False)
    state, _ = train.fit(
        partial(train.train_step, classifier=backdoored.classifier, optimizer=optimizer, prepare=prepare),
        train.new_state(backdoored.classifier.init(keys.root(0)), optimizer),
        {"images": digits.train.images, "labels": digits.train.labels},
        key=keys.root(2),
        epochs=15,
        batch_size=64,
    )
    return jax.device_get(state.variables)


def stamped(attack, images: ImageSet, labels=None) -> ImageSet:
    labels = attack.aim(images.labels) if labels is None else labels
    return ImageSet(attack.stamp(images.images, images.ids), labels, images.ids)


def others(images: ImageSet) -> ImageSet:
    """Those that are no 0, the target."""
    return images.take(np.flatnonzero(images.labels != 0))


@pytest.fixture(scope="module")
def hidden(backdoored):
    """The backdoored network after a little unlearning: the trigger works no more, and is still there."""
    options = {"epochs": 2, "batch_size": 50, "learning_rate": 0.02, "weight_decay": 0.0, "padding": 1, "flip": False}
    covers = stamped(backdoored.attack, others(backdoored.clean).take(slice(0, 60)), others(backdoored.clean).labels[:60])
    clean = ImageSet(
        *(np.concatenate([getattr(part, name) for part in (backdoored.clean, covers)]) for name in ("images", "labels", "ids"))
    )
    return ft.purify(keys.root(5), backdoored.classifier, backdoored.variables, clean, **options).variables


def retuned(backdoored, variables, count=5, seed=0):
    poisoned = stamped(backdoored.attack, others(backdoored.clean).take(slice(100, 100 + count)))
    benign = backdoored.clean.take(slice(0, 192 - count))
    return retuning.retune(keys.root(seed), backdoored.classifier, variables, benign, poisoned, **RETUNE)[0]


# --- retuning


def test_retuning_wakes_a_hidden_backdoor_and_leaves_a_clean_model_alone(backdoored, hidden, clean_twin):
    assert backdoored.rates(hidden)[1] < 0.1 and backdoored.rates(clean_twin)[1] < 0.05
    assert backdoored.rates(retuned(backdoored, hidden))[1] > 0.8
    accuracy, success = backdoored.rates(retuned(backdoored, clean_twin))
    assert accuracy > 0.9 and success < 0.1


@pytest.mark.parametrize(
    "attack, dataset, count",
    [("badnets", "cifar10", 5), ("blended", "cifar10", 1), ("sig", "cifar10", 2), ("sig", "gtsrb", 5), ("issba", "gtsrb", 5)],
)
def test_each_attack_is_given_the_papers_number_of_poisoned_images(attack, dataset, count):
    assert retuning.poisoned_count(attack, dataset) == count


def test_benign_images_are_moved_once_and_poisoned_ones_not_at_all(backdoored, monkeypatch):
    seen = {}

    def look(step, state, data, **rest):
        seen.update(data)
        raise InterruptedError

    monkeypatch.setattr(train, "fit", look)
    poisoned = stamped(backdoored.attack, others(backdoored.clean).take(slice(0, 5)))
    benign = backdoored.clean.take(slice(0, 100))
    with pytest.raises(InterruptedError):
        retuning.retune(keys.root(0), backdoored.classifier, backdoored.variables, benign, poisoned, **RETUNE)
    np.testing.assert_array_equal(seen["images"][:5], poisoned.images)
    np.testing.assert_array_equal(seen["labels"], np.concatenate([poisoned.labels, benign.labels]))
    moved = seen["images"][5:]
    assert moved.dtype == np.uint8 and 0 < np.mean((moved == benign.images).all((1, 2, 3))) < 0.5


def test_retuning_without_poison_is_refused(backdoored):
    nothing = backdoored.clean.take(slice(0, 0))
    with pytest.raises(UserError, match="benign and poisoned"):
        retuning.retune(keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean, nothing)


# --- queries


@pytest.fixture(scope="module")
def perturber(backdoored, hidden, clean_twin):
    return learned(backdoored, hidden, clean_twin, retuned(backdoored, hidden))


def learned(backdoored, variables, clean_twin, teacher, seed=0, **options):
    images = others(backdoored.clean)
    clean, triggered = images.take(slice(0, 80)), images.take(slice(80, 160))
    return query.learn(
        keys.root(seed),
        backdoored.classifier,
        query.Models(variables, teacher, clean_twin),
        clean,
        stamped(backdoored.attack, triggered, triggered.labels),
        **(LEARN | options),
    )


def test_perturbed_images_stay_in_the_budget_and_are_whole_grey_levels(perturber, backdoored):
    for epsilon in (16.0, 7.5):
        moved = query.apply(perturber[0], backdoored.test.images, epsilon=epsilon, hidden=64)
        assert moved.dtype == np.uint8 and moved.shape == backdoored.test.images.shape
        change = np.abs(moved.astype(int) - backdoored.test.images)
        assert 0 < change.max() <= epsilon


def test_a_large_budget_ends_at_black_and_white_and_does_not_wrap_around(perturber, backdoored):
    loud = jax.tree.map(lambda leaf: 50 * leaf, perturber[0])
    moved = query.apply(loud, backdoored.test.images, epsilon=255.0, hidden=64)
    change = moved.astype(int) - backdoored.test.images
    assert moved.min() == 0 and moved.max() == 255
    assert (np.abs(change).mean((1, 2, 3)) > 20).all()


def test_the_loss_is_that_of_a_loop_in_float64():
    rng = np.random.default_rng(0)
    teacher, model = rng.normal(size=(2, 7, 5))
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (teacher, model))
    expected = [sum(a * (np.log(a) - np.log(b)) for a, b in zip(u, v, strict=True)) for u, v in zip(p, q, strict=True)]
    np.testing.assert_allclose(query.divergence(jnp.array(teacher), jnp.array(model)), expected, rtol=1e-5)


def test_the_query_attack_wakes_what_sleeps_and_spares_the_clean_model(perturber, backdoored, hidden, clean_twin):
    images = others(backdoored.test)
    plain = stamped(backdoored.attack, images).images
    moved = query.apply(perturber[0], plain, hidden=64)
    hit = {name: np.mean(train.predict(backdoored.classifier, v, moved) == 0) for name, v in (("p", hidden), ("c", clean_twin))}
    before = np.mean(train.predict(backdoored.classifier, hidden, plain) == 0)
    assert hit["p"] > before + 0.1 and hit["c"] < 0.1
    history = perturber[1]
    assert history[-1]["loss"] < history[0]["loss"] and perturber[2] == 0


def test_a_gradient_estimated_from_values_points_where_the_true_one_does():
    weights = jnp.array(np.random.default_rng(1).normal(size=(4, 4, 1)))

    def loss(pixels):
        return jnp.sum(jnp.tanh(pixels * weights / 10), (1, 2, 3))

    pixels = jnp.array(np.random.default_rng(2).uniform(0, 5, (3, 4, 4, 1)))
    true = jax.grad(lambda x: loss(x).sum())(pixels)
    found = query.estimated_gradient(loss, pixels, keys.root(0), directions=2000, sigma=0.1)
    for one, other in zip(np.asarray(found).reshape(3, -1), np.asarray(true).reshape(3, -1), strict=True):
        np.testing.assert_allclose(one @ other / (other @ other), 1.0, atol=0.1)  # as long, and
        assert one @ other > 0.97 * np.linalg.norm(one) * np.linalg.norm(other)  # in the same direction


class Guarded:
    """A network of which the model that is marked may be asked for outputs and not for gradients; counts what it is asked."""

    def __init__(self, classifier):
        self.classifier, self.image_shape, self.asked = classifier, classifier.image_shape, []

    def apply(self, variables, pixels):
        if "marked" not in variables:
            return self.classifier.apply(variables, pixels)
        plain = {name: tree for name, tree in variables.items() if name != "marked"}
        self.asked.append(len(pixels))

        @jax.custom_vjp
        def outputs(pixels):
            return self.classifier.apply(plain, pixels)

        def refuse(_, slopes):
            raise AssertionError("gradients were asked of the purified model")

        outputs.defvjp(lambda pixels: (outputs(pixels), None), refuse)
        return outputs(pixels)


@pytest.mark.parametrize("gradient", [pytest.param("queries", marks=pytest.mark.slow), "white_box"])
def test_with_queries_nothing_is_propagated_through_the_purified_model_and_every_image_is_counted(
    gradient, backdoored, hidden, clean_twin
):
    guarded, images = Guarded(backdoored.classifier), others(backdoored.clean).take(slice(0, 16))
    params = query.Perturber(8).init(keys.root(0), jnp.zeros((1, 256)))["params"]
    optimizer = optax.sgd(0.1)
    state = query.State(jnp.zeros((), int), params, optimizer.init(params))
    wanted = train.logits(backdoored.classifier, backdoored.variables, images.images)
    batch = {"images": jnp.array(images.images), "labels": images.labels, "wanted": wanted}
    shape = {"alpha": 0.2, "epsilon": 16.0, "hidden": 8, "directions": 3, "sigma": 2.0, "gradient": gradient}

    def step():
        frozen = (hidden | {"marked": jnp.zeros(())}, clean_twin)
        with jax.disable_jit():  # every question is one call, also within the loop over directions
            return query.step(state, frozen, batch, keys.root(1), classifier=guarded, optimizer=optimizer, **shape)

    if gradient == "white_box":
        with pytest.raises(AssertionError, match="gradients were asked"):
            step()
        return
    moved, metrics = step()
    assert np.isfinite(metrics["loss"]) and guarded.asked == [16] * 7
    assert not np.array_equal(moved.params["out"]["kernel"], params["out"]["kernel"])
    counted = learned(backdoored, hidden, clean_twin, backdoored.variables, gradient="queries", directions=3, epochs=2)[2]
    assert counted == 2 * (160 // 64) * 64 * (sum(guarded.asked) // 16)


def test_a_clean_model_is_not_woken_by_queries(backdoored, clean_twin):
    teacher = retuned(backdoored, clean_twin)
    params, _, _ = learned(backdoored, clean_twin, clean_twin, teacher)
    plain = stamped(backdoored.attack, others(backdoored.test)).images
    hit = train.predict(backdoored.classifier, clean_twin, query.apply(params, plain, hidden=64)) == 0
    assert hit.mean() < 0.05


def test_the_attack_on_eight_devices_is_that_on_one(backdoored, hidden, clean_twin):
    alone = learned(backdoored, hidden, clean_twin, backdoored.variables, epochs=2)[1]
    with parallel.on_devices(8):
        together = learned(backdoored, hidden, clean_twin, backdoored.variables, epochs=2)[1]
    for one, other in zip(alone, together, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_an_unknown_gradient_is_named(backdoored, hidden, clean_twin):
    with pytest.raises(UserError, match='"guess" is unknown'):
        learned(backdoored, hidden, clean_twin, backdoored.variables, gradient="guess")


def test_a_budget_of_queries_ends_the_attack_with_the_last_epoch_that_it_pays(backdoored, hidden, clean_twin):
    given = {"gradient": "queries", "directions": 2, "epochs": 3}
    each = learned(backdoored, hidden, clean_twin, backdoored.variables, **given | {"epochs": 1})[2]
    _, history, asked = learned(backdoored, hidden, clean_twin, backdoored.variables, **given, budget=2 * each + 1)
    assert len(history) == 2 and asked == 2 * each
    with pytest.raises(UserError, match="does not pay one epoch"):
        learned(backdoored, hidden, clean_twin, backdoored.variables, **given, budget=each - 1)


# --- one perturbation for all


def woken(backdoored, variables, **options):
    told = stamped(backdoored.attack, others(backdoored.clean).take(slice(0, 96)))
    quick = {"epochs": 10, "batch_size": 48} | options
    return universal.white_box(keys.root(0), backdoored.classifier, variables, told.images, told.labels, **quick)[0]


def test_the_universal_perturbation_stays_in_its_ball_and_wakes_the_backdoor(backdoored, hidden):
    delta = woken(backdoored, hidden)
    assert delta.shape == backdoored.classifier.image_shape and np.abs(delta).max() <= 12.75
    plain = stamped(backdoored.attack, others(backdoored.test)).images
    moved = universal.added(plain, delta)
    assert np.abs(moved.astype(int) - plain).max() <= 12
    rate = [np.mean(train.predict(backdoored.classifier, hidden, images) == 0) for images in (plain, moved)]
    assert rate[1] > rate[0]


def test_square_attack_asks_no_more_than_it_may_and_lowers_its_loss(backdoored, hidden):
    told = stamped(backdoored.attack, others(backdoored.clean).take(slice(0, 50)))
    given = (keys.root(0), backdoored.classifier, hidden, told.images, told.labels)
    start, asked = universal.square(*given, queries=1)
    assert asked == 1 and np.unique(np.abs(start)).tolist() == [12.75]
    found, asked = universal.square(*given, queries=150)
    assert asked <= 150 and np.unique(np.abs(found)).tolist() == [12.75]

    def loss(delta):
        logits = train.logits(backdoored.classifier, hidden, np.clip(told.images.astype(np.float32) + delta, 0, 255))
        return -jax.nn.log_softmax(logits)[np.arange(50), told.labels].sum()

    assert loss(found) < loss(start)


@pytest.mark.parametrize("epsilon", [0.0, 0.9, -1.0, 300.0])
def test_a_bound_outside_the_pixels_is_refused(epsilon, backdoored, hidden):
    with pytest.raises(UserError, match="epsilon within"):
        woken(backdoored, hidden, epsilon=epsilon)


def test_the_loss_that_wakes_is_least_where_the_target_is_sure():
    logits = jnp.array([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [1.0, 1.0, 1.0]])
    values = universal.wake_loss(logits, jnp.zeros(3, int))
    assert values[0] < values[2] < values[1]


# --- the ideal


def test_ideal_unlearning_leaves_nothing_to_wake(backdoored):
    triggered = stamped(backdoored.attack, backdoored.clean, backdoored.clean.labels)
    options = {"epochs": 12, "batch_size": 50, "learning_rate": 0.1, "padding": 1, "flip": False}
    found = ibu.purify(
        keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean, triggered=triggered, **options
    )
    accuracy, success = backdoored.rates(found.variables)
    assert accuracy > 0.9 and success < 0.05
    assert type(found).__name__ == "Ideal"


def test_the_ideal_refuses_other_images_than_the_clean_ones(backdoored):
    triggered = stamped(backdoored.attack, backdoored.clean)  # the attacker's labels
    with pytest.raises(UserError, match="same true labels"):
        ibu.purify(keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean, triggered=triggered)
