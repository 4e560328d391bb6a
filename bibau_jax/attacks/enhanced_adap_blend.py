"""Enhanced Adap-Blend (section 5.7): Adap-Blend with its poisoned features pulled to those of the target class in training."""

import jax

from bibau_jax.attacks import adap_blend
from bibau_jax.attacks.coupling import coupled
from bibau_jax.attacks.protocol import Attack


def make(key: jax.Array, *, num_classes: int, coupling: float = 1.0, **options) -> Attack:
    """Adap-Blend (all its options) with a pull of weight `coupling`; the paper names the Euclidean distance, not its weight."""
    return coupled(adap_blend.make(key, num_classes=num_classes, **options), "enhanced_adap_blend", num_classes, coupling)
