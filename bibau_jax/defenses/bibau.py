"""BI-BAU: backdoor unlearning as a bi-level problem (Zhu et al., ACM CCS 2026, section 4; Eq. 17-27).

E-step (`defenses/adversarial.py`): adversarial images that look like the backdoor to the *backdoored* model and keep their
meaning for the model being purified. M-step: one optimiser step on clean and adversarial images under two Fisher-weighted
penalties, one that keeps what the clean task needs (EWC) and one that drives out what the backdoor needs (inverse EWC).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bibau_jax import keys, parallel, progress, train
from bibau_jax.data import ImageSet
from bibau_jax.data.augment import crop_and_flip
from bibau_jax.defenses.adversarial import adversarial_objective, attack_images, clean_references, e_step, sufficient
from bibau_jax.defenses.protocol import Purified, as_data, check_clean, watch
from bibau_jax.information import diagonal_fisher
from bibau_jax.method import ewc, terms
from bibau_jax.method.settings import Perturbation, Weights, check, weighted
from bibau_jax.models import Classifier


@struct.dataclass
class UnlearningState:
    """What BI-BAU changes: the model being purified, and the Fisher diagonals that its penalties weigh with."""

    step: jax.Array
    params: Any
    statistics: Any
    opt_state: Any
    fisher_clean: Any
    fisher_unlearning: Any

    @property
    def variables(self) -> dict:
        """Parameters and running statistics, as `Classifier.apply` takes them."""
        return {"params": self.params, "batch_stats": self.statistics}


def m_step_loss(params, state, images, adversarial, labels, backdoored, *, classifier, target, weights: Weights):
    """CE(f(x), y) + CE(f(x'), y) + lambda_3 L_ewc + lambda_4 L_iewc (Eq. 2, 23-25), with new statistics and parts."""
    # Interleaved, so that a sharded batch stays where it is; both halves pass BatchNorm together.
    both = jnp.stack([images, adversarial], 1).reshape(-1, *images.shape[1:])
    outputs = classifier.apply({"params": params, "batch_stats": state.statistics}, both, train=True)
    losses = _taught(outputs.logits, jnp.repeat(labels, 2), images, backdoored, classifier, weights).reshape(-1, 2)
    attacked = jnp.ones(len(labels)) if target is None else (labels != target).astype(jnp.float32)
    clean_loss = losses[:, 0].mean()
    adversarial_loss = (losses[:, 1] * attacked).sum() / jnp.maximum(attacked.sum(), 1.0)
    parts = {"clean_loss": clean_loss, "adversarial_loss": adversarial_loss}
    loss = clean_loss + adversarial_loss
    if weights.ewc:
        parts["ewc_quadratic"] = ewc.quadratic_form(state.fisher_clean, params, backdoored["params"])
        loss += weights.ewc * parts["ewc_quadratic"]
    if weights.iewc:
        quadratic = ewc.quadratic_form(state.fisher_unlearning, params, backdoored["params"])
        parts["iewc_quadratic"] = quadratic
        parts["iewc"] = ewc.inverse_penalty(quadratic, weights.iewc_cap, weights.iewc_form)
        parts["iewc_awake"] = ewc.is_awake(quadratic, weights.iewc_cap, weights.iewc_form).astype(jnp.float32)
        loss += weights.iewc * parts["iewc"]
    parts["accuracy"] = jnp.mean(jnp.argmax(outputs.logits, -1).reshape(-1, 2)[:, 0] == labels)
    return loss, (outputs.statistics, parts)


def _taught(logits, labels, images, backdoored, classifier: Classifier, weights: Weights) -> jax.Array:
    """CE(f(x), y), or with `softened` in part what f_b makes of the clean image; every image and its x' in turn."""
    if not weights.softened:
        return terms.cross_entropy(logits, labels)
    teacher = jnp.repeat(classifier.apply(backdoored, images).logits, 2, axis=0)
    return terms.distillation(teacher, logits, labels, alpha=weights.softened, temperature=weights.temperature)


def step(
    state: UnlearningState,
    frozen,
    batch,
    key,
    *,
    classifier: Classifier,
    optimizer: optax.GradientTransformation,
    target: int | None,
    weights: Weights,
    perturbation: Perturbation,
    padding: int,
    flip: bool,
):
    """One E-step and one M-step on a batch {"images" uint8, "labels"}; `frozen` holds the backdoored model's variables.

    The metrics are every term's value (`attack` is the E-step's first), the two quadratic forms, whether L_iewc has a gradient,
    and Proposition 4.3 as two shares of x': `fooled` (the backdoored model is taken in) and `kept` (the current model still
    sees the true class).
    """
    backdoored, labels = frozen["backdoored"], batch["labels"]
    images = crop_and_flip(keys.stream(key, "augment"), batch["images"], padding=padding, flip=flip).astype(jnp.float32)
    shared = {"classifier": classifier, "target": target, "weights": weights}
    adversarial = e_step(
        images, labels, state.variables, backdoored, keys.stream(key, "start"), perturbation=perturbation, **shared
    )
    gradient = jax.value_and_grad(m_step_loss, has_aux=True)
    (loss, (statistics, parts)), grads = gradient(state.params, state, images, adversarial, labels, backdoored, **shared)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    seen = _seen(images, adversarial, labels, state.variables, backdoored, **shared)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        statistics=statistics,
        opt_state=opt_state,
    )
    return state, {"loss": loss, **parts, **seen}


def _seen(images, adversarial, labels, variables, backdoored, *, classifier, target, weights):
    """What the E-step reached, over the images it attacked: mean kd and prior, shares fooled and kept."""
    clean = clean_references(images, variables, backdoored, classifier=classifier, weights=weights)
    _, parts = adversarial_objective(
        adversarial, clean, labels, variables, backdoored, classifier=classifier, target=target, weights=weights
    )
    if "kept" not in parts:
        parts["kept"] = jnp.argmax(classifier.apply(variables, adversarial).logits, -1) == labels
    attacked = jnp.ones(len(labels)) if target is None else (labels != target).astype(jnp.float32)
    count = jnp.maximum(attacked.sum(), 1.0)
    return {name: (value * attacked).sum() / count for name, value in parts.items()}


def unlearning_set(clean: ImageSet, backdoored, key, *, labels: str, target: int | None, **options):
    """(x', labels) over the attacked clean images at theta = theta_b: what F^u is taken over.

    Labels are "predicted", what the backdoored model makes of x' (our default: it is the backdoor's behaviour whose
    parameters are sought), or "true".
    """
    if target is not None:
        clean = clean.take(np.flatnonzero(clean.labels != target))
    key = keys.stream(key, "unlearning")
    images, seen = attack_images(clean.images, clean.labels, backdoored, backdoored, key, target=target, **options)
    return images, seen if labels == "predicted" else clean.labels


def sample(clean: ImageSet, variables, backdoored, key, *, target: int | None, count: int = 8, **options) -> dict:
    """What adversarial images look like at the end: `rows` of the clean set and `adversarial` uint8 images made of them."""
    rows = np.flatnonzero(clean.labels != target)
    rows = rows[:: max(1, len(rows) // count)][:count]
    chosen, key = clean.take(rows), keys.stream(key, "sample")
    images, _ = attack_images(chosen.images, chosen.labels, variables, backdoored, key, target=target, **options)
    return {"rows": rows, "adversarial": np.round(images).astype(np.uint8)}


def fisher_before_epoch(clean, variables, key, *, classifier, weights, refresh, chunk, **attack) -> Callable:
    """A `before_epoch` for `train.fit` that fills in F^u once and F^cl once or every epoch."""

    def before(state, epoch):
        if weights.iewc and epoch == 0:
            images, seen = unlearning_set(clean, variables, key, classifier=classifier, weights=weights, **attack)
            state = state.replace(fisher_unlearning=diagonal_fisher(classifier, variables, images, seen, chunk=chunk))
        if weights.ewc and (epoch == 0 or refresh == "epoch"):
            current = diagonal_fisher(classifier, state.variables, clean.images, clean.labels, chunk=chunk)
            state = state.replace(fisher_clean=current)
        return state

    return before


def purify(
    key: jax.Array,
    classifier: Classifier,
    variables,
    clean: ImageSet,
    *,
    held_out: ImageSet | None = None,
    journal: train.Journal = train.Journal(),
    targeted: bool = False,
    target_label: int = 0,
    ablation: str = "+A+B",
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    schedule: str = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    max_grad_norm: float = 5.0,
    padding: int = 4,
    flip: bool = True,
    pgd: Perturbation = Perturbation(),
    lambda_kd: float = 1.0,
    lambda_prior: float = 1.0,
    lambda_ewc: float = 0.1,
    lambda_iewc: float = 10.0,
    alpha: float = 0.5,
    temperature: float = 4.0,
    eta: float = 0.5,
    prior_form: str = "cosine",
    iewc_cap: float = 100.0,
    iewc_form: str = "clip",
    attack_form: str = "cross_entropy",
    balance: float = 0.0,
    softened: float = 0.0,
    unlearning_labels: str = "predicted",
    fisher_refresh: str = "epoch",
    fisher_chunk: int = 32,
) -> Purified:
    """The model after BI-BAU on the defender's clean images; `variables` are the suspicious model's and stay as they are.

    Args:
      targeted: attack towards `target_label` and leave its images alone (T), or away from every true class (U), but for the
        share `pgd.aimed` of the images, which is aimed at `target_label` too; no more than a suspicion then.
      ablation: "base_at", "+A", "+B" or "+A+B" (Table 6); what is left out has weight 0.
      max_grad_norm: bound on the gradient's global norm. The inverse penalty wakes with a gradient of lambda_4 c^2 dQ, which
        without a bound can throw the parameters out of range (our addition; 0 leaves it out).
      pgd: bounds of the adversarial images, pixels 0..255.
      lambda_kd, lambda_prior, lambda_ewc, lambda_iewc: lambda_1 to lambda_4.
      alpha, temperature: of the distillation (Eq. 17). eta: share of the clean feature taken off in the prior, 0..1 (Eq. 20).
      iewc_cap, iewc_form: c and the form of the inverse penalty, see `method.ewc.inverse_penalty`.
      attack_form: how the E-step counts that the suspicious model is fooled, see `method.terms.evidence`. balance: 0 adds both
        models' gradients with respect to x' as they are, the paper's way; above 0 see `balanced_gradient` (ours).
      softened: share, 0..1, of what the M-step teaches that is the suspicious model's softened answer to the clean image, for
        it and for x' alike, by the formula of L_kd (ours; 0 is the paper's: true labels alone).
      unlearning_labels: "predicted" or "true", see `unlearning_set`. fisher_refresh: F^cl "never" or every "epoch".
    """
    check_clean(classifier, clean)
    objective = {
        "lambda_kd": lambda_kd,
        "lambda_prior": lambda_prior,
        "lambda_ewc": lambda_ewc,
        "lambda_iewc": lambda_iewc,
        "alpha": alpha,
        "temperature": temperature,
        "eta": eta,
        "prior_form": prior_form,
        "iewc_cap": iewc_cap,
        "iewc_form": iewc_form,
        "attack_form": attack_form,
        "balance": balance,
        "softened": softened,
    }
    check(
        classifier.num_classes,
        targeted=targeted,
        target_label=target_label,
        ablation=ablation,
        max_grad_norm=max_grad_norm,
        pgd=pgd,
        unlearning_labels=unlearning_labels,
        fisher_refresh=fisher_refresh,
        fisher_chunk=fisher_chunk,
        **objective,
    )
    weights = weighted(ablation, **objective)
    shared = {"classifier": classifier, "weights": weights, "target": target_label if targeted else None}
    pgd = pgd._replace(aim=target_label)
    steps = epochs * max(1, len(clean) // min(batch_size, len(clean)))
    optimizer = train.sgd(
        train.learning_rate_schedule(schedule, learning_rate, steps),
        momentum=momentum,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )
    variables = parallel.replicate({name: variables[name] for name in ("params", "batch_stats")})
    shared["perturbation"], found = sufficient(clean, variables, key, perturbation=pgd, batch_size=batch_size, **shared)
    if found:
        progress.say(_said(found, pgd.norm), show=journal.show)
    fishers = {"refresh": fisher_refresh, "chunk": fisher_chunk, "labels": unlearning_labels, "batch_size": batch_size}
    state, history = train.fit(
        partial(step, optimizer=optimizer, padding=padding, flip=flip, **shared),
        _first_state(variables, optimizer),
        as_data(clean),
        key=key,
        epochs=epochs,
        batch_size=batch_size,
        frozen={"backdoored": variables},
        before_epoch=fisher_before_epoch(clean, variables, key, **fishers, **shared),
        after_epoch=watch(classifier, held_out),
        journal=journal,
    )
    samples = sample(clean, state.variables, variables, key, batch_size=batch_size, **shared)
    return Purified(state.variables, history, samples, {"perturbation": found} if found else {})


def _said(found: dict, norm: str) -> str:
    share = f"{100 * found['fooled']:.0f} % of images fool the model as it came"
    line = f"bound on perturbations: {found['epsilon']:,.0f} ({norm}), within which {share}"
    if "reach" in found:
        farther, aimed = found["reach"] * found["epsilon"], 100 * found["fooled_aimed"]
        line += f"; {farther:,.0f}, within which {aimed:.0f} % are taken for the suspected class"
    return line


def _first_state(variables, optimizer) -> UnlearningState:
    state = train.new_state(variables, optimizer)
    empty = [jax.tree.map(jnp.zeros_like, state.params) for _ in range(2)]
    return UnlearningState(state.step, state.params, state.statistics, state.opt_state, *empty)
