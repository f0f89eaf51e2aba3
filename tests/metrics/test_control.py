import dataclasses
import json

import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.metrics.control import (
    calibrate,
    calibration_json,
    most_frequent,
    read_actions,
    read_calibration,
    read_score,
    score_curve,
)

MODEL = "ab" * 32
ONE_HOT = np.eye(4)


def table(ids, actions, *, discrete=True):
    return calibrate(np.asarray(ids), np.asarray(actions, float), discrete=discrete, clips=3, model=MODEL)


def drawn(count, seed=0, right=0.9):
    """Transitions of 4 actions, whose code is mostly 10 + action, in clips of 5."""
    rng = np.random.default_rng(seed)
    action = rng.integers(0, 4, (count, 5))
    code = np.where(rng.random(action.shape) < right, 10 + action, rng.integers(10, 14, action.shape))
    return code[..., None], ONE_HOT[action]


# ----- actions to codes -----


def test_an_action_has_the_code_that_was_seen_with_it_most_often():
    calibration = table([[7], [7], [3], [5], [5], [3]], ONE_HOT[[0, 0, 0, 2, 2, 2]])
    np.testing.assert_array_equal(calibration.code_of(ONE_HOT[[2, 0]]), [[5], [7]])
    np.testing.assert_array_equal(calibration.counts, [3, 3])


def test_an_action_that_was_never_seen_has_the_most_frequent_code_of_all():
    # Both seen actions are equally far; the first in the table has another code.
    calibration = table([[7], [7], [3], [3], [3]], ONE_HOT[[3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(calibration.code_of(ONE_HOT[[1, 2, 3]]), [[3], [3], [7]])


def test_buttons_are_looked_up_all_together():
    calibration = table([[1], [2], [3], [3]], [[0, 0], [1, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(calibration.code_of(np.array([[1.0, 1], [1, 0], [0, 1]])), [[3], [2], [3]])


def test_codes_of_a_transition_stay_together():
    # Position by position the most frequent would be (1, 9), which never happened.
    ids = np.array([[1, 2], [1, 3], [1, 4], [1, 6], [5, 9], [5, 9]])
    np.testing.assert_array_equal(most_frequent(ids), [5, 9])


def test_codes_that_never_come_again_are_chosen_for_being_like_the_others():
    ids = np.array([[9, 9, 9], [1, 2, 8], [1, 7, 3], [1, 2, 3], [6, 2, 3]])
    np.testing.assert_array_equal(most_frequent(ids), [1, 2, 3])


def test_a_continuous_action_has_the_code_whose_mean_action_is_nearest_in_deviations():
    rng = np.random.default_rng(0)
    means = np.array([[-1.0, 0], [1, 0], [0, 1000]])
    kind = rng.integers(0, 3, 300)
    actions = means[kind] + rng.normal(0, 1, (300, 2)) * [0.1, 100]
    calibration = table(kind[:, None] + 4, actions, discrete=False)
    np.testing.assert_array_equal(calibration.code_of(means), [[4], [5], [6]])
    # In raw numbers the third is farther than the first.
    np.testing.assert_array_equal(calibration.code_of(np.array([[0.9, 300]])), [[5]])


# ----- codes to actions -----


def test_one_code_is_read_as_the_mean_of_its_actions_and_one_of_the_mean_of_all():
    ids, actions = np.array([[1], [1], [1], [2]]), np.array([[1.0], [1], [0], [0]])
    read = read_actions(ids, actions)
    np.testing.assert_allclose(read(np.array([[1], [2], [3]]))[:, 0], [2.5 / 4, 0.5 / 2, 0.5])


def test_the_share_of_discrete_actions_that_are_read_is_the_majoritys():
    ids, actions = (x.reshape(-1, x.shape[-1]) for x in drawn(200))
    test_ids, test_actions = (x.reshape(-1, x.shape[-1]) for x in drawn(200, seed=1))
    right = read_score(ids, actions, test_ids, test_actions, discrete=True)
    assert right == np.mean(test_ids[:, 0] - 10 == test_actions.argmax(1))
    assert 0.9 < right < 0.95


def test_what_only_all_codes_together_tell_is_read():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2, (400, 2))
    actions = np.eye(2)[ids[:, 0] ^ ids[:, 1]]
    assert read_score(ids[:200], actions[:200], ids[200:], actions[200:], discrete=True) == 1


def test_what_one_of_many_positions_tells_is_read_though_no_row_comes_again():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (600, 9))
    ids[:, 4] = rng.integers(0, 4, 600)
    actions = ONE_HOT[ids[:, 4]]
    assert read_score(ids[:400], actions[:400], ids[400:], actions[400:], discrete=True) > 0.95


def test_codes_that_tell_nothing_are_read_as_the_most_frequent_action():
    rng = np.random.default_rng(0)
    ids, actions = rng.integers(0, 3, (900, 1)), ONE_HOT[rng.choice(4, 900, p=(0.1, 0.7, 0.1, 0.1))]
    share = actions[500:, 1].mean()
    assert read_score(ids[:500], actions[:500], ids[500:], actions[500:], discrete=True) == pytest.approx(share)


def test_the_score_of_continuous_actions_is_the_share_of_variance_explained():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (2000, 1))
    actions = ids + rng.normal(0, np.sqrt(2 / 3), (2000, 1))  # the variance between codes is that within
    assert read_score(ids[:1000], actions[:1000], ids[1000:], actions[1000:], discrete=False) == pytest.approx(
        0.5, abs=0.05
    )
    assert read_score(ids[:9], actions[:9], ids[9:12], np.ones((3, 1)), discrete=False) == 0


def test_many_transitions_are_fitted_to_in_part(monkeypatch):
    monkeypatch.setattr("dreamer4.metrics.control.MOST_FITTED", 40)
    ids, actions = (x.reshape(-1, x.shape[-1]) for x in drawn(100, right=1.0))
    assert read_score(ids, actions, ids, actions, discrete=True) == 1


def test_more_clips_read_better_and_there_is_a_score_for_every_count_that_there_is():
    test_ids, test_actions = (x.reshape(-1, x.shape[-1]) for x in drawn(200, seed=1))
    curve = score_curve(*drawn(64), test_ids, test_actions, discrete=True)
    assert {k: len(scores) for k, scores in curve.items()} == {1: 5, 4: 5, 16: 5, 64: 1}
    means = [np.mean(scores) for scores in curve.values()]
    assert means[0] < means[1] - 0.03
    assert means[1:] == sorted(means[1:])
    assert means[-1] == pytest.approx(0.925, abs=0.03)
    assert len(set(curve[1])) > 1  # of other clips each time
    assert curve == score_curve(*drawn(64), test_ids, test_actions, discrete=True)


# ----- on disk -----


@pytest.fixture
def saved(tmp_path):
    calibration = table([[7, 1], [7, 1], [3, 2]], [[0.5, -1], [0.25, 1], [0.1, 0.3]], discrete=False)
    path = tmp_path / "calibration.json"
    path.write_text(calibration_json(calibration))
    return path, calibration


def test_a_calibration_comes_back_as_it_was(saved):
    path, calibration = saved
    back = read_calibration(path, MODEL)
    for field in dataclasses.fields(calibration):
        was, found = getattr(calibration, field.name), getattr(back, field.name)
        np.testing.assert_array_equal(found, was)
        assert getattr(found, "dtype", None) == getattr(was, "dtype", None)
    np.testing.assert_array_equal(back.code_of(np.array([[0.4, 0]])), calibration.code_of(np.array([[0.4, 0]])))


def test_a_calibration_of_another_checkpoint_is_refused(saved):
    path, _ = saved
    with pytest.raises(UserError) as error:
        read_calibration(path, "cd" * 32)
    assert str(error.value) == (f"{path}: made for the checkpoint abababababab, cdcdcdcdcdcd expected: make it again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop("codes"), "damaged: KeyError: 'codes'"),
        (lambda x: x.update(more=1), "damaged: TypeError"),
        (lambda x: x["codes"].pop(), "damaged: ValueError"),
        (lambda x: x["actions"][0].pop(), "damaged: ValueError"),
        (lambda x: x["scale"].pop(), "damaged: ValueError: 2 actions of 2 numbers"),
    ],
)
def test_a_damaged_calibration_is_told(saved, change, words):
    path, _ = saved
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_calibration(path, MODEL)


def test_a_calibration_that_is_not_there_or_no_json_is_told(saved):
    path, _ = saved
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_calibration(path, MODEL)
    with pytest.raises(UserError, match=r"no calibration; experiments/evaluate\.py makes it"):
        read_calibration(path.with_name("none"), MODEL)


def test_what_cannot_be_calibrated_is_told(saved):
    with pytest.raises(UserError, match="calibration: no labelled transitions found, at least 1 expected"):
        table(np.zeros((0, 1), int), np.zeros((0, 4)))
    with pytest.raises(UserError, match="actions: 3 numbers found, 2 expected"):
        saved[1].code_of(np.zeros((1, 3)))
