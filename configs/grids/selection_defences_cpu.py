"""Settings of the other defences for two CPU cores: candidates of each, on validation images of BadNets, seed 100.

python -m bibau_jax.grid --grid=configs/grids/selection_defences_cpu.py --workdir=runs/selection_softened_cpu --jobs=2

Their authors' settings are for 2,500 images, wide layers and many hundred steps. It takes the backdoored model of
configs/grids/selection_softened_cpu.py. No result uses this seed or these images.
"""

from pathlib import Path

from bibau_jax import grid

# Fewer rounds, shorter, at higher rates; the generator of a quarter of the width.
REVERSED = {
    "rounds": 2,
    "pretrain_epochs": 10,
    "mask_epochs": 10,
    "generator_epochs": 10,
    "epochs": 10,
    "width": 8,
    "batch_size": 64,
}
UNCUT = {"cutout": 0}
THEIRS = UNCUT | {"learning_rate": 0.1, "teacher_rate": 0.01}  # NAD's authors' rates
OURS = {"learning_rate": 0.03, "teacher_rate": 0.03}
TWO, TWENTY = {"max_loss": 0.02}, {"recover_epochs": 20}
CANDIDATES = {
    "nc": {"": {}, "enough95": {"enough": 0.95}, "epochs30": {"inversion_epochs": 30}},
    "sau": {"e10_1e3": {"epochs": 10, "learning_rate": 1e-3}, "e20_5e4": {"epochs": 20, "learning_rate": 5e-4}},
    "nad": {
        "": THEIRS,
        "rate05": THEIRS | {"teacher_rate": 0.05},
        "1e2": THEIRS | {"learning_rate": 0.01},
        "3e2": UNCUT | OURS,
        "3e2_cutout": OURS,
    },
    "bti_dbf": {
        "1e3": REVERSED | {"learning_rate": 1e-3},
        "3e4": REVERSED | {"learning_rate": 3e-4},
        "2e3": REVERSED | {"learning_rate": 2e-3},
        "1e3_r4": REVERSED | {"learning_rate": 1e-3, "rounds": 4},
    },
    "pam": {
        "": REVERSED | {"rho": 0.5},
        "rho1": REVERSED | {"rho": 1.0},
        "rho07": REVERSED | {"rho": 0.7},
        "rho1_3e3": REVERSED | {"rho": 1.0, "learning_rate": 0.003},
    },
    "anp": {"": TWO, "eps04": TWO | {"epsilon": 0.4}, "it600": TWO | {"iterations": 600}, "loss4": {"max_loss": 0.04}},
    "rnp": {
        "": TWO | TWENTY | {"recover_rate": 0.05},
        "rate02": TWO | TWENTY | {"recover_rate": 0.2},
        "to02": TWO | TWENTY | {"recover_rate": 0.05, "unlearned": 0.2},
        "rate02_loss4": TWENTY | {"recover_rate": 0.2, "max_loss": 0.04},
        # As many steps of the masks as its authors take of 500 images: 75; 20 epochs are 300.
        "e5": {"recover_rate": 0.2, "max_loss": 0.04, "recover_epochs": 5},
        "e5_to02": {"recover_rate": 0.2, "max_loss": 0.04, "recover_epochs": 5, "unlearned": 0.2},
    },
    "i_bau": {"": {}},
    "clp": {"": {}, "u3": {"u": 3.0}},
    "bnp": {"": {}},
    "ep": {"": {}},
}


def get_grid():
    """Every defence with every candidate, measured on held-out images alone and not called back."""
    theirs = grid.read(str(Path(__file__).with_name("selection_softened_cpu.py")))
    changes = {
        "_".join(filter(None, (name, suffix))): {"name": name} | {f"{name}.{key}": value for key, value in settings.items()}
        for name, candidates in CANDIDATES.items()
        for suffix, settings in candidates.items()
    }
    return grid.variants(theirs, ["badnets_100"], grid.alone(changes), {"reactivate.checks": ""})
