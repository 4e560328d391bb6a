"""BadNets with a white square instead of a grid: is a patch without fine structure unlearned too, and within which bound?

python -m bibau_jax.grid --grid=configs/grids/selection_square_cpu.py --workdir=runs/selection_square_cpu --jobs=2

Two models of others with such a patch kept it, under Base AT as under BI-BAU (results/third_party.md). Robust training takes
away what is fine and faint first; a white square is neither. No result uses this seed or these images.
"""

from bibau_jax import grid

SEED = 100
# The network of a stranger may know its images by heart; and where crops move it, a white square is lost on bright images.
SURE = {"data.padding": 0, "data.flip": False, "attack.badnets.variant": "square", "attack.badnets.size": 4}
OWN = {"attack_form": "margin", "lambda_kd": 0.1, "iewc_form": "neg_log", "lambda_iewc": 1.0}  # those of configs/own_model.py
VARIANTS = {
    "own": OWN,
    "own_fooled95": OWN | {"pgd.fooled": 0.95},
    "own_l2_200": OWN | {"pgd.epsilon": 200.0, "pgd.step_size": 60.0},
    "own_linf8": OWN | {"pgd.norm": "linf", "pgd.epsilon": 8.0, "pgd.step_size": 2.5},
    "own_t": OWN | {"name": "bibau_t"},
    "own_t_fooled95": OWN | {"name": "bibau_t", "pgd.fooled": 0.95},
}


def get_grid():
    """The settings of our own networks with fine-tuning and Base AT beside them, then one purification for each variant."""
    settings = SURE | {"measured_on": "validation", "reactivate.checks": "retuning", "implant.clean_twin": "none"}
    settings |= {"defense.beside": "ft,base_at"}
    return grid.runs("configs/cifar10_cpu.py", {"badnets": (SEED,)}, settings, grid.alone(VARIANTS))
