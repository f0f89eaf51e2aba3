import contextlib
import http.client
import io
import json
import logging
import socket
import threading
import time
from importlib import resources

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from dreamer4.errors import UserError
from dreamer4.play import game as games
from dreamer4.play import server as servers
from dreamer4.play.game import Game, Starts, Truth
from dreamer4.play.guard import Guard
from dreamer4.play.server import HEADERS, NOT_UNDERSTOOD, REFUSALS, Limits, Server, listen
from dreamer4.play.session import warm_up
from dreamer4.world import World, load

RATE = 60.0
SOON = 5.0
"""Seconds in which everything that should come has come, on a busy machine, too."""
GENERIC = {NOT_UNDERSTOOD, "nothing was recorded", *REFUSALS.values()}


class Page:
    """A player, as far as the server knows: without ``draws``, one that never says what it has seen."""

    def __init__(self, port, draws=True, **options):
        options = {"proxy": None, "compression": None, "ping_interval": None, "close_timeout": 0.5} | options
        self.opened = connect(f"ws://127.0.0.1:{port}/play", origin=f"http://127.0.0.1:{port}", **options)
        self.socket = self.opened.__enter__()  # until it is left, as `with` does
        self.draws = draws

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.opened.__exit__(None, None, None)

    def say(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self, seconds=SOON):
        """What comes next: a dict, with ``files`` where there are some."""
        data = self.socket.recv(seconds)
        if isinstance(data, str):
            return json.loads(data)
        size = int.from_bytes(data[:4], "little")
        header, at, files = json.loads(data[4 : 4 + size]), 4 + size, []
        for image in header["images"]:
            files.append(data[at : at + image["bytes"]])
            at += image["bytes"]
        assert at == len(data)
        if header["type"] == "frames" and self.draws:
            self.say("seen", tick=header["tick"])
        return header | {"files": files}

    def until(self, kind, seconds=SOON, **fields):
        """The next that is of this kind, with these fields."""
        end = time.monotonic() + seconds
        while True:
            heard = self.hear(max(0.01, end - time.monotonic()))
            if heard["type"] == kind and fields.items() <= heard.items():
                return heard

    def during(self, seconds):
        """All that comes in that time."""
        end, heard = time.monotonic() + seconds, []
        with contextlib.suppress(TimeoutError):
            while True:
                heard.append(self.hear(max(0, end - time.monotonic())))
        return heard

    def still(self):
        """Waits until nothing moves; the status then."""
        self.say("pause", on=True)
        status = self.until("status", paused=True)
        for heard in self.during(0.1):
            status = heard if heard["type"] == "status" else status
        return status

    def ends(self, seconds=SOON):
        """The code and the reason with which the server ends it; None where they did not get through."""
        end = time.monotonic() + seconds
        try:
            while True:
                self.hear(max(0.01, end - time.monotonic()))
        except ConnectionClosed as closed:
            return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (None, None)


def count_along(state, action):
    return state + 1, np.full((16, 16, 3), state + 1, np.uint8)


@pytest.fixture(scope="module")
def game(run_of):
    world = load(run_of("next_frame"))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 2, *world.describe().frame), np.uint8)
    actions = {"controls": rng.normal(size=(3, 2, 2)).astype(np.float32)}
    starts = Starts(frames, actions, Truth(lambda clip: np.int32(100 * clip), count_along))
    game = Game(world, "noise", starts=starts, context=2, rate=RATE)
    warm_up(game)
    return game


@contextlib.contextmanager
def serving(game, guard=servers.OWN, limits=servers.USUAL, listening=None):
    """The port of a server, which runs meanwhile."""
    listening, ready = listening or listen("127.0.0.1", 0), threading.Event()
    running = Server(game, guard, limits, ready.set).make_uvicorn()
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    port = listening.getsockname()[1]
    thread.start()
    try:
        assert ready.wait(SOON)
        yield port
    finally:
        running.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(game):
    with serving(game, limits=Limits(sessions=3)) as port:
        yield port


@pytest.fixture
def page(port):
    with enter(port) as page:
        yield page


def enter(port, **options):
    """A page that is let in, as soon as there is room."""
    end = time.monotonic() + SOON
    while True:
        page = Page(port, **options)
        try:
            assert page.hear()["type"] == "hello"
            return page
        except ConnectionClosed:
            assert time.monotonic() < end, "no place became free"
            page.__exit__()
            time.sleep(0.02)


# ----- what is served -----


def request(port, path, method="GET", **headers):
    """The status, the headers and the body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def test_the_page_is_served(port):
    folder = resources.files("dreamer4.play") / "page"
    status, headers, body = request(port, "/")
    assert (status, body) == (200, (folder / "index.html").read_bytes())
    assert headers["content-type"] == "text/html; charset=utf-8"
    names = [file.name for file in folder.iterdir() if file.name.rsplit(".", 1)[-1] in servers.TYPES]
    assert "index.html" in names
    for name in names:
        status, headers, body = request(port, f"/{name}?v=1")
        assert (status, body) == (200, (folder / name).read_bytes())
        assert headers["content-type"] == servers.TYPES[name.rsplit(".", 1)[-1]]


def test_every_answer_holds_the_page_to_this_server(port):
    for path, host in (("/", None), ("/nothing", None), ("/", "evil.example")):
        headers = request(port, path, **({"Host": host} if host else {}))[1]
        assert HEADERS.items() <= headers.items()
        assert "server" not in headers
    policy = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in HEADERS["content-security-policy"]
    assert not [name for name in request(port, "/")[1] if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path",
    [
        "/../messages.py",
        "/..%2fmessages.py",
        "/%2e%2e/messages.py",
        "/%2e%2e%2fmessages.py",
        "/..\\messages.py",
        "/index.html/../../messages.py",
        "//etc/passwd",
        "/etc/passwd",
        "/page/index.html",
        "/messages.py",
        "/index.html/",
        "/index.html%00.js",
        "/play",
        "/docs",
        "/openapi.json",
        "*",
        "http://evil.example/",
    ],
)
def test_nothing_else_is_served(port, path):
    assert request(port, path, Host=f"127.0.0.1:{port}")[::2] == (404, b"Not Found")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_the_page_is_only_read(port, method):
    assert request(port, "/", method)[0] == 405
    assert request(port, "/nothing", method)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.1.2", "", "laptop"])
def test_under_another_name_nothing_is_served(port, host, caplog):
    status, _, body = request(port, "/", Host=host)
    assert (status, body) == (421, b"This server goes by another name.")
    assert f"a request was refused: host ['{host}']" in caplog.text


def test_without_a_host_or_with_two_nothing_is_served(port):
    for lines in (b"GET / HTTP/1.0", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example"):
        with socket.create_connection(("127.0.0.1", port), SOON) as raw:
            raw.sendall(lines + b"\r\n\r\n")
            assert raw.recv(100).split()[1] in (b"421", b"400")


def test_a_stray_file_is_not_served(tmp_path, monkeypatch):
    (tmp_path / "page" / "folder").mkdir(parents=True)
    for name in ("index.html", "main.js", "main.js~", ".main.js.swp", "README"):
        (tmp_path / "page" / name).write_text(name)
    monkeypatch.setattr(servers.resources, "files", lambda _: tmp_path)
    assert sorted(path for path, *_ in servers.page_files()) == ["/", "/index.html", "/main.js"]


# ----- who may open a socket -----


def upgrade(port, path="/play", host=None, origins=None):
    """The status with which a socket is opened, or not, under these headers."""
    host = host or f"127.0.0.1:{port}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SOON)
    with contextlib.closing(connection):
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", host)
        for origin in [f"http://{host}"] if origins is None else origins:
            connection.putheader("Origin", origin.format(port=port))
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")):
            connection.putheader(name, value)
        connection.putheader("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
        connection.endheaders()
        return connection.getresponse().status


def test_its_own_pages_may_open_a_socket(port):
    assert upgrade(port) == 101
    assert upgrade(port, host=f"localhost:{port}") == 101
    assert upgrade(port, host=f"LOCALHOST:{port}", origins=["http://localhost:{port}"]) == 101


@pytest.mark.parametrize(
    "origins",
    [
        [],
        [""],
        ["null"],
        ["http://evil.example"],
        ["http://127.0.0.1"],
        ["http://127.0.0.1:1"],
        ["http://localhost:{port}"],
        ["http://127.0.0.1:{port}.evil.example"],
        ["http://127.0.0.1:{port}", "http://127.0.0.1:{port}"],
        ["http://127.0.0.1:{port}", "http://evil.example"],
    ],
)
def test_pages_of_others_may_not(port, origins, caplog):
    status = upgrade(port, origins=origins)
    if len(origins) < 2:
        assert status == 403
        assert "a socket was refused" in caplog.text
    assert status in (400, 403)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "192.168.1.2:{port}", "127.0.0.1.evil.example"]
)
def test_a_name_that_was_made_to_mean_this_machine_does_not_help(port, host):
    assert upgrade(port, host=host.format(port=port)) == 403


@pytest.mark.parametrize("path", ["/", "/Play", "/play/", "/play/x", "/index.html"])
def test_there_is_one_socket(port, path):
    assert upgrade(port, path) in (403, 404, 307)


def test_a_token_is_asked_for(game, caplog):
    with serving(game, Guard(token="secret/+")) as port:
        for query in (
            "",
            "?token=",
            "?token=wrong",
            "?token=secret",
            "?token=SECRET/%2B",
            "?token=secret/+",
            "?token=secret/%2B&token=secret/%2B",
            "?token=wrong&token=secret/%2B",
            "?Token=secret/%2B",
            "#token=secret/%2B",
        ):
            assert upgrade(port, f"/play{query}") == 403
        assert upgrade(port, "/play?token=secret/%2B", origins=["http://evil.example"]) == 403
        assert upgrade(port, "/play?token=secret/%2B", host="evil.example") == 403
        assert upgrade(port, "/play?token=secret/%2B") == 101
        assert upgrade(port, "/play?token=secret/%2B", host=f"192.168.1.2:{port}") == 101
        assert request(port, "/")[0] == 200  # the page is no secret, and has the token from its own address
        assert request(port, "/", Host="evil.example")[0] == 421
    assert "secret" not in "".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


# ----- playing -----


def picture_of(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def test_the_first_words(port, game):
    with Page(port, draws=False) as page:
        hello, status, frames = (page.hear() for _ in range(3))
    assert hello == game.hello()
    assert (status["type"], status["start"], status["undo"], status["busy"]) == ("status", "data", 0, None)
    assert {"type": "frames", "tick": 1, "step": 0, "ms": 0, "undo": 0}.items() <= frames.items()
    assert [(i["pane"], i["what"], i["mime"]) for i in frames["images"]] == [
        (0, "dream", "image/png"),
        (0, "truth", "image/png"),
    ]
    for file in frames["files"]:
        np.testing.assert_array_equal(picture_of(file), game.starts.frames[0, -1])


def test_keys_in_pictures_out(page, game):
    page.still()
    page.say("reset", start="data", seed=3, clip=1)
    assert page.until("status")["clip"] == 1
    assert page.until("frames")["step"] == 0
    state = game.worlds[None].reset(game.starts.frames[1], {"controls": game.starts.actions["controls"][1]}, 3)
    page.say("hold", pane=0, action={"controls": [0.5, -1]})
    for i in range(1, 4):
        page.say("step")
        frames = page.until("frames")
        state, expected = game.worlds[None].step(state, [0.5, -1])
        np.testing.assert_array_equal(picture_of(frames["files"][0]), expected)
        assert (frames["step"], frames["undo"]) == (i, i)
        assert frames["ms"] > 0
        assert picture_of(frames["files"][1])[0, 0, 0] == 100 + i
    page.say("undo", steps=2)
    assert page.until("status")["undo"] == 1
    assert (page.hear()["step"], page.during(0.1)) == (1, [])


def test_a_tap_on_the_page_is_one_step(page):
    page.still()
    page.say("clock", mode="held")
    page.say("pause", on=False)
    page.until("status", paused=False)
    page.say("hold", pane=0, action={"controls": [1, 0]})
    page.say("hold", pane=0, action=None)
    page.until("frames")
    assert page.during(0.15) == []


def test_two_panes_on_the_page(page):
    page.still()
    page.say("branch")
    assert page.until("status")["panes"] == 2
    assert [image["pane"] for image in page.until("frames")["images"]] == [0, 0, 1, 1]
    page.say("hold", pane=1, action={"controls": [3, 3]})
    page.say("step")
    files = page.until("frames")["files"]
    assert np.any(picture_of(files[0]) != picture_of(files[2]))
    page.say("keep", pane=1)
    assert page.until("status")["panes"] == 1
    assert page.until("frames")["files"] == files[2:]


def test_a_picture_on_the_page(page):
    picture = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    page.still()
    page.socket.send(picture.tobytes())
    assert page.until("status")["start"] == "picture"
    frames = page.until("frames")
    assert [image["what"] for image in frames["images"]] == ["dream"]
    np.testing.assert_array_equal(picture_of(frames["files"][0]), picture)


def test_a_recording_on_the_page(page, monkeypatch):
    page.say("record", on=True)
    page.until("status", recording=True)
    for _ in range(4):
        recorded = page.until("frames")["recorded"]
    page.say("record", on=False)
    page.until("status", recording=False)
    gif = page.until("gif")
    assert gif["images"] == [{"pane": 0, "what": "gif", "bytes": len(gif["files"][0]), "mime": "image/gif"}]
    with Image.open(io.BytesIO(gif["files"][0])) as film:
        assert (film.format, film.is_animated) == ("GIF", True)
        assert film.n_frames >= recorded >= 4
    page.say("record", on=False)
    assert page.until("error")["text"] == "nothing was recorded"
    monkeypatch.setattr(games, "MOST_RECORDED", 3)
    page.say("record", on=True)
    with Image.open(io.BytesIO(page.until("gif")["files"][0])) as film:
        assert film.n_frames == 3
    assert not page.still()["recording"]


# ----- what pages must not say -----

HOLD = '{"type":"hold","pane":0,"action":'
MALFORMED = [
    "",
    "{",
    "[]",
    "null",
    '{"type":"step"}}',
    '{"type":"dance"}',
    '{"type":"step","more":1}',
    '{"type":"speed"}',
    '{"type":"speed","rate":NaN}',
    '{"type":"speed","rate":1e999}',
    '{"type":"speed","rate":true}',
    '{"type":"pause","on":1}',
    '{"type":"pause","on":true,"on":true}',
    "[" * 4000,
    '{"a":' * 800,
    '{"type":"pause","on":' + "[" * 1500 + "]" * 1500 + "}",
    '{"type":"undo","steps":0}',
    '{"type":"undo","steps":1001}',
    '{"type":"undo","steps":-1}',
    f'{{"type":"undo","steps":{"9" * 4000}}}',
    '{"type":"reset","start":"data","seed":-1,"clip":0}',
    '{"type":"reset","start":"data","seed":4294967296,"clip":0}',
    '{"type":"keep","pane":2}',
    '{"type":"hold","pane":2,"action":null}',
    '{"type":"hold","pane":-1,"action":null}',
]
IMPOSSIBLE = [
    *(
        f'{HOLD}{{"controls":{value}}}}}'
        for value in ("0", "[0]", "[0,0,0]", '"/etc"', "[1e300,0]", "[true,false]", "null")
    ),
    HOLD + '{"controls":' + "[" * 800 + "]" * 800 + "}}",
    HOLD + '{"other":[0,0]}}',
    HOLD + "{}}",
    '{"type":"hold","pane":1,"action":{"other":[0,0]}}',
    '{"type":"keep","pane":1}',
    '{"type":"speed","rate":61}',
    '{"type":"speed","rate":0.5}',
    '{"type":"k","value":1}',
    '{"type":"context","value":3}',
    '{"type":"reset","start":"data","seed":0,"clip":3}',
    '{"type":"reset","start":"nothing","seed":0,"clip":-1}',
    b"",
    b"x",
    bytes(767),
    bytes(769),
]


@pytest.mark.parametrize("said", [MALFORMED[:12], MALFORMED[12:], IMPOSSIBLE[:12], IMPOSSIBLE[12:]])
def test_what_is_refused_changes_nothing(page, said, caplog):
    page.still()
    page.say("reset", start="same", seed=0, clip=0)
    page.say("step")
    frames = page.until("frames", step=1)
    page.say("pause", on=True)
    before = page.until("status", undo=1)
    for i, text in enumerate(said, 1):
        page.socket.send(text)
        error = page.hear()
        assert error["type"] == "error"
        assert error["text"] in GENERIC
        assert len(caplog.records) == i
    page.say("pause", on=True)
    assert page.hear() == before
    page.say("undo", steps=1)
    page.until("frames", step=0)
    page.say("step")  # under what was held before, which is nothing
    assert page.until("frames", step=1)["files"] == frames["files"]
    for record in caplog.records:
        assert (record.name, record.levelname) == ("dreamer4.play", "WARNING")
        assert record.getMessage().startswith("a message was refused: '") or record.getMessage().startswith(
            'a message was refused: "'
        )
        assert len(record.getMessage()) < 600
        assert "\n" not in record.getMessage()


def test_the_log_says_what_the_page_is_not_told(page, caplog):
    forged = "x\nERROR dreamer4.play: all is lost\x1b[31m\u2028"
    for text in (json.dumps({"type": forged}), json.dumps({"type": "step", forged: 1}), f'{{"type":"{forged}"}}'):
        page.socket.send(text)
        assert page.until("error") == {"type": "error", "text": NOT_UNDERSTOOD}
    page.say("hold", pane=0, action={"controls": forged})
    assert page.until("error") == {"type": "error", "text": "this world has no such action"}
    page.say("hold", pane=0, action={forged: [0, 0]})
    assert page.until("error") == {"type": "error", "text": "this world has no such action"}
    page.say("reset", start="data", seed=0, clip=77)
    assert page.until("error") == {"type": "error", "text": "it cannot begin from there"}
    text = caplog.text
    assert "clip: 77 found, 0 to 2 expected" in text
    assert "ERROR dreamer4.play" in text
    assert len(text.splitlines()) == 6
    assert not any(line.startswith("ERROR") for line in text.splitlines())
    assert "\x1b" not in text


def test_too_long_a_message_ends_it(port, page, caplog):
    page.socket.send('{"type":"pause","on":true}'.ljust(4096))
    page.until("status", paused=True)
    page.socket.send('{"type":"pause","on":true}'.ljust(4097))
    assert page.ends()[0] == 1009
    with enter(port) as other:
        with contextlib.suppress(ConnectionClosed):
            other.socket.send(bytes(10_000_000))
        assert other.ends()[0] in (1009, None)  # cut off in the middle of a word
    with enter(port) as other:
        with contextlib.suppress(ConnectionClosed):
            other.socket.send(["x" * 1000] * 5)  # in parts, which must not add up to more
        assert other.ends()[0] in (1009, None)  # cut off in the middle of a word
    assert "mistake" not in caplog.text


def test_a_flood_ends_it(port, page):
    with enter(port) as other:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(3000):
                page.socket.send('{"type":"seen","tick":0}')
        assert page.ends() == (1008, "too many messages at once")
        assert other.still()["paused"]


def test_a_flood_is_not_worked_through(page, monkeypatch):
    step = World.reset
    monkeypatch.setattr(World, "reset", lambda *arguments: time.sleep(0.05) or step(*arguments))
    with contextlib.suppress(ConnectionClosed):
        for _ in range(600):
            page.say("reset", start="data", seed=0, clip=0)
    assert page.ends(3.0) == (1008, "too many messages at once")


def test_a_flood_of_pictures_is_counted_by_its_bytes(game, monkeypatch):
    """A queue of the largest pictures would be gigabytes."""
    monkeypatch.setattr(servers, "LONGEST", 64)
    with serving(game, limits=Limits(burst=40, messages_per_second=1.0)) as port, enter(port, draws=False) as page:
        page.say("pause", on=True)
        page.until("status", paused=True)
        for _ in range(3):
            page.socket.send(bytes(768))
            page.until("status", start="picture")
        with contextlib.suppress(ConnectionClosed):
            page.socket.send(bytes(768))
        assert page.ends() == (1008, "too many messages at once")


def test_too_much_that_is_not_understood_ends_it(page, caplog):
    for _ in range(20):
        page.socket.send("?")
    assert page.ends() == (1008, "too much that was not understood")
    assert "a session was ended: too much that was not understood" in caplog.text


# ----- places -----


def test_there_is_room_for_so_many(port):
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(enter(port)) for _ in range(3)]
        with Page(port) as late:
            code, reason = late.ends()
            assert code == 1013
            assert reason == "3 are playing here already, which is all this server takes; try again later"
        for page in pages:
            assert page.still()["paused"]
        pages[1].socket.close()
        with enter(port) as late:
            assert late.still()["paused"]
        assert pages[0].still()["paused"]


def slowly(monkeypatch, seconds):
    """Makes every step take so long, in all worlds."""
    step = World.step

    def slow(*arguments):
        time.sleep(seconds)
        return step(*arguments)

    monkeypatch.setattr(World, "step", slow)


@pytest.mark.parametrize("how", ["closed", "cut", "reset"])
def test_who_leaves_in_mid_step_makes_room_and_disturbs_nobody(port, how, monkeypatch, caplog):
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(enter(port)) for _ in range(2)]
        gone = stack.enter_context(enter(port))
        slowly(monkeypatch, 0.2)
        for page in pages:
            page.until("frames")
        if how == "closed":
            gone.socket.close()
        else:
            if how == "reset":
                gone.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            gone.socket.socket.shutdown(socket.SHUT_RDWR)
        with enter(port) as late:
            late.until("frames")
        for page in pages:
            page.until("frames")
            assert page.still()["paused"]
    assert not caplog.records


def test_a_mistake_in_the_world_ends_its_session_alone(port, monkeypatch, caplog):
    with enter(port) as page, enter(port) as other:
        other.still()
        with monkeypatch.context() as patch:
            patch.setattr(World, "step", lambda *_: 1 / 0)
            code, reason = page.ends()
        assert (code, reason) == (1011, "something went wrong; the server's log says what")
        assert "ZeroDivisionError: division by zero" in caplog.text
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        with enter(port) as third, enter(port) as fourth:
            assert third.still()["paused"]
            assert fourth.still()["paused"]
        other.say("step")
        other.until("frames")


def test_a_mistake_in_reading_ends_the_session(page, monkeypatch, caplog):
    monkeypatch.setattr(servers, "read_message", lambda _: 1 / 0)
    page.socket.send("?")
    assert page.ends() == (1011, "something went wrong; the server's log says what")
    assert "ZeroDivisionError" in caplog.text


def test_who_does_nothing_is_sent_away(game):
    limits = Limits(idle_seconds=0.8)
    with serving(game, limits=limits) as port, enter(port) as watching, enter(port) as playing, enter(port) as waiting:
        waiting.say("pause", on=True)
        ends = []  # of one that only watches: it says `seen` of each frame, and that is nothing done
        thread = threading.Thread(target=lambda: ends.append(watching.ends()))
        thread.start()
        for i in range(11):
            playing.say("hold", pane=0, action={"controls": [i, 0]})
            time.sleep(0.1)
        assert playing.still()["paused"]
        thread.join()
        for ending in (*ends, waiting.ends(), playing.ends()):
            assert ending == (4000, "nothing was done for a while")


def test_who_does_not_take_in_what_is_said_makes_room(game):
    listening = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    limits = Limits(sessions=1, unread_seconds=0.3)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(serving(game, limits=limits, listening=listening))
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf = stack.enter_context(Page(port, sock=raw, max_queue=1, close_timeout=0.1))
        for _ in range(300):
            deaf.say("reset", start="data", seed=0, clip=0)
        with enter(port) as page:
            assert page.still()["paused"]


def test_a_connection_that_takes_nothing_in_is_given_up():
    with listen("127.0.0.1", 0) as listening:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert 0 < listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000


def test_pages_are_told_that_the_server_stops(game, caplog):
    with serving(game) as port:
        page = enter(port)
        page.still()
    with page:
        assert page.ends()[0] == 1012
    assert not caplog.records


# ----- time -----


def test_a_page_that_does_not_draw_gets_no_more(port):
    with enter(port, draws=False) as page:
        page.until("frames", tick=3)
        assert page.during(0.15) == []
        page.say("seen", tick=2)
        page.until("frames", tick=5)
        assert page.during(0.15) == []
        page.say("seen", tick=1)
        assert page.during(0.1) == []
        for tick, last in ((10**9, 8), (10**30, 11)):  # that is not sent yet: it counts as the last that is
            page.say("seen", tick=tick)
            page.until("frames", tick=last)
            assert page.during(0.15) == []


def test_the_rate_is_what_was_asked_for(page):
    page.say("speed", rate=20)
    page.until("status", rate=20.0)
    assert 10 <= len(page.during(1.0)) <= 22
    page.say("pause", on=True)
    page.during(0.6)
    page.say("pause", on=False)
    assert len(page.during(0.4)) <= 11  # what was not done meanwhile is not made up for


def test_everybody_gets_a_turn(game, monkeypatch):
    """Eight at once, who ask for more than there is."""
    slowly(monkeypatch, 0.02)
    with serving(game, limits=Limits(sessions=8)) as port, contextlib.ExitStack() as stack:
        pages = [stack.enter_context(enter(port)) for _ in range(8)]
        counts = [0] * 8

        def play(i):
            counts[i] = sum(heard["type"] == "frames" for heard in pages[i].during(1.5))

        threads = [threading.Thread(target=play, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    mean = np.mean(counts)
    assert mean > 5
    assert mean / 2 < min(counts) <= max(counts) < 2 * mean


def test_a_slow_world_answers_and_nothing_piles_up(page, monkeypatch):
    with monkeypatch.context() as patch:
        slowly(patch, 0.3)
        page.during(0.7)
    assert len(page.during(0.4)) < 1.5 * 0.4 * RATE
    slowly(monkeypatch, 0.3)
    page.until("frames")
    start = time.monotonic()
    page.say("pause", on=True)
    page.until("status", paused=True)
    assert time.monotonic() - start < 1.5
    assert not [heard for heard in page.during(0.5) if heard["type"] == "frames"]


def test_a_page_is_told_that_something_takes_long(page, monkeypatch):
    page.still()
    slowly(monkeypatch, 0.8)
    page.say("step")
    said = [page.hear() for _ in range(4)]
    assert [(heard["type"], heard.get("busy")) for heard in said] == [
        ("status", None),
        ("status", "working"),
        ("status", None),
        ("frames", None),
    ]


# ----- where to listen -----


def test_a_port_that_is_taken_names_the_next_free_one():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            listen("127.0.0.1", port)
    sentence, free = str(error.value).rsplit(" ", 1)
    assert sentence == f"port: {port} is taken; {free} is free: --port"
    assert int(free) > port
    listen("127.0.0.1", int(free)).close()


def test_the_last_port_has_no_next(monkeypatch):
    monkeypatch.setattr(servers, "_is_free", lambda *_: False)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port: {port} is taken$"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("127.0.0.1", 65536, "port: 65536 found, 0 to 65535 expected"),
        ("no such host", 0, "host: 'no such host' found, a name or an address of this machine expected"),
        ("x" * 70, 0, "host: 'xxx.*' found, a name or an address of this machine expected"),
        ("a\0b", 0, "host: .* found, a name or an address of this machine expected"),
        ("192.0.2.1", 0, "host: '192.0.2.1' found, an address of this machine expected"),
    ],
)
def test_where_it_cannot_listen_is_told(host, port, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        listen(host, port)
