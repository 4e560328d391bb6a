"""Clean accuracy, attack success rate and robust accuracy, each as (hits, count): division happens once, at the reader's."""

import numpy as np


def clean_accuracy(predictions, labels) -> tuple[int, int]:
    """How many clean images are classified right, of how many."""
    return int(np.sum(predictions == labels)), len(labels)


def attacked(labels, attack_labels) -> np.ndarray:
    """Which images count for the attack: those that do not belong to the class it aims at already, bool [N]."""
    return np.asarray(labels) != np.asarray(attack_labels)


def attack_success_rate(predictions, labels, attack_labels) -> tuple[int, int]:
    """How many triggered images are classified as the attack wants, of those of other classes.

    Args:
      predictions: classes predicted for triggered images, [N].
      labels: their true classes, [N].
      attack_labels: the class the attack wants for each, [N] (the target everywhere, or (y + 1) mod K for all-to-all).
    """
    counted = attacked(labels, attack_labels)
    return int(np.sum((predictions == attack_labels) & counted)), int(np.sum(counted))


def robust_accuracy(predictions, labels, attack_labels) -> tuple[int, int]:
    """How many of the images that `attack_success_rate` counts are classified as their true class in spite of the trigger."""
    counted = attacked(labels, attack_labels)
    return int(np.sum((predictions == labels) & counted)), int(np.sum(counted))
