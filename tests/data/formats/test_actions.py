import numpy as np
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.data.formats.actions import MOST_CHOICES, as_component, find_component
from dreamer4.errors import UserError


@pytest.mark.parametrize(
    ("values", "kind", "size"),
    [
        (np.array([0, 3, 1]), "categorical", 4),
        (np.array([[0], [3]], np.uint8), "categorical", 4),
        (np.array([False, True]), "categorical", 2),
        (np.array([0, 0]), "categorical", 1),
        (np.array([[0, 1, 1], [0, 0, 0]]), "binary", 3),
        (np.array([[True, False]]), "binary", 2),
        (np.array([[0, 2], [1, -1]]), "continuous", 2),
        (np.array([0.0, 1.0]), "continuous", 1),
        (np.array([[0.5, np.nan]], np.float16), "continuous", 2),
    ],
)
def test_numbers_tell_what_they_are(values, kind, size):
    component = find_component({"a": values}, "key")
    assert component == ActionComponent("key", kind, size)
    stored = as_component(values, component)
    assert (stored.shape, stored.dtype) == ((len(values), *component.shape), component.dtype)
    np.testing.assert_array_equal(stored.reshape(-1), values.reshape(-1).astype(stored.dtype))


def test_the_largest_choice_of_all_places_counts():
    assert find_component({"a": np.array([0, 2]), "b": np.array([5, 1])}).size == 6


def test_axes_that_happen_to_be_switches_are_axes():
    values = {"a": np.array([[0, 1]]), "b": np.array([[0.5, 0.1]])}
    for order in (values, dict(reversed(values.items()))):
        assert find_component(order) == ActionComponent("action", "continuous", 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": np.array(["left"])}, r"a: action is <U4 of shape \(1,\), expected numbers"),
        ({"a": np.array([None])}, "a: action is object"),
        ({"a": np.array([1j])}, "a: action is complex128"),
        ({"a": np.zeros((2, 2, 2))}, r"a: action is float64 of shape \(2, 2, 2\)"),
        ({"a": np.zeros((2, 0))}, r"a: action is float64 of shape \(2, 0\)"),
        ({"a": np.array([-1, 3])}, "a: action is -1 to 3, expected choices from 0 to 4095"),
        ({"a": np.array([0, MOST_CHOICES])}, "a: action is 0 to 4096"),
        ({"a": np.array([2**64 - 1], np.uint64)}, "a: action is 18446744073709551615"),
        ({"a": np.array([0, 1]), "b": np.array([[0.5, 1]])}, "b: action is continuous of 2, but categorical of 2 in a"),
        ({"a": np.zeros((1, 3)), "b": np.zeros((1, 2))}, "b: action is continuous of 2, but continuous of 3 in a"),
        ({"a": np.array([[0, 1]]), "b": np.array([[0.5]])}, "b: action is continuous of 1, but continuous of 2 in a"),
    ],
)
def test_what_is_no_action_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        find_component(values)


def test_what_float32_does_not_hold_becomes_infinite():
    values = np.array([[1e300, 1.0]])
    assert as_component(values, find_component({"a": values})).tolist() == [[np.inf, 1.0]]
