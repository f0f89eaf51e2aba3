import itertools

import numpy as np
import pytest

from dreamer4.data.policies import mixed, parse_mix, undirected
from dreamer4.errors import UserError

KNOWN = ("random", "hold", "track")


def take(policy, count):
    return list(itertools.islice(policy, count))


def runs(values):
    return [len(list(run)) for _, run in itertools.groupby(values)]


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        ("hold", {"hold": 1.0}),
        ("track=0.7,random=0.3", {"track": 0.7, "random": 0.3}),
        ("track = .5, random = .25, hold = .25", {"track": 0.5, "random": 0.25, "hold": 0.25}),
        ("random=1", {"random": 1.0}),
    ],
)
def test_a_mix_is_policies_and_their_shares(mix, shares):
    assert parse_mix(mix, KNOWN) == shares


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("chase", "'chase' found, expected policies among random, hold, track"),
        ("", "'' found, expected policies"),
        ("hold=0.5,", "'' found, expected policies"),
        ("hold=0.5,hold=0.5", "names hold twice"),
        ("hold=much", "the share of hold is 'much', expected a number"),
        ("hold=", "the share of hold is ''"),
        ("hold=1.5,random=-0.5", "the share of hold is 1.5"),
        ("hold=1,random=0", "the share of random is 0"),
        ("hold=nan", "the share of hold is nan"),
        ("hold=0.5,random=0.3", "sum to 0.8, expected 1"),
        ("hold,random", "sum to 2, expected 1"),
    ],
)
def test_a_wrong_mix_is_named(mix, message):
    with pytest.raises(UserError, match=message):
        parse_mix(mix, KNOWN)


def test_policies_take_turns_by_their_shares():
    policies = {"a": itertools.repeat("a"), "b": itertools.repeat("b")}
    played = take(mixed(policies, {"a": 0.75, "b": 0.25}, np.random.default_rng(0)), 40_000)
    assert abs(played.count("a") / len(played) - 0.75) < 0.05
    assert min(runs(played)[:-1]) == 16
    # Turns of the rarer policy seldom follow each other: half of them are alone, 40 steps on average.
    assert 16 < np.median([len(list(run)) for name, run in itertools.groupby(played) if name == "b"]) < 65


def test_one_policy_alone_plays_as_if_there_were_no_turns():
    def draws(rng):
        return undirected(lambda: int(rng.integers(4)), rng)

    for name in ("random", "hold"):
        mix = np.random.default_rng(3)
        alone = take(draws(np.random.default_rng(3))[name], 500)
        assert take(mixed(draws(mix), {name: 1.0}, mix), 500) == alone


def test_random_draws_at_every_step_and_hold_keeps_to_an_action():
    numbers = itertools.count()  # each draw differs from the last one
    policies = undirected(lambda: next(numbers), np.random.default_rng(0))
    assert set(runs(take(policies["random"], 100))) == {1}
    held = runs(take(policies["hold"], 5000))[:-1]
    assert set(held) == set(range(1, 17))
