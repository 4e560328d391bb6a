"""Which term does it? Table 6 at the size of two CPU cores, and each term alone; results/ablation_cpu.md.

python -m bibau_jax.grid --grid=configs/grids/ablation_cpu.py --workdir=runs/reactivation_cpu --jobs=2
"""

from pathlib import Path

from bibau_jax import grid

HARD = {"softened": 0.0}  # the paper's labels; +A+B and Base AT by them stand in hard_labels_cpu.py
A, B = {"ablation": "+A"} | HARD, {"ablation": "+B"} | HARD
ABLATIONS = {"a": A, "b": B}
# Without A, Base AT at twice the paper's bound leaves little for B to do; within the paper's bound it leaves the backdoor.
PAPERS = {"pgd.epsilon": 25.0, "pgd.step_size": 7.5} | HARD
MORE = {
    "ewc": A | {"lambda_kd": 0.0},
    "kd": A | {"lambda_ewc": 0.0},
    "iewc": B | {"lambda_prior": 0.0},
    "prior": B | {"lambda_iewc": 0.0},
    "l2_25": PAPERS,
    "l2_25_at": {"name": "base_at"} | PAPERS,
    "l2_25_a": A | PAPERS,
    "l2_25_b": B | PAPERS,
    "true": {"unlearning_labels": "true"} | HARD,
    "l2_25_true": {"unlearning_labels": "true"} | PAPERS,
}


def get_grid():
    """The paper's four attacks on the backdoored models of configs/grids/reactivation_cpu.py, and more of two of them."""
    theirs = grid.read(str(Path(__file__).with_name("reactivation_cpu.py")))
    checks = {"reactivate.checks": "retuning,query,bec"}
    first = [f"{attack}_0" for attack in ("badnets", "refool", "iad", "issba")]
    made = grid.variants(theirs, [*first, "badnets_1", "badnets_2"], grid.alone(ABLATIONS), checks)
    more = grid.variants(theirs, ["badnets_0", "iad_0"], grid.alone(MORE), checks)
    return made + [job for job in more if job.reuse]
