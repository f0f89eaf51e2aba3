import contextlib
import importlib
import json
import logging
import re
import shutil
import socket
import threading
import time

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from dreamer4.batch import ActionComponent
from dreamer4.dreamers import load
from dreamer4.errors import UserError
from dreamer4.play.server import Server
from dreamer4.world import load as load_world
from noise_worlds import EXPERIMENTS
from stores import ids_of, write_store

KEY, STICK, PADS = (
    ActionComponent("key", "categorical", 4),
    ActionComponent("stick", "continuous", 2),
    ActionComponent("pads", "binary", 3),
)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return importlib.import_module("play")


@pytest.fixture
def play(script):
    """The experiment as a function of its options, which leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield lambda **options: script.play(script.Options(**{"port": 0, "browser": False} | options))
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def serve(play, monkeypatch, capsys):
    """Plays with these options meanwhile, and tells what is printed."""

    @contextlib.contextmanager
    def serve(**options):
        capsys.readouterr()
        made = []
        make = Server.make_uvicorn
        monkeypatch.setattr(Server, "make_uvicorn", lambda self: made.append(make(self)) or made[0])
        thread = threading.Thread(target=play, kwargs=options)
        thread.start()
        while not (made and made[0].started):
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield capsys.readouterr()
        finally:
            made[0].should_exit = True
            thread.join(10)
            assert not thread.is_alive()

    return serve


def first_words(port, query="", host="127.0.0.1"):
    """What a page hears first, and the first status."""
    options = {"proxy": None, "ping_interval": None, "close_timeout": 0.5}
    with connect(f"ws://{host}:{port}/play{query}", origin=f"http://{host}:{port}", **options) as page:
        return json.loads(page.recv(10)), next(
            said for said in iter(lambda: json.loads(page.recv(10)), None) if not said["busy"]
        )


# ----- playing -----


def test_a_run_is_played(run_of, serve, script, monkeypatch):
    opened = []
    monkeypatch.setattr(script.webbrowser, "open", opened.append)
    monkeypatch.setattr(script, "has_display", lambda: True)
    run = run_of("next_frame")
    with serve(run=run, browser=True, rate=7.5, context=2) as printed:
        url = re.fullmatch(rf"playing next_frame \({run}\): (http://127.0.0.1:\d+/)\n", printed.out)[1]
        assert opened == [url]
        assert "warning" not in printed.err
        hello, status = first_words(url.rsplit(":", 1)[1].strip("/"))
    assert (hello["title"], hello["ks"], hello["contexts"], hello["truth"]) == ("next_frame", [], [1, 2], False)
    assert 0 < hello["starts"] <= 64
    assert hello["actions"][0]["keys"]["ArrowUp"] == [1, 1.0]
    assert (status["rate"], status["clock"], status["start"]) == (7.5, "held", "data")


def test_without_its_data_elsewhere_and_with_a_token(run_of, serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(run_of("next_frame"), tmp_path / "bare", ignore=shutil.ignore_patterns("data"))
    with serve(run=run, host="0.0.0.0") as printed:
        assert "there are no real frames to begin from: " in printed.err
        assert "warning: whoever reaches 0.0.0.0 and has this link can play; nothing is encrypted here" in printed.err
        found = re.search(r": http://(\S+):(\d+)/#token=(\S+)\n$", printed.out)
        name, port, token = found.groups()
        assert name == socket.gethostname()
        assert len(token) >= 20
        for query in ("", "?token=", "?token=guess"):
            with pytest.raises(InvalidStatus, match="403"):
                first_words(port, query)
        hello, status = first_words(port, f"?token={token}")
        assert (hello["title"], hello["starts"], status["start"]) == ("bare", 0, "nothing")
        assert token not in printed.err


def test_a_token_of_ones_own(run_of, play, monkeypatch, capsys):
    tokens = []
    monkeypatch.setattr(Server, "run", lambda self, _: (tokens.append(self.guard.token), self.ready()))
    for options in (
        {},
        {"host": "0.0.0.0"},
        {"host": "0.0.0.0"},
        {"host": "0.0.0.0", "token": "mine"},
        {"token": "mine"},
        {"names": ("world.example",)},
    ):
        play(run=run_of("next_frame"), **options)
    nothing, one, other, mine, local, proxied = tokens
    assert (nothing, mine, local) == (None, "mine", "mine")
    assert len({one, other, proxied}) == 3
    assert proxied  # though it listens here: a proxy brings strangers
    assert "#token=mine\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["world.example", "World.Example:8443", "world.example:443"])
def test_a_proxys_name_may_have_a_port(run_of, play, monkeypatch, name):
    guards = []
    monkeypatch.setattr(Server, "run", lambda self, _: guards.append(self.guard))
    play(run=run_of("next_frame"), names=(name,))
    for host in ("world.example", "world.example:443", "world.example:8443"):
        assert guards[0].knows_host([host])
    assert not guards[0].knows_host(["evil.example:8443"])


# ----- what is known of a world -----


def test_the_toy_world_is_known(script, run_of):
    run = run_of("dynamics")
    trained = load(run)
    known = script.known_of(trained, run, script.Options(clips=3, context=4))
    assert known["labels"] == {"action": ("STAND", "UP", "DOWN", "LEFT", "RIGHT")}
    assert known["keys"] == {"action": {"ArrowUp": 1, "ArrowDown": 2, "ArrowLeft": 3, "ArrowRight": 4}}
    assert (known["neutral"], known["clock"]) == (None, "held")
    starts = known["starts"]
    assert starts.frames.shape == (3, 4, 16, 16, 3)
    assert starts.actions["action"].shape == (3, 4)
    for clip in range(3):
        state = starts.truth.begin(clip)
        for action in (None, {"action": np.int32(0)}):  # to stand still
            np.testing.assert_array_equal(starts.truth.step(state, action)[1], starts.frames[clip, -1])
        moved, frame = starts.truth.step(state, {"action": np.int32(4)})
        assert np.any(frame != starts.frames[clip, -1])
        assert moved.position[0, 1] != state.position[0, 1]
    assert script.choices_of_k(load_world(trained)) == (1, 2, 4)


def test_a_data_set_is_begun_from(script, run_of, tmp_path, capsys):
    run = run_of("dynamics")
    data = write_store(tmp_path / "data", dict.fromkeys(ids_of("validation", 3), 5), noise=True)
    known = script.known_of(load(run), run, script.Options(data=data, context=4))
    assert (known["starts"].frames.shape, known["starts"].truth) == ((2, 4, 16, 16, 3), None)  # of 3: half of 4
    assert known["clock"] == "held"
    known = script.known_of(load(run), run, script.Options(data=tmp_path / "nowhere"))
    assert "starts" not in known
    assert "there are no real frames to begin from: " in capsys.readouterr().err
    assert script.names_of_actions(run, tmp_path / "nowhere") == {}


def test_what_does_nothing_is_found(script):
    names = {"key": ("NOOP", "FIRE", "UP", "DOWN")}
    rest = script.neutral((KEY, PADS), names)
    assert {name: (x.tolist(), x.dtype) for name, x in rest.items()} == {
        "key": (0, np.int32),
        "pads": ([0] * 3, np.int32),
    }
    assert script.neutral((KEY,), {"key": ("FIRE", "NOOP", "UP", "DOWN")})["key"] == 1
    assert script.neutral((KEY, PADS), {}) is None
    assert script.neutral((KEY,), {"key": ("STAND", "UP", "DOWN", "LEFT")}) is None
    assert script.neutral((PADS, STICK), {}) is None


def test_keys_for_what_is_named_so(script):
    assert script.keys_of((KEY, STICK, PADS), {"key": ("NOOP", "UP", "UPFIRE", "JUMP")}) == {
        "key": {"ArrowUp": 1, "ArrowUp+KeyF": 2},
        "stick": {"ArrowLeft": [0, -1.0], "ArrowRight": [0, 1.0], "ArrowUp": [1, 1.0], "ArrowDown": [1, -1.0]},
    }
    assert script.keys_of((ActionComponent("axes", "continuous", 3),), {}) == {}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("UP", "ArrowUp"),
        ("FIRE", "KeyF"),
        ("DOWNLEFTFIRE", "ArrowDown+ArrowLeft+KeyF"),
        ("NOOP", ""),
        ("UPWARDS", ""),
        ("up", ""),
        ("", ""),
    ],
)
def test_chords(script, name, keys):
    assert script.chord(name) == keys


@pytest.mark.parametrize(
    ("host", "token", "link"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:8000/"),
        ("localhost", None, "http://localhost:8000/"),
        ("::1", None, "http://[::1]:8000/"),
        ("192.168.1.2", "t", "http://192.168.1.2:8000/#token=t"),
        ("192.168.1.2", "a+b&c/é", "http://192.168.1.2:8000/#token=a%2Bb%26c%2F%C3%A9"),
        ("0.0.0.0", "t", "http://this-machine:8000/#token=t"),
        ("::", "t", "http://this-machine:8000/#token=t"),
    ],
)
def test_the_link(script, host, token, link, monkeypatch):
    monkeypatch.setattr(script.socket, "gethostname", lambda: "this-machine")
    assert script.address(script.Options(host=host), 8000, token) == link


def test_a_page_is_opened_where_it_can_be_seen(script, monkeypatch):
    monkeypatch.setattr(script.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not script.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert script.has_display()


# ----- bad input -----


def test_a_taken_port_is_told_first(play, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port: {port} is taken; (\d+) is free: --port \1$"):
            play(run=tmp_path / "none", port=port)


def test_what_cannot_be_played_is_refused(play, run_of, tmp_path):
    for options, sentence in (
        ({"run": tmp_path / "none"}, "run: there is no "),
        ({"run": run_of("tokenizer")}, "a run of train_tokenizer.py found, one that dreams expected"),
        ({"run": run_of("dynamics"), "k": 3}, "3"),
        ({"run": run_of("dynamics"), "k": 0}, "0"),
        ({"run": run_of("next_frame"), "k": 1}, "k: 1 found, none expected"),
        ({"run": run_of("next_frame"), "host": "no.such.host.invalid"}, "host: 'no.such.host.invalid' found"),
        ({"run": run_of("next_frame"), "port": 70000}, "port: 70000 found, 0 to 65535 expected"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            play(**options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context": 0}, "context: 0 found, 1 or more expected"),
        ({"clips": 0}, "clips: 0 found, 1 or more expected"),
        ({"rate": 0.5}, "rate: 0.5 found, 1 or more expected"),
        ({"rate": float("nan")}, "rate: nan found, 1 or more expected"),
        ({"sessions": 0}, "sessions: 0 found, 1 or more expected"),
        ({"idle": 0.0}, "idle: 0.0 found, 1 or more expected"),
        ({"port": -1}, "port: -1 found, 0 or more expected"),
        ({"token": ""}, "token: '' found, some letters expected"),
        ({"names": ("https://a.example",)}, "names: 'https://a.example' found, a name such as world.example expected"),
        ({"names": ("b.example", "a.example/world")}, "names: 'a.example/world' found, a name such as world.example"),
        ({"names": ("",)}, "names: '' found, a name such as world.example expected"),
    ],
)
def test_options_that_cannot_be_are_refused(script, options, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        script.Options(**options)
