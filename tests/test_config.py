import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import pytest

from dreamer4.config import ADDED, differences, from_json, to_json
from dreamer4.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    width: int = 3
    path: Path | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    name: str
    part: Part = Part()
    spare: Part | None = None
    parts: tuple[Part, ...] = ()
    pair: tuple[float, Path] = (0.5, Path("a"))
    kind: Literal["x", "y"] | None = "x"
    where: Annotated[Path, "told"] = Path("runs/here")


FULL = Whole("full", Part(7, Path("b/c")), Part(8), (Part(1), Part(2, Path("d"))), (0.25, Path("e")), None, Path("f"))


@pytest.mark.parametrize("config", [Whole("plain"), FULL])
def test_json_there_and_back(config):
    text = json.dumps(to_json(config))
    assert from_json(Whole, json.loads(text)) == config


def test_json_says_what_the_config_says():
    assert to_json(Whole("plain")) == {
        "name": "plain",
        "part": {"width": 3, "path": None},
        "spare": None,
        "parts": [],
        "pair": [0.5, "a"],
        "kind": "x",
        "where": "runs/here",
    }


def test_absent_fields_take_their_defaults():
    assert from_json(Whole, {"name": "old"}) == Whole("old")


def test_a_field_that_was_added_is_left_out_where_it_has_its_default():
    @dataclasses.dataclass(frozen=True)
    class Newer(Part):
        depth: int = dataclasses.field(default=1, metadata=ADDED)

    old = to_json(Part())
    assert differences(old, to_json(Newer())) == []
    assert differences(old, to_json(Newer(depth=2))) == ["depth: 'absent' there, 2 asked for"]
    assert from_json(Newer, to_json(Newer(depth=2))) == Newer(depth=2)
    assert from_json(Newer, old) == Newer()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "a", "depth": 3}, r"config\.depth: no such field in Whole"),
        ({"name": "a", "part": {"depth": 3}}, r"config\.part\.depth: no such field in Part"),
        ({"name": "a", "spare": {"depth": 3}}, r"config\.spare\.depth: no such field in Part"),
        ({"name": "a", "parts": [{}, {"depth": 3}]}, r"config\.parts\[1\]\.depth: no such field in Part"),
        ({"name": "a", "part": 3}, r"config\.part: found 3, expected the fields of Part"),
    ],
)
def test_what_does_not_fit_is_named(value, message):
    with pytest.raises(UserError, match=message):
        from_json(Whole, value)


def test_differences_name_each_field_with_both_values():
    old = to_json(FULL)
    new = to_json(dataclasses.replace(FULL, name="other", part=Part(9, Path("b/c")), pair=(0.5, Path("e"))))
    lines = differences(old, new)
    assert [line.split(":")[0] for line in lines] == ["name", "pair", "part.width"]
    assert "'full'" in lines[0]
    assert "'other'" in lines[0]
    assert "7" in lines[2]
    assert "9" in lines[2]
    assert differences(old, old) == []


def test_differences_name_fields_that_only_one_side_has():
    assert [line.split(":")[0] for line in differences({"a": 1, "b": {"c": 2}}, {"b": {"d": 2}})] == ["a", "b.c", "b.d"]
