"""Enhanced Adap-Patch (section 5.7): Adap-Patch with its poisoned features pulled to those of the target class in training."""

import jax

from bibau_jax.attacks import adap_patch
from bibau_jax.attacks.coupling import coupled
from bibau_jax.attacks.protocol import Attack


def make(key: jax.Array, *, num_classes: int, poison_ratio: float = 0.003, coupling: float = 1.0, **options) -> Attack:
    """Adap-Patch (all its options) with a pull of weight `coupling`; the paper names the Euclidean distance, not its weight."""
    plain = adap_patch.make(key, num_classes=num_classes, poison_ratio=poison_ratio, **options)
    return coupled(plain, "enhanced_adap_patch", num_classes, coupling)
