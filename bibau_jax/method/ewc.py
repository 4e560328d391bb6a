"""Elastic weight consolidation and its inverse: the two Fisher-weighted penalties of the M-step (Eq. 23-25)."""

import jax
import jax.numpy as jnp

INVERSE_FORMS = ("clip", "neg_log", "hinge")


def quadratic_form(fisher, params, anchor) -> jax.Array:
    """Q = sum_i F_i (theta_i - theta_b,i)^2 over all parameters: the EWC penalty (Eq. 24)."""
    terms = jax.tree.map(lambda f, p, a: jnp.sum(f * (p - a) ** 2), fisher, params, anchor)
    return sum(jax.tree.leaves(terms))


def inverse_penalty(quadratic: jax.Array, cap: float, form: str = "clip") -> jax.Array:
    """L_iewc, which falls as Q grows: it drives the parameters away from those that carry the backdoor (Eq. 25).

    "clip" is the paper's clip(1/Q, 0, c): asleep (no gradient) until Q > 1/c, which the other terms must bring about.
    "neg_log" is -log(Q + 1/c), awake as soon as the parameters move. "hinge" is max(0, 1 - c Q), awake until Q reaches 1/c.
    """
    if form == "neg_log":
        return -jnp.log(quadratic + 1.0 / cap)
    if form == "hinge":
        return jnp.maximum(0.0, 1.0 - cap * quadratic)
    awake = is_awake(quadratic, cap)
    # The inner where keeps 1/0 out of the gradient at theta = theta_b.
    return jnp.where(awake, 1.0 / jnp.where(awake, quadratic, 1.0), cap)


def is_awake(quadratic: jax.Array, cap: float, form: str = "clip") -> jax.Array:
    """Whether `inverse_penalty` has a gradient at this Q, up to that of Q itself."""
    if form == "neg_log":
        return quadratic > 0.0
    return quadratic < 1.0 / cap if form == "hinge" else quadratic > 1.0 / cap
