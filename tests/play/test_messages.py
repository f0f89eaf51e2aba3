import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer4.errors import UserError
from dreamer4.play.messages import (
    LONGEST,
    Branch,
    Clock,
    Context,
    Hold,
    K,
    Keep,
    Pause,
    Record,
    Reset,
    Seen,
    Speed,
    Step,
    Undo,
    read_message,
)

SAID = [
    ({"type": "hold", "pane": 0, "action": None}, Hold(0, None)),
    ({"type": "hold", "pane": 1, "action": {"key": 3, "stick": [0.5, -1]}}, Hold(1, {"key": 3, "stick": [0.5, -1]})),
    ({"type": "pause", "on": True}, Pause(True)),
    ({"type": "step"}, Step()),
    ({"type": "speed", "rate": 15}, Speed(15.0)),
    ({"type": "speed", "rate": 7.5}, Speed(7.5)),
    ({"type": "clock", "mode": "held"}, Clock("held")),
    ({"type": "reset", "start": "data", "seed": 2**32 - 1, "clip": 3}, Reset("data", 2**32 - 1, 3)),
    ({"type": "k", "value": 2}, K(2)),
    ({"type": "context", "value": 8}, Context(8)),
    ({"type": "undo", "steps": 1000}, Undo(1000)),
    ({"type": "branch"}, Branch()),
    ({"type": "keep", "pane": 1}, Keep(1)),
    ({"type": "record", "on": False}, Record(False)),
    ({"type": "seen", "tick": 0}, Seen(0)),
]
NUMBER = [None, True, False, "1", [], {}, [1]]
"""What no number is, and for each field what it is not, either."""
WRONG = {
    "pane": [*NUMBER, 1.0, 0.5],
    "action": [True, 0, "null", [], [0], 1.5],
    "on": [None, 0, 1, "true", [], {}],
    "rate": [*NUMBER, 0, 0.99, -15],
    "mode": [None, 0, True, "", "HELD", ["held"], {}],
    "start": [None, 0, "picture", "Data", ["data"], {}],
    "seed": [*NUMBER, 1.0, -1, 2**32, 10**400],
    "clip": [*NUMBER, 1.0],
    "value": [*NUMBER, 2.0],
    "steps": [*NUMBER, 1.0, 0, -1, 1001, 10**400],
    "tick": [*NUMBER, 1.0],
}


def refuses(text):
    with pytest.raises(UserError) as error:
        read_message(text)
    return str(error.value)


@pytest.mark.parametrize(("fields", "message"), SAID, ids=lambda x: x["type"] if isinstance(x, dict) else "")
def test_messages_are_read_and_only_exactly_so(fields, message):
    assert read_message(json.dumps(fields)) == message
    assert "no such field" in refuses(json.dumps({**fields, "more": 1}))
    for name in fields.keys() - {"type"}:
        missing = {other: value for other, value in fields.items() if other != name}
        assert refuses(json.dumps(missing)) == f"{fields['type']}.{name}: missing"
        wrong = [2, -1] if fields["type"] == "keep" else []
        for value in [*WRONG[name], *wrong]:
            assert refuses(json.dumps({**fields, name: value})).startswith(
                (f"{fields['type']}.{name}: ", f"{name}: ")  # of the type, of the range
            )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "message: Expecting value"),
        ("{", "message: Expecting property name"),
        ('{"type":"step"}}', "message: Extra data"),
        ('{"type":"step"} {"type":"step"}', "message: Extra data"),
        ("{'type':'step'}", "message: Expecting property name"),
        ('{"type":"step",}', "message: "),
        ("\ufeff" + '{"type":"step"}', "message: "),
        ('{"type":"st\nep"}', "message: Invalid control character"),
        ("null", "message: NoneType found, an object expected"),
        ('"step"', "message: str found, an object expected"),
        ('[{"type":"step"}]', "message: list found, an object expected"),
        ("12", "message: int found, an object expected"),
        ("{}", "message.type: None found, one of hold, pause, "),
        ('{"type":null}', "message.type: None found"),
        ('{"type":["step"]}', r"message.type: ['step'] found"),
        ('{"type":{"step":1}}', "message.type: {'step': 1} found"),
        ('{"type":"Step"}', "message.type: 'Step' found"),
        ('{"type":"__class__"}', "message.type: '__class__' found"),
        ('{"type":"step","__init__":1}', "step.__init__: no such field"),
        ('{"type":"step","":1}', "step.: no such field"),
        ('{"type":"step","type":"step"}', "message: a field comes twice"),
        ('{"type":"pause","on":true,"on":false}', "message: a field comes twice"),
        ('{"type":"hold","pane":0,"action":{"key":1,"key":2}}', "message: a field comes twice"),
        ('{"type":"speed","rate":NaN}', "message: NaN is no JSON"),
        ('{"type":"speed","rate":Infinity}', "message: Infinity is no JSON"),
        ('{"type":"hold","pane":0,"action":{"stick":[-Infinity,0]}}', "message: -Infinity is no JSON"),
        ('{"type":"speed","rate":1e999}', "message: 1e999 is out of range"),
        ('{"type":"hold","pane":0,"action":{"stick":[-1e999,0]}}', "message: -1e999 is out of range"),
        (f'{{"type":"speed","rate":{10**400}}}', "message: int too large to convert to float"),
        (f'{{"type":"seen","tick":{"9" * 5000}}}', "message: 5023 characters found, at most 4096 bytes expected"),
    ],
)
def test_what_is_no_message_is_refused(text, sentence):
    assert refuses(text).startswith(sentence)


def test_the_longest_message_is_counted_in_bytes():
    text = '{"type":"step"}'
    assert read_message(text + " " * (LONGEST - len(text))) == Step()
    assert (
        refuses(text + " " * (LONGEST - len(text) + 1)) == "message: 4097 characters found, at most 4096 bytes expected"
    )
    assert "at most 4096 bytes" in refuses("\u20ac" * 1366)
    assert "at most 4096 bytes" not in refuses("\u20ac" * 1365)


@pytest.mark.parametrize(
    "template", ["{}", '{{"type":{}}}', '{{"type":"pause","on":{}}}', '{{"type":"keep","pane":{}}}']
)
def test_nesting_without_end_is_refused(template):
    """At each depth around the one that the reader can follow, to which what tells of it must come, too."""
    for depth in [1, 2, 100, *range(800, 1050), 2000]:
        for text in ("[" * depth + "]" * depth, "[" * depth, '{"a":' * depth):
            refuses(template.format(text))


def test_nested_actions_are_left_to_the_world():
    action = '{"key":' + "[" * 700 + "]" * 700 + "}"
    assert isinstance(read_message(f'{{"type":"hold","pane":0,"action":{action}}}'), Hold)


FUZZ = settings(max_examples=200, derandomize=True, deadline=None, database=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {"type": st.sampled_from([fields["type"] for fields, _ in SAID])},
    optional={name: JSON | st.sampled_from(values) for name, values in WRONG.items()},
)


@FUZZ
@given(st.text() | st.builds(json.dumps, JSON) | st.builds(json.dumps, FIELDS))
def test_whatever_is_said_is_a_message_or_refused(text):
    try:
        read_message(text)
    except UserError as error:
        assert str(error)  # noqa: PT017 (most are refused, not all)
