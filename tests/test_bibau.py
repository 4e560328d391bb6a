"""BI-BAU: its E-step, its M-step, which terms an ablation leaves, when the Fishers are taken, and a golden run."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax import keys, train
from bibau_jax.data import ImageSet
from bibau_jax.defenses import bibau
from bibau_jax.defenses.adversarial import (
    AWAY,
    FACTORS,
    adversarial_objective,
    aims,
    attack_images,
    balanced_gradient,
    clean_references,
    e_step,
    sufficient,
)
from bibau_jax.method import ewc, settings, terms
from tests import regenerate

L2 = bibau.Perturbation("l2", 200.0, 60.0, 2)
ALL = bibau.Weights(1.0, 1.0, 1.0, 0.5, 0.5, 4.0, 0.5, "cosine", 100.0, "neg_log")
NONE = ALL._replace(kd=0.0, prior=0.0, ewc=0.0, iewc=0.0)
TERMS_OF_A, TERMS_OF_B = {"ewc_quadratic"}, {"iewc", "iewc_awake", "iewc_quadratic"}
OF_BOTH = {"attack", "loss", "clean_loss", "adversarial_loss", "accuracy", "fooled", "kept"}


@pytest.fixture(scope="module")
def clean(digits) -> ImageSet:
    return digits.train.take(slice(40))


@pytest.fixture(scope="module")
def moved(tiny_variables):
    """A current model that is not the backdoored one any more."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32), tiny_variables["params"])
    return {**tiny_variables, "params": params}


@pytest.fixture(scope="module")
def purify(tiny, tiny_variables, clean):
    def run(**options):
        small = {
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 0.02,
            "pgd": L2,
            "padding": 1,
            "flip": False,
            "fisher_chunk": 20,
        }
        return bibau.purify(keys.root(0), tiny, tiny_variables, clean, **small | options)

    return run


def names(history):
    return history[0].keys() - {"epoch", "step", "seconds"}


# --- E-step


def objective(images, labels, moved, backdoored, tiny, target, weights):
    options = {"classifier": tiny, "weights": weights}
    fixed = clean_references(images[0], moved, backdoored, **options)
    return adversarial_objective(images[1], fixed, labels, moved, backdoored, target=target, **options)


@pytest.mark.parametrize("target", [None, 3])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_e_step_raises_its_objective_within_the_bound(tiny, tiny_variables, moved, clean, target, norm):
    images, labels = jnp.asarray(clean.images, jnp.float32), jnp.asarray(clean.labels)
    perturbation = L2 if norm == "l2" else bibau.Perturbation("linf", 30.0, 10.0, 2)
    shared = {"classifier": tiny, "target": target, "weights": ALL}
    run = jax.jit(partial(e_step, perturbation=perturbation, **shared))
    adversarial = run(images, labels, moved, tiny_variables, keys.root(0))
    before, after = (objective((images, x), labels, moved, tiny_variables, tiny, target, ALL)[0] for x in (images, adversarial))
    attacked = np.ones(40, bool) if target is None else clean.labels != target
    assert (after[attacked] > before[attacked]).mean() > 0.9
    order = 2 if norm == "l2" else np.inf
    distance = np.linalg.norm(np.asarray(adversarial - images).reshape(40, -1), order, axis=1)
    assert (distance <= perturbation.epsilon * 1.0001).all() and (distance[attacked] > 0).all()
    assert not attacked.all() or target is None
    np.testing.assert_array_equal(adversarial[~attacked], images[~attacked])  # images of the target class are left alone


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_images_is_aimed_at_the_class_that_is_suspected(tiny, tiny_variables, moved, clean, share):
    images, labels = jnp.asarray(clean.images, jnp.float32), jnp.asarray(clean.labels)

    def made(target, perturbation):
        run = jax.jit(partial(e_step, classifier=tiny, weights=ALL, target=target, perturbation=perturbation))
        return run(images, labels, moved, tiny_variables, keys.root(0))

    twice = L2._replace(epsilon=2 * L2.epsilon, step_size=2 * L2.step_size)
    aimed, away, towards = made(None, L2._replace(aimed=share, aim=3, reach=2.0)), made(None, L2), made(3, twice)
    classes = np.asarray(aims(labels, share, 3))
    assert ((classes == 3) | (classes == AWAY)).all() and not (classes == labels).any()
    others = clean.labels != 3
    assert abs((classes == 3).sum() - share * others.sum()) <= 4 and not others.all()
    # No image depends on the others of its batch, so it is just that of the problem that it is given.
    expected = np.where((classes == 3)[:, None, None, None], towards, away)
    np.testing.assert_allclose(aimed, expected, atol=1e-3)
    assert np.abs(np.asarray(towards - away))[others].max((1, 2, 3)).min() > 1


def test_the_objective_is_the_sum_of_its_terms(tiny, tiny_variables, moved, clean):
    images, labels = jnp.asarray(clean.images, jnp.float32), jnp.asarray(clean.labels)
    changed = jnp.clip(images + 20.0, 0, 255)
    backdoored_says, current = (tiny.apply(variables, changed) for variables in (tiny_variables, moved))
    teacher, features = tiny.apply(tiny_variables, images).logits, tiny.apply(moved, images).features
    kd = terms.distillation(teacher, current.logits, labels, alpha=0.5, temperature=4.0)
    for target in (None, 3):
        wanted = labels if target is None else jnp.full_like(labels, target)
        ce = terms.cross_entropy(backdoored_says.logits, wanted) * (1 if target is None else -1)
        k = terms.other_class(backdoored_says.logits, labels) if target is None else wanted
        heads = [tiny.head_kernel(variables["params"]) for variables in (tiny_variables, moved)]
        prior = terms.prior(current.features, features, (heads[0] - heads[1]).T[k], eta=0.5)
        weights = ALL._replace(kd=2.0, prior=3.0)
        found, parts = objective((images, changed), labels, moved, tiny_variables, tiny, target, weights)
        np.testing.assert_allclose(found, ce - 2.0 * kd + 3.0 * prior, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(parts["kept"], jnp.argmax(current.logits, -1) == labels)
        seen = jnp.argmax(backdoored_says.logits, -1)
        np.testing.assert_array_equal(parts["fooled"], seen != labels if target is None else seen == target)


@pytest.mark.parametrize("target", [None, 3])
def test_balanced_the_two_models_pull_with_lengths_that_do_not_depend_on_how_sure_they_are(
    tiny, tiny_variables, moved, clean, target
):
    images, labels = jnp.asarray(clean.images, jnp.float32), jnp.asarray(clean.labels)
    changed = jnp.clip(images + 20.0, 0, 255)
    weights = ALL._replace(attack_form="margin", balance=0.3)
    given = {"classifier": tiny, "target": target, "weights": weights}

    def unit(x):
        return x / np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)[:, None, None, None]

    def slope(weights, backdoored):
        return jax.grad(lambda x: objective((images, x), labels, moved, backdoored, tiny, target, weights)[0].sum())(changed)

    fixed = clean_references(images, moved, tiny_variables, classifier=tiny, weights=weights)
    found = balanced_gradient(changed, fixed, labels, moved, tiny_variables, **given)
    attack = slope(weights._replace(kd=0.0, prior=0.0), tiny_variables)
    both = slope(weights, tiny_variables)
    np.testing.assert_allclose(found, unit(attack) + 0.3 * unit(both - attack), atol=2e-4)
    # A backdoored model ten times as sure of itself: its head's outputs are ten times as large, all else is as it was.
    head = jax.tree.map(lambda leaf: 10 * leaf, tiny_variables["params"]["head"])
    sure = tiny_variables | {"params": tiny_variables["params"] | {"head": head}}
    np.testing.assert_allclose(balanced_gradient(changed, fixed, labels, moved, sure, **given), found, atol=2e-4)
    assert np.abs(slope(weights, sure) - both).max() > 0.1 * np.abs(both).max()


@pytest.mark.parametrize("target", [None, 3])
def test_bound_and_step_grow_together_until_enough_images_fool_the_suspicious_model(backdoored, target):
    clean, variables = backdoored.clean.take(slice(0, 60)), backdoored.variables
    few = bibau.Perturbation("l2", 20.0, 6.0, 3, fooled=0.9)
    given = {"classifier": backdoored.classifier, "target": target, "weights": ALL, "batch_size": 16}
    found, told = sufficient(clean, variables, keys.root(0), perturbation=few, **given)
    factor = found.epsilon / 20.0
    assert factor in FACTORS[1:] and found.step_size == pytest.approx(6.0 * factor) and found.steps == 3
    assert told == {"epsilon": found.epsilon, "step_size": found.step_size, "fooled": told["fooled"]}

    def share(perturbation):
        some = clean.take(np.flatnonzero(clean.labels != target))
        alone = given | {"weights": NONE, "perturbation": perturbation}
        _, seen = attack_images(some.images, some.labels, variables, variables, keys.root(5), **alone)
        return (seen == target).mean() if target is not None else (seen != some.labels).mean()

    assert share(found) == pytest.approx(told["fooled"]) and told["fooled"] >= 0.9
    before = FACTORS[FACTORS.index(factor) - 1]
    assert share(found._replace(epsilon=20.0 * before, step_size=6.0 * before)) < 0.9


def test_images_that_are_aimed_go_as_far_as_they_must_to_be_taken_for_that_class(backdoored):
    clean, variables = backdoored.clean.take(slice(0, 60)), backdoored.variables
    few = bibau.Perturbation("l2", 100.0, 30.0, 3, fooled=0.6)
    given = {"classifier": backdoored.classifier, "weights": ALL, "batch_size": 16}
    found, told = sufficient(
        *(clean, variables, keys.root(0)), perturbation=few._replace(aimed=0.5, aim=3), target=None, **given
    )
    away, _ = sufficient(clean, variables, keys.root(0), perturbation=few, target=None, **given)
    towards, aimed = sufficient(clean, variables, keys.root(0), perturbation=few, target=3, **given)
    assert (found.epsilon, found.step_size) == (away.epsilon, away.step_size) and (found.aimed, found.aim) == (0.5, 3)
    assert found.reach == told["reach"] == towards.epsilon / away.epsilon > 1
    assert told["fooled_aimed"] == aimed["fooled"] >= 0.6


def test_a_purification_takes_the_bound_that_it_found_and_tells_it(backdoored):
    small = L2._replace(epsilon=20.0, step_size=6.0, fooled=0.9)
    given = (keys.root(0), backdoored.classifier, backdoored.variables, backdoored.clean.take(slice(0, 60)))
    options = {"epochs": 1, "batch_size": 16, "padding": 1, "flip": False, "ablation": "base_at"}
    made = bibau.purify(*given, pgd=small, **options)
    bound = made.told["perturbation"]["epsilon"]
    again = bibau.purify(*given, pgd=small._replace(epsilon=bound, step_size=0.3 * bound, fooled=0.0), **options)
    assert bound > 20 and again.told == {}
    for one, other in zip(jax.tree.leaves(made.variables), jax.tree.leaves(again.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# --- M-step


def softened(logits, teacher, labels, share: float, temperature: float) -> np.ndarray:
    """(1 - share) CE to the labels + share T^2 KL to the teacher's answers at T, by hand."""
    logits, teacher = np.asarray(logits, np.float64), np.asarray(teacher, np.float64)
    p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True) for z in (teacher, logits))
    right = np.take_along_axis(logits, np.asarray(labels)[:, None], -1)[:, 0]
    return share * temperature**2 * (p * np.log(p / q)).sum(-1) + (1 - share) * (np.log(np.exp(logits).sum(-1)) - right)


@pytest.mark.parametrize(("target", "share"), [(None, 0.0), (3, 0.0), (None, 0.7), (3, 1.0)])
def test_the_loss_of_the_m_step_is_the_sum_of_its_terms(tiny, tiny_variables, moved, clean, target, share):
    images, labels = jnp.asarray(clean.images, jnp.float32), jnp.asarray(clean.labels)
    adversarial = jnp.clip(images + 10.0, 0, 255)
    params, anchor = moved["params"], tiny_variables["params"]
    fishers = [jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), params) for size in (0.1, 0.2)]
    state = bibau.UnlearningState(jnp.int32(0), params, moved["batch_stats"], (), *fishers)
    weights = ALL._replace(ewc=2.0, iewc=3.0, softened=share)
    loss, (statistics, parts) = bibau.m_step_loss(
        *(params, state, images, adversarial, labels, tiny_variables), classifier=tiny, target=target, weights=weights
    )
    both = tiny.apply(moved, jnp.concatenate([images, adversarial]), train=True)
    teacher = jnp.tile(tiny.apply(tiny_variables, images).logits, (2, 1))
    ce = softened(both.logits, teacher, jnp.tile(labels, 2), share, weights.temperature).reshape(2, 40)
    attacked = np.ones(40, bool) if target is None else clean.labels != target
    quadratics = [ewc.quadratic_form(fisher, params, anchor) for fisher in fishers]
    inverse = ewc.inverse_penalty(quadratics[1], 100.0, "neg_log")
    np.testing.assert_allclose(loss, ce[0].mean() + ce[1][attacked].mean() + 2 * quadratics[0] + 3 * inverse, rtol=1e-4)
    np.testing.assert_allclose([parts["ewc_quadratic"], parts["iewc_quadratic"]], quadratics, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), statistics, both.statistics)


# --- ablations


@pytest.fixture(scope="module")
def with_everything(purify):
    return purify(ablation="+A+B")


def test_with_both_every_term_is_logged_each_epoch(with_everything):
    assert all(entry.keys() == with_everything.history[0].keys() for entry in with_everything.history)
    assert names(with_everything.history) == OF_BOTH | TERMS_OF_A | TERMS_OF_B | {"kd", "prior"}
    for entry in with_everything.history:
        assert all(0 <= entry[share] <= 1 for share in ("accuracy", "fooled", "kept", "iewc_awake"))
        assert entry["kd"] > 0 and -1 <= entry["prior"] <= 1
    first, last = with_everything.history
    assert 0 < first["ewc_quadratic"] < last["ewc_quadratic"] and 0 < first["iewc_quadratic"] < last["iewc_quadratic"]


@pytest.mark.parametrize("ablation, logged", [("+A", TERMS_OF_A), ("+B", TERMS_OF_B), ("base_at", set())])
def test_an_ablation_computes_only_its_own_terms(monkeypatch, purify, clean, ablation, logged):
    seen = {}

    def look(step, state, data, *, frozen, key, **rest):
        seen.update(jax.eval_shape(step, state, frozen, data, key)[1])
        raise InterruptedError

    monkeypatch.setattr(train, "fit", look)
    with pytest.raises(InterruptedError):
        purify(ablation=ablation)
    e_step = set() if ablation == "base_at" else {"kd", "prior"}  # both are watched where either weighs
    assert seen.keys() == OF_BOTH | logged | e_step


def test_base_at_is_bibau_with_all_weights_zero(purify):
    without = {f"lambda_{term}": 0.0 for term in ("kd", "prior", "ewc", "iewc")}
    expected, found = purify(ablation="base_at", epochs=1), purify(ablation="+A+B", epochs=1, **without)
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)


# --- the Fishers


@pytest.mark.parametrize("refresh, expected", [("epoch", "u c c c"), ("never", "u c")])
def test_f_u_is_taken_once_and_f_cl_once_or_every_epoch(monkeypatch, purify, tiny_variables, clean, refresh, expected):
    taken = []

    def fake(classifier, variables, images, labels, *, chunk):
        is_clean = images.dtype == np.uint8
        taken.append("c" if is_clean else "u")
        same = np.array_equal(variables["params"]["head"]["bias"], tiny_variables["params"]["head"]["bias"])
        assert same == (len(taken) <= 2)  # F^u and the first F^cl at theta_b, later ones at the current parameters
        if is_clean:
            np.testing.assert_array_equal(labels, clean.labels)
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, len(taken)), variables["params"])

    monkeypatch.setattr(bibau, "diagonal_fisher", fake)
    history = purify(fisher_refresh=refresh, epochs=3, ablation="+A+B").history
    assert " ".join(taken) == expected
    # The fakes are constants: F^u all ones, the first F^cl all twos, so that the forms tell which one was used.
    ratios = [entry["ewc_quadratic"] / entry["iewc_quadratic"] for entry in history]
    np.testing.assert_allclose(ratios, [2.0, 3.0, 4.0] if refresh == "epoch" else [2.0] * 3, rtol=1e-4)


@pytest.mark.parametrize("ablation, expected", [("base_at", ""), ("+A", "c"), ("+B", "u")])
def test_only_the_fishers_that_weigh_are_taken(monkeypatch, tiny, tiny_variables, clean, ablation, expected):
    taken = []

    def fake(classifier, variables, images, labels, *, chunk):
        taken.append("c" if images.dtype == np.uint8 else "u")
        return variables["params"]

    monkeypatch.setattr(bibau, "diagonal_fisher", fake)
    with_a, with_b = settings.ABLATIONS[ablation]
    options = {"labels": "true", "batch_size": 40, "target": None, "perturbation": L2._replace(steps=0)}
    before = bibau.fisher_before_epoch(
        *(clean, tiny_variables, keys.root(0)),
        **(options | {"classifier": tiny, "weights": NONE._replace(ewc=float(with_a), iewc=float(with_b))}),
        **{"refresh": "never", "chunk": 8},
    )
    before(bibau._first_state(tiny_variables, train.sgd(lambda step: 0.1, momentum=0.9, weight_decay=0.0)), 0)
    assert "".join(taken) == expected


@pytest.mark.parametrize("target", [None, 3])
def test_the_unlearning_set_is_what_fools_the_backdoored_model_with_its_own_labels(tiny, tiny_variables, clean, target):
    options = {"target": target, "classifier": tiny, "weights": NONE, "perturbation": L2, "batch_size": 16}
    made = {
        labels: bibau.unlearning_set(clean, tiny_variables, keys.root(0), labels=labels, **options)
        for labels in ("predicted", "true")
    }
    attacked = clean if target is None else clean.take(clean.labels != target)
    images, predicted = made["predicted"]
    assert len(images) == len(attacked) < 41 and images.dtype == np.float32
    np.testing.assert_array_equal(predicted, train.predict(tiny, tiny_variables, images))
    np.testing.assert_array_equal(made["true"][1], attacked.labels)
    np.testing.assert_array_equal(made["true"][0], images)
    assert (predicted != attacked.labels).any()


# --- golden values


def test_a_seeded_tiny_run_gives_the_values_that_were_recorded():
    golden = json.loads((regenerate.FOLDER / "bibau.json").read_text())
    found = regenerate.bibau_steps()
    assert found.keys() == golden.keys()
    for mode, steps in golden.items():
        for number, (now, then) in enumerate(zip(found[mode], steps, strict=True)):
            assert now == pytest.approx(then, rel=1e-3, abs=1e-3), f"{mode}, step {number + 1}; {regenerate.HOW}"
