"""The two Fisher-weighted penalties: values, gradients, and where the inverse one sleeps and wakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bibau_jax.method import ewc

ANCHOR = {"conv": jnp.array([[1.0, -2.0], [0.5, 0.0]]), "head": {"bias": jnp.array([3.0])}}
FISHER = {"conv": jnp.array([[0.5, 0.0], [2.0, 1.0]]), "head": {"bias": jnp.array([4.0])}}
SHIFT = {"conv": jnp.array([[0.2, 9.0], [-0.1, 0.3]]), "head": {"bias": jnp.array([-0.5])}}
FORMS = pytest.mark.parametrize("form", ewc.INVERSE_FORMS)
CAP = 4.0


def moved(scale):
    return jax.tree.map(lambda a, s: a + scale * s, ANCHOR, SHIFT)


def penalty(params, form="clip", cap=CAP):
    return ewc.inverse_penalty(ewc.quadratic_form(FISHER, params, ANCHOR), cap, form)


def test_ewc_is_zero_with_zero_gradient_at_the_backdoored_parameters():
    value, slopes = jax.value_and_grad(ewc.quadratic_form, argnums=1)(FISHER, ANCHOR, ANCHOR)
    assert value == 0.0
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(slopes))


def test_ewc_is_the_fisher_weighted_square_of_the_distance():
    by_hand = 0.5 * 0.2**2 + 0.0 * 9.0**2 + 2.0 * 0.1**2 + 1.0 * 0.3**2 + 4.0 * 0.5**2
    value, slopes = jax.value_and_grad(ewc.quadratic_form, argnums=1)(FISHER, moved(1.0), ANCHOR)
    np.testing.assert_allclose(value, by_hand, rtol=1e-6)
    np.testing.assert_allclose(slopes["conv"], 2 * FISHER["conv"] * SHIFT["conv"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slopes["head"]["bias"], [2 * 4.0 * -0.5], rtol=1e-5)


@pytest.mark.parametrize("scale, awake", [(0.0, False), (0.1, False), (0.46, False), (0.48, True), (3.0, True)])
def test_the_inverse_penalty_sleeps_until_the_form_passes_one_over_the_cap(scale, awake):
    # Q(1) = 1.13, so Q passes 1 / CAP = 0.25 at scale 0.4703.
    quadratic, form_slopes = jax.value_and_grad(ewc.quadratic_form, argnums=1)(FISHER, moved(scale), ANCHOR)
    value, slopes = jax.value_and_grad(penalty)(moved(scale))
    assert bool(ewc.is_awake(quadratic, CAP)) == awake
    if awake:
        np.testing.assert_allclose(value, 1 / quadratic, rtol=1e-6)
        expected = jax.tree.map(lambda leaf: -leaf / quadratic**2, form_slopes)  # -dQ / Q^2
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), slopes, expected)
        assert any((leaf != 0.0).any() for leaf in jax.tree.leaves(slopes))
    else:
        assert value == CAP
        assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("quadratic", [0.0, 0.01, 0.2, 0.3, 5.0])
def test_the_other_forms_have_their_values_and_gradients(quadratic):
    value, slope = jax.value_and_grad(ewc.inverse_penalty)(quadratic, CAP, "neg_log")
    np.testing.assert_allclose([value, slope], [-np.log(quadratic + 0.25), -1 / (quadratic + 0.25)], rtol=1e-5)
    value, slope = jax.value_and_grad(ewc.inverse_penalty)(quadratic, CAP, "hinge")
    np.testing.assert_allclose([value, slope], [max(0.0, 1 - 4 * quadratic), -4.0 * (quadratic < 0.25)], atol=1e-6)


@FORMS
def test_every_form_falls_as_the_parameters_leave_the_backdoor(form):
    values = [float(ewc.inverse_penalty(jnp.float32(q), CAP, form)) for q in (0.0, 0.1, 0.3, 1.0, 9.0)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


@FORMS
@pytest.mark.parametrize("cap", [0.01, 1.0, 1e4])
def test_values_and_gradients_are_finite_everywhere(form, cap):
    for quadratic in (0.0, 1e-38, 1e-12, 0.5 / cap, 1 / cap, 2 / cap, 1e8, 1e30):
        value, slope = jax.value_and_grad(ewc.inverse_penalty)(jnp.float32(quadratic), cap, form)
        assert np.isfinite(value) and np.isfinite(slope) and slope <= 0.0


@FORMS
def test_finite_at_the_backdoored_parameters_too_where_every_gradient_is_zero(form):
    value, slopes = jax.value_and_grad(penalty)(ANCHOR, form)
    assert np.isfinite(value)
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(slopes))


@FORMS
@pytest.mark.parametrize("quadratic", [0.01, 0.24, 0.26, 7.0])
def test_awake_means_that_there_is_a_gradient(form, quadratic):
    slope = jax.grad(ewc.inverse_penalty)(quadratic, CAP, form)
    assert bool(ewc.is_awake(jnp.float32(quadratic), CAP, form)) == bool(slope != 0.0)
