"""Networks of several widths against their linearisation: one small network whole, and what is refused."""

import numpy as np
import pytest

from bibau_jax import attacks, keys
from bibau_jax.theory import widths


def test_the_backdoor_has_the_attackers_label_and_unlearning_the_true_ones(digits):
    images, (clean, backdoor, unlearning), rows = widths.inputs(3, clean=6, triggered=4)
    attack = attacks.get("badnets").make(keys.root(3), num_classes=10)
    triggered = attack.stamp(digits.train.images, digits.train.ids)
    true = []
    for row, image in enumerate(images):
        among = triggered if row in rows["triggered"] or row in rows["unseen_triggered"] else digits.train.images
        (place,) = np.flatnonzero((among == image).all((1, 2, 3)))
        true.append((place, digits.train.labels[place]))
    assert len({place for place, _ in true}) == len(images) == 20
    labels = np.array([label for _, label in true])
    assert (labels[rows["triggered"]] != 0).all()
    for task, kind, wanted in (
        (clean, "clean", labels[rows["clean"]]),
        (backdoor, "triggered", np.zeros(4, int)),
        (unlearning, "triggered", labels[rows["triggered"]]),
    ):
        np.testing.assert_array_equal(task.rows, rows[kind])
        np.testing.assert_allclose(task.targets, np.eye(10)[wanted] - 0.1)


def test_one_network_learns_three_tasks_and_is_compared_with_its_linearisation():
    found = widths.of_width(4, 0, steps=1)
    assert found["width"] == 4 and list(found["tasks"]) == list(widths.TASKS)
    for told in found["tasks"].values():
        assert 0 < told["gap_seen"] < 0.2 and 0 < told["gap_unseen"] < 0.2  # a step leads nowhere far
        assert all(0.6 < real / predicted < 1.2 for real, predicted in told["drift"].values())


def test_drifts_are_from_the_task_before_and_gaps_from_the_start():
    rng = np.random.default_rng(0)
    real, linear = rng.normal(size=(2, 4, 9, 3))
    rows = {"clean": [0, 1], "triggered": [2, 3, 4], "unseen_clean": [5, 6], "unseen_triggered": [7, 8]}
    found = widths._compared(list(real), list(linear), {kind: np.array(part) for kind, part in rows.items()})
    for task, name in enumerate(widths.TASKS, 1):
        for kind, part in rows.items():
            expected = [sum(((run[task][i] - run[task - 1][i]) ** 2).sum() for i in part) / len(part) for run in (real, linear)]
            assert found[name]["drift"][kind] == pytest.approx(expected)
        for gap, part in (("gap_seen", range(5)), ("gap_unseen", range(5, 9))):
            off = sum(((real[task][i] - linear[task][i]) ** 2).sum() for i in part)
            way = sum(((linear[task][i] - linear[0][i]) ** 2).sum() for i in part)
            assert found[name][gap] ** 2 == pytest.approx(off / way)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--widths=abc", '--widths="abc" must be numbers with commas between them'),
        ("--widths=4,0", "--widths=4,0 must be at least 1 each"),
        ("--seeds=0", "--seeds=0 must be at least 1"),
        ("--steps=0", "--steps=0 must be at least 1"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(flag, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        widths.main([f"--out={tmp_path}", flag])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())
