"""Does it help to aim some of the adversarial images at the class that the scan suspects?

python -m bibau_jax.grid --grid=configs/grids/selection_aimed_cpu.py --workdir=runs/selection_norm_cpu --jobs=2

With the target unknown every image goes wherever it is nearest, and that is seldom the attacker's class. The networks of
configs/grids/selection_norm_cpu.py, and one that sees every place by weights of its own, as a stranger's would be purified:
with the terms of configs/own_model.py, after a scan. No result uses this seed or these images.
"""

from pathlib import Path

from bibau_jax import grid

SEED = 100
NETWORKS = ("square_100", "blended_100", "badnets_100")
OWN = {
    "attack_form": "margin",
    "lambda_kd": 0.1,
    "iewc_form": "neg_log",
    "lambda_iewc": 1.0,
    "softened": 0.5,
    "pgd.norm": "l1",
    "pgd.epsilon": 1500.0,
    "pgd.step_size": 750.0,
    "pgd.fooled": 0.9,
    "target_label": -1,
}
AIMED = {"pgd.aimed": 0.5}
VARIANTS = {
    "own": OWN,
    "own_aimed": OWN | AIMED,
    "own_t": OWN | {"name": "bibau_t"},
    "own_at_aimed": OWN | AIMED | {"name": "base_at"},
    "own_at": OWN | {"name": "base_at"},
}


def get_grid():
    """On each backdoored model the settings of configs/own_model.py without and with aim, then (T) and Base AT with aim."""
    scanned, changes = {"stages": "scan,purify,evaluate,reactivate,report"}, grid.alone(VARIANTS)
    theirs = grid.read(str(Path(__file__).with_name("selection_norm_cpu.py")))
    vgg = grid.read(str(Path(__file__).with_name("selection_vgg_cpu.py")))[0]
    longer = {"implant.epochs": 15, "defense.beside": "ft,base_at"}
    vgg = vgg._replace(name=f"vgg_{SEED}", settings=vgg.settings | longer)
    return [*grid.variants([vgg], [vgg.name], changes, scanned), *grid.variants(theirs, NETWORKS, changes, scanned)]
