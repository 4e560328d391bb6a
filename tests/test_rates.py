"""Clean accuracy, attack success rate and robust accuracy, counted by hand."""

import numpy as np
import pytest

from bibau_jax.metrics import rates

LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 3])
TARGET = np.zeros(8, int)  # all to one: class 0
SEEN = np.array([0, 2, 0, 1, 0, 0, 3, 2])  # what is predicted for them with the trigger


def test_clean_accuracy_counts_every_image():
    assert rates.clean_accuracy(np.array([0, 1, 1, 1, 2, 0, 2, 3]), LABELS) == (6, 8)


def test_attack_success_leaves_out_the_images_of_the_target_class():
    assert rates.attacked(LABELS, TARGET).tolist() == [False, False] + 6 * [True]
    assert rates.attack_success_rate(SEEN, LABELS, TARGET) == (3, 6)


def test_robust_accuracy_counts_the_true_class_over_the_same_images():
    assert rates.robust_accuracy(SEEN, LABELS, TARGET) == (1, 6)


def test_under_all_to_all_every_image_counts_and_has_a_class_of_its_own():
    aims = (LABELS + 1) % 4
    assert rates.attacked(LABELS, aims).all()
    assert rates.attack_success_rate(np.array([1, 0, 2, 1, 3, 2, 0, 0]), LABELS, aims) == (4, 8)
    assert rates.robust_accuracy(np.array([1, 0, 2, 1, 3, 2, 0, 0]), LABELS, aims) == (3, 8)


def test_an_image_is_never_both_attacked_and_robust_whatever_is_predicted():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, aims, seen = rng.integers(0, 4, (3, 30))
        (hits, count), (kept, same_count) = (
            rate(seen, labels, aims) for rate in (rates.attack_success_rate, rates.robust_accuracy)
        )
        assert count == same_count == np.sum(labels != aims) and hits + kept <= count


@pytest.mark.parametrize("rate", [rates.attack_success_rate, rates.robust_accuracy])
def test_without_an_image_of_another_class_nothing_is_counted(rate):
    assert rate(np.zeros(3), np.zeros(3), np.zeros(3)) == (0, 0)
    assert all(type(value) is int for value in rate(SEEN, LABELS, TARGET))  # JSON knows no NumPy numbers
