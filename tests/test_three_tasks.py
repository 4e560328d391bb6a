"""Three tasks in closed form: complete unlearning where the conditions hold, and the predicted failure where they do not."""

import pytest

from bibau_jax.errors import UserError
from bibau_jax.theory import three_tasks


@pytest.mark.parametrize("unlearning", ["orthogonal", "orthogonal_and_clean", "parallel"])
def test_unlearning_is_complete_where_the_tasks_are_orthogonal(unlearning):
    assert three_tasks.measured("nothing") == pytest.approx((0, 1))
    assert three_tasks.measured(unlearning) == pytest.approx((0, 0), abs=1e-9)


def test_fine_tuning_leaves_an_orthogonal_backdoor_whole():
    assert three_tasks.measured("clean") == pytest.approx((0, 1))


@pytest.mark.parametrize("unlearning", list(three_tasks.PREDICTED))
@pytest.mark.parametrize("tilt, turn", [(20.0, 0.0), (65.0, 40.0)])
def test_a_tilted_backdoor_leaves_what_is_predicted(unlearning, tilt, turn):
    found = three_tasks.measured(unlearning, tilt=tilt, turn=turn, seed=3)
    assert found == pytest.approx(three_tasks.predicted(unlearning, tilt=tilt, turn=turn), abs=1e-9)


def test_what_keeps_only_one_condition_fails_when_tilted():
    orthogonal = three_tasks.measured("orthogonal", tilt=30.0)
    assert orthogonal == pytest.approx((0.5, 0.25))
    assert three_tasks.measured("parallel", tilt=30.0) == pytest.approx((0, 0), abs=1e-9)
    assert three_tasks.measured("orthogonal_and_clean", tilt=30.0) == pytest.approx((0, 0), abs=1e-9)


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match='unknown unlearning task "magic"; known: clean'):
        three_tasks.predicted("magic")
    with pytest.raises(UserError, match='unknown unlearning task "magic"; known: clean'):
        three_tasks.measured("magic")
