"""The terms of the E-step's objective: cross-entropy, distillation (Eq. 17) and the backdoor-feature prior (Eq. 20-21)."""

import jax
import jax.numpy as jnp

ATTACK_FORMS = ("cross_entropy", "margin")
PRIOR_FORMS = ("cosine", "inner")
TINY = 1e-12


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] per example: [N, K], [N] -> [N]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def evidence(logits: jax.Array, labels: jax.Array, *, form: str = "cross_entropy") -> jax.Array:
    """How much the logits speak for the label, per example: [N, K], [N] -> [N].

    "cross_entropy" is the paper's, -CE. Its gradient vanishes where a network is sure of itself, and any other term then
    outweighs it. "margin" does not saturate: the label's logit less the largest of the others (ours).
    """
    if form == "cross_entropy":
        return -cross_entropy(logits, labels)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return own - jnp.take_along_axis(logits, other_class(logits, labels)[:, None], axis=-1)[:, 0]


def distillation(teacher_logits, student_logits, labels, *, alpha: float, temperature: float) -> jax.Array:
    """L_kd = alpha T^2 KL(softmax(f_b(x)/T) || softmax(f(x')/T)) + (1 - alpha) CE(f(x'), y), per example (Eq. 17).

    The teacher is the backdoored model on the *clean* image, the student the current model on the adversarial one.
    """
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return alpha * temperature**2 * divergence + (1.0 - alpha) * cross_entropy(student_logits, labels)


def prior(adversarial_features, clean_features, direction, *, eta: float, form: str = "cosine") -> jax.Array:
    """L_prior = sim(phi(x') - eta phi(x), (W_b - W)[:, k]) per example: [N, D] each -> [N] (Eq. 20-21).

    eta = 0 aligns x' with the backdoor features alone; eta = 1 keeps its change orthogonal to the clean feature. "cosine" is
    our reading, because under the bare product "inner" eta has no gradient with respect to x'. Where either vector
    vanishes, as the direction does at W = W_b, the cosine and its gradient are 0.
    """
    moved = adversarial_features - eta * clean_features
    product = jnp.sum(moved * direction, axis=-1)
    if form == "inner":
        return product
    squares = jnp.sum(moved**2, axis=-1) * jnp.sum(direction**2, axis=-1)
    defined = squares > TINY**2
    return jnp.where(defined, product * jax.lax.rsqrt(jnp.where(defined, squares, 1.0)), 0.0)


def other_class(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The class that the logits favour apart from the label, [N]: where an untargeted x' is heading."""
    hidden = jnp.where(jax.nn.one_hot(labels, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jnp.argmax(hidden, axis=-1)
