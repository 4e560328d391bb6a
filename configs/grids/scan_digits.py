"""How often does the scan cry wolf? Digit models with a backdoor and their clean twins, all scanned: results/scan.md.

python -m bibau_jax.grid --grid=configs/grids/scan_digits.py --workdir=runs/scan_digits --jobs=2
"""

from bibau_jax import grid

SEEDS = range(10)


def get_grid():
    """BadNets on ten seeds and the twin of each, scanned with the settings that strangers' models are scanned with."""
    innocent = {"innocent": {"implant.innocent": True, "stages": "scan,report"}}
    return grid.runs("configs/digits.py", {"badnets": SEEDS}, {"stages": "implant,scan"}, innocent)
