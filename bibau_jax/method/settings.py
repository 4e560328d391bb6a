"""The settings of BI-BAU, and what they may be."""

from typing import NamedTuple

from bibau_jax.errors import UserError
from bibau_jax.method import ewc, terms
from bibau_jax.method.pgd import NORMS

# Table 6: A = {L_kd, L_ewc} keeps clean accuracy, B = {L_prior, L_iewc} removes the backdoor.
ABLATIONS = {"base_at": (False, False), "+A": (True, False), "+B": (False, True), "+A+B": (True, True)}
UNLEARNING_LABELS = ("predicted", "true")
FISHER_REFRESH = ("never", "epoch")


class Perturbation(NamedTuple):
    """How adversarial images are sought: norm "l2", "linf" or "l1", bound and step on the 0..255 scale, number of steps.

    `start` is "zero" or "random". The paper states 20 steps of 2.0 within 25.0; its norm is lost, and "l2" is our reading.
    `fooled` above 0 is the share of clean images, 0..1, that must fool the suspicious model within the bound: bound and step
    grow by one factor until they do, see `defenses.adversarial.sufficient` (ours; 0 keeps them). `block` above 1 moves every
    second image in squares of so many pixels a side, see `pgd.adversarial_images` (ours). `aimed` is the share of images, 0..1,
    that with the target unknown are to look like the class `aim`, which is suspected to be the target, and the rest as in the
    paper like any class but their own (ours); those that are aimed may go `reach` times as far.
    """

    norm: str = "l2"
    epsilon: float = 25.0
    step_size: float = 2.0
    steps: int = 20
    start: str = "zero"
    fooled: float = 0.0
    block: int = 1
    aimed: float = 0.0
    aim: int = 0
    reach: float = 1.0


class Weights(NamedTuple):
    """The weights of the terms, lambda_1 to lambda_4, and the constants inside them."""

    kd: float
    prior: float
    ewc: float
    iewc: float
    alpha: float
    temperature: float
    eta: float
    prior_form: str
    iewc_cap: float
    iewc_form: str
    attack_form: str = "cross_entropy"
    balance: float = 0.0
    softened: float = 0.0


def weighted(
    ablation: str,
    *,
    lambda_kd: float,
    lambda_prior: float,
    lambda_ewc: float,
    lambda_iewc: float,
    alpha: float,
    temperature: float,
    eta: float,
    prior_form: str,
    iewc_cap: float,
    iewc_form: str,
    attack_form: str,
    balance: float,
    softened: float,
) -> Weights:
    """The weights of an ablation: terms that it leaves out have weight 0."""
    with_a, with_b = ABLATIONS[ablation]
    lambdas = (with_a * lambda_kd, with_b * lambda_prior, with_a * lambda_ewc, with_b * lambda_iewc)
    return Weights(*lambdas, alpha, temperature, eta, prior_form, iewc_cap, iewc_form, attack_form, balance, softened)


def check(
    num_classes: int,
    *,
    targeted: bool = False,
    target_label: int = 0,
    ablation: str = "+A+B",
    max_grad_norm: float = 5.0,
    pgd: Perturbation = Perturbation(),
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
    **others,
) -> None:
    """Raises `UserError` on a setting that `purify` cannot use; a weight of the objective is any `lambda_` of at least 0."""
    _choice("ablation", ablation, ABLATIONS)
    _choice("pgd.norm", pgd.norm, NORMS)
    _choice("pgd.start", pgd.start, ("zero", "random"))
    _choice("prior_form", prior_form, terms.PRIOR_FORMS)
    _choice("iewc_form", iewc_form, ewc.INVERSE_FORMS)
    _choice("attack_form", attack_form, terms.ATTACK_FORMS)
    _choice("unlearning_labels", unlearning_labels, UNLEARNING_LABELS)
    _choice("fisher_refresh", fisher_refresh, FISHER_REFRESH)
    if (targeted or pgd.aimed) and not 0 <= target_label < num_classes:
        raise UserError(f"target label {target_label} is outside the {num_classes} classes 0..{num_classes - 1}")
    if pgd.epsilon <= 0 or pgd.step_size <= 0 or pgd.steps < 0:
        raise UserError("pgd.epsilon and pgd.step_size must be positive, pgd.steps at least 0")
    if not 0 <= pgd.fooled <= 1:
        raise UserError("pgd.fooled must lie within 0..1")
    if not 0 <= pgd.aimed <= 1:
        raise UserError("pgd.aimed must lie within 0..1")
    if pgd.block < 1:
        raise UserError("pgd.block must be at least 1")
    if iewc_cap <= 0 or temperature <= 0:
        raise UserError("iewc_cap and temperature must be positive")
    if not 0 <= eta <= 1 or not 0 <= alpha <= 1 or not 0 <= softened <= 1:
        raise UserError("eta, alpha and softened must lie within 0..1")
    negative = [name for name, value in others.items() if name.startswith("lambda_") and value < 0]
    if negative or max_grad_norm < 0:
        raise UserError(f"{', '.join(negative) or 'max_grad_norm'} must not be negative")
    if balance < 0:
        raise UserError("balance must not be negative")
    if fisher_chunk < 1:
        raise UserError("fisher_chunk must be at least 1")


def _choice(name: str, value, choices) -> None:
    if value not in choices:
        raise UserError(f'{name} "{value}" is unknown; choose one of {", ".join(choices)}')
