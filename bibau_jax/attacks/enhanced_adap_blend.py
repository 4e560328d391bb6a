"""Enhanced Adap-Blend (section 5.7): Adap-Blend with its poisoned features pulled to those of the target class in training."""

import jax

from bibau_jax.attacks import adap_blend
from bibau_jax.attacks.coupling import coupled
from bibau_jax.attacks.protocol import Attack


def make(key: jax.Array, *, num_classes: int, poison_ratio: float = 0.003, coupling: float = 1.0, **options) -> Attack:
    """Adap-Blend (all its options) with a pull of weight `coupling`; the paper names the Euclidean distance, not its weight."""
    plain = adap_blend.make(key, num_classes=num_classes, poison_ratio=poison_ratio, **options)
    return coupled(plain, "enhanced_adap_blend", num_classes, coupling)
