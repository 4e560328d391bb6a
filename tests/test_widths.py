"""Networks of several widths against their linearisation: one small network whole, and what is refused."""

import pytest

from bibau_jax.theory import widths


def test_one_network_learns_three_tasks_and_is_compared_with_its_linearisation():
    found = widths.of_width(4, 0, steps=5)
    assert found["width"] == 4 and list(found["tasks"]) == list(widths.TASKS)
    for told in found["tasks"].values():
        assert 0 < told["gap_seen"] < 1 and 0 < told["gap_unseen"] < 1  # five steps lead nowhere far
        assert all(real > 0 and predicted > 0 for real, predicted in told["drift"].values())


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
