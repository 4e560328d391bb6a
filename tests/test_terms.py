"""The terms of the E-step against loops of their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax.method import terms

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(0, 3, (2, 7, 5)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1], np.int32)
MOVED, CLEAN, DIRECTION = RNG.normal(0, 2, (3, 7, 6)).astype(np.float32)
FORMS = pytest.mark.parametrize("form", terms.PRIOR_FORMS)


def softmax(row):
    powers = [np.exp(float(value)) for value in row]
    return [power / sum(powers) for power in powers]


def cosine_or_inner(adversarial, clean, direction, eta, form):
    moved = [float(a) - eta * float(c) for a, c in zip(adversarial, clean, strict=True)]
    product = sum(m * float(d) for m, d in zip(moved, direction, strict=True))
    if form == "inner":
        return product
    return product / np.sqrt(sum(m * m for m in moved) * sum(float(d) ** 2 for d in direction))


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    expected = [-np.log(softmax(row)[label]) for row, label in zip(STUDENT, LABELS, strict=True)]
    np.testing.assert_allclose(terms.cross_entropy(STUDENT, LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize("alpha, temperature", [(0.3, 4.0), (0.0, 2.0), (1.0, 1.0)])
def test_distillation_is_equation_17(alpha, temperature):
    expected = []
    for teacher, student, label in zip(TEACHER, STUDENT, LABELS, strict=True):
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
        expected.append(alpha * temperature**2 * divergence - (1 - alpha) * np.log(softmax(student)[label]))
    found = terms.distillation(TEACHER, STUDENT, LABELS, alpha=alpha, temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_margin_is_the_labels_logit_less_the_largest_other_one():
    expected = [row[y] - max(row[k] for k in range(5) if k != y) for row, y in zip(STUDENT.astype(float), LABELS, strict=True)]
    np.testing.assert_allclose(terms.evidence(STUDENT, LABELS, form="margin"), expected, rtol=1e-6)
    np.testing.assert_array_equal(terms.evidence(STUDENT, LABELS), -terms.cross_entropy(STUDENT, LABELS))


def test_where_a_network_is_sure_the_margin_still_has_a_gradient_and_the_cross_entropy_none():
    sure = jnp.array([[40.0, 1.0, 0.0, -1.0, -2.0]])
    of = {form: lambda z, form=form: terms.evidence(z, jnp.array([0]), form=form).sum() for form in terms.ATTACK_FORMS}
    slopes = {form: jax.grad(evidence)(sure) for form, evidence in of.items()}
    assert np.abs(slopes["cross_entropy"]).max() < 1e-15 and slopes["margin"].tolist() == [[1.0, -1.0, 0.0, 0.0, 0.0]]


def test_distillation_from_equal_logits_leaves_only_the_cross_entropy():
    found = terms.distillation(STUDENT, STUDENT, LABELS, alpha=0.5, temperature=4.0)
    np.testing.assert_allclose(found, 0.5 * terms.cross_entropy(STUDENT, LABELS), atol=1e-5)


@FORMS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_prior_is_equations_20_and_21(form, eta):
    expected = [cosine_or_inner(*rows, eta, form) for rows in zip(MOVED, CLEAN, DIRECTION, strict=True)]
    np.testing.assert_allclose(terms.prior(MOVED, CLEAN, DIRECTION, eta=eta, form=form), expected, rtol=1e-4)


@FORMS
def test_the_prior_is_zero_with_zero_gradients_where_the_heads_are_equal(form):
    still = np.zeros_like(DIRECTION)
    prior = terms.prior(MOVED, CLEAN, still, eta=0.5, form=form)
    slopes = jax.grad(lambda moved: terms.prior(moved, CLEAN, still, eta=0.5, form=form).sum())(MOVED)
    np.testing.assert_array_equal(prior, 0.0)
    np.testing.assert_array_equal(slopes, 0.0)


def test_the_cosine_and_its_gradients_are_zero_where_the_features_have_not_moved():
    def prior(moved, clean, direction):
        return terms.prior(moved, clean, direction, eta=1.0).sum()

    assert prior(CLEAN, CLEAN, DIRECTION) == 0.0
    for slopes in jax.grad(prior, argnums=(0, 1, 2))(CLEAN, CLEAN, DIRECTION):
        np.testing.assert_array_equal(slopes, 0.0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_cosine_does_not_depend_on_lengths_and_stays_within_one(scale):
    found = terms.prior(scale * MOVED, scale * CLEAN, DIRECTION / scale, eta=0.5)
    np.testing.assert_allclose(found, terms.prior(MOVED, CLEAN, DIRECTION, eta=0.5), rtol=1e-4)
    assert (np.abs(terms.prior(DIRECTION, 0 * CLEAN, scale * DIRECTION, eta=0.0)) <= 1 + 1e-6).all()


@FORMS
def test_eta_has_no_gradient_with_respect_to_the_image_under_the_bare_product_alone(form):
    def slopes(eta):
        return jax.grad(lambda moved: terms.prior(moved, CLEAN, DIRECTION, eta=eta, form=form).sum())(MOVED)

    assert np.allclose(slopes(0.0), slopes(1.0), atol=1e-6) == (form == "inner")


def test_the_other_class_is_the_highest_but_never_the_label():
    logits = STUDENT.copy()
    logits[np.arange(7), LABELS] = 100.0
    found = terms.other_class(jnp.asarray(logits), jnp.asarray(LABELS))
    expected = [max((c for c in range(5) if c != y), key=lambda c: row[c]) for row, y in zip(logits, LABELS, strict=True)]
    assert found.tolist() == expected
    lowest = jnp.full((5, 5), -1e30)  # nothing but the label to choose from, and it is still not chosen
    assert (terms.other_class(lowest, jnp.arange(5)) != jnp.arange(5)).all()
