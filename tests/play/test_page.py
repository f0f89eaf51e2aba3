"""The page, driven in a browser as a player drives it: a Chromium of the system's, through Playwright.

Where one of the two is missing, all of this is skipped, and the reason told; with DREAMER4_BROWSER=1 it fails instead.
"""

import base64
import contextlib
import importlib
import io
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_server import serving

from dreamer4.batch import ActionComponent
from dreamer4.dreamers import load as load_trained
from dreamer4.metrics.position import locate
from dreamer4.play import server as servers
from dreamer4.play.game import Game
from dreamer4.play.guard import Guard
from dreamer4.play.server import Limits
from dreamer4.play.session import Session
from dreamer4.rollout.predict import PredictionState
from dreamer4.world import BUNDLED, Description, World, WorldState, load

MISSING = "the page is not tested without {}; DREAMER4_BROWSER=1 makes that a failure"
DEMANDED = os.environ.get("DREAMER4_BROWSER") == "1"
if not DEMANDED:
    pytest.importorskip("playwright.sync_api", reason=MISSING.format("Playwright (uv sync --group browser)"))

from playwright.sync_api import expect  # noqa: E402

SOON = 10_000  # milliseconds in which everything that should come has come, on a busy machine, too
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
ARROWS = ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight")
AT_ONCE = "(keys) => keys.map((key) => dispatchEvent(new KeyboardEvent('keydown', key)))"
PIXELS = """(canvas) => {
  const { height, width } = canvas;
  const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  return [height, width, ...copy.getImageData(0, 0, width, height).data];
}"""
BOXES = """(found) => found.filter((e) => e.checkVisibility()).map((e) => {
  const { left, top, right, bottom } = e.getBoundingClientRect();
  return [e.id || e.ariaLabel, left, top, right, bottom];
})"""
PADS = """() => {
  const button = () => ({ pressed: false, touched: false, value: 0 });
  window.pads = [0, 1].map((index) => (
    { index, id: `pad ${index}`, connected: true, axes: [0, 0, 0, 0], buttons: Array.from({ length: 16 }, button) }));
  navigator.getGamepads = () => window.pads;
  for (const gamepad of window.pads) dispatchEvent(Object.assign(new Event("gamepadconnected"), { gamepad }));
}"""
CONTRASTS = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (context.fillStyle of colours) context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const below = (e) => (e ? [...below(e.parentElement), getComputedStyle(e).backgroundColor] : []);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => x / 255).map((x) => (x > 0.04045 ? ((x + 0.055) / 1.055) ** 2.4 : x / 12.92));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const isNumber = (e) => e.matches("input[type=number], select");
  const isTold = (e) => isNumber(e) || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll("body, body *")]
    .filter((e) => isTold(e) && e.checkVisibility() && !e.matches(":disabled"))
    .map((e) => {
      const ground = below(e);
      const [a, b] = [light(paint([...ground, getComputedStyle(e).color])), light(paint(ground))];
      return [e.id || e.className || e.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), b];
    });
}"""


# ----- a browser, a few servers, and who plays -----


@pytest.fixture(scope="module")
def scripts():
    """The scripts tour.py and play.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
        yield importlib.import_module("tour"), importlib.import_module("play")


@pytest.fixture(scope="module")
def browser(scripts):
    tour, _ = scripts
    if tour.find_chromium() is None:
        (pytest.fail if DEMANDED else pytest.skip)(MISSING.format("a Chromium on the path"))
    expect.set_options(timeout=SOON)
    with tour.browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def sessions():
    """Those of all servers here, the latest last."""
    made = []

    def make(game):
        made.append(Session(game))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "Session", make)
        yield made


@pytest.fixture(scope="module")
def known(scripts):
    """What play.py knows of the bundled world, with two real frames to begin from."""
    _, play = scripts
    return play.known_of(load_trained(BUNDLED), BUNDLED, play.Options(clips=32, context=2))


@pytest.fixture(scope="module")
def toy(known, sessions):
    """The port of the bundled world: nothing moves while nothing is held."""
    with serving(Game(load(k=1), "toy", ks=(1, 2), context=2, **known)) as port:
        yield port


class Echo(World):
    """A world that shows how many steps it is from where it began, and cares for nothing that is done in it."""

    def __init__(self, *actions, frame=(16, 16, 3)):
        object.__setattr__(self, "description", Description("next_frame", frame, actions, 1, 2, "nothing", None))

    def reset(self, frames=None, actions=None, seed=0, *, batch=None):
        frame = np.zeros(self.description.frame, np.uint8) if frames is None else np.asarray(frames)
        return WorldState(PredictionState(frame[None].astype(np.float32)), frame, True)

    def step(self, state, action):
        frame = np.asarray(state.frame + 1)
        return WorldState(state.dream, frame, True), frame


STICK = ActionComponent("stick", "continuous", 2)
JOYSTICK = ActionComponent("joystick", "categorical", 7)
NAMES = ("NOOP", "FIRE", "UP", "LEFT", "UPLEFT", "UPFIRE", "DOWNFIRE")
CODES = ("KeyF", "ArrowUp", "ArrowLeft", "ArrowUp+ArrowLeft", "ArrowUp+KeyF", "ArrowDown+KeyF")
KEYS = {code: choice for choice, code in enumerate(CODES, 1)}
PARTS = (
    ActionComponent("look", "continuous", 3),
    ActionComponent("jump", "binary", 2),
    ActionComponent("latent_0", "categorical", 4, inferred=True),
)


@pytest.fixture(scope="module")
def echo(sessions):
    """The port of a world with a stick, in which time always runs; two may play."""
    with serving(Game(Echo(STICK), "stick"), limits=Limits(sessions=2)) as port:
        yield port


class Player:
    """Somebody at a page: ``page`` is Playwright's, ``session`` what the server makes of it."""

    def __init__(self, page, sessions):
        self.page, self.body, self.said = page, page.locator("body"), []
        self.session = None
        self._sessions = sessions
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))

    def open(self, port, fragment=""):
        self.page.goto(f"http://127.0.0.1:{port}/{fragment}")
        return self

    def plays(self):
        """Waits for the first frame."""
        expect(self.body).to_have_attribute("data-tick", re.compile("[1-9]"), timeout=12 * SOON)
        self.session = self._sessions[-1]
        return self

    def find(self, selector):
        return self.page.locator(selector)

    def cap(self, key, pane=0):
        """The key of that label, as it lies on the page."""
        return self.find(f"#pad-{pane}").get_by_role("button", name=key, exact=True)

    def until(self, condition):
        """Waits until that is so at the server."""
        end = time.monotonic() + SOON / 1000
        while not condition():
            assert time.monotonic() < end, "that never came"
            self.page.wait_for_timeout(5)

    def at(self, **data):
        """Waits until the page shows these figures."""
        for name, value in data.items():
            expect(self.body).to_have_attribute(f"data-{name}", str(value).lower())

    def steps(self):
        return int(self.body.get_attribute("data-step"))

    def rests(self, milliseconds=180):
        """The number of steps once nothing moves, which must last for so long."""
        self.page.wait_for_timeout(100)
        steps = self.steps()
        self.page.wait_for_timeout(milliseconds)
        assert self.steps() == steps
        return steps

    def down(self, *keys):
        for key in keys:
            self.page.keyboard.down(key)

    def up(self, *keys):
        for key in keys:
            self.page.keyboard.up(key)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def held(self, pane=0):
        """What the server has it that is held, in plain numbers."""
        held = self.session.hands[pane].held
        return None if held is None else {name: np.round(np.float64(value), 3).tolist() for name, value in held.items()}

    def holds(self, expected, pane=0):
        self.until(lambda: len(self.session.hands) > pane and self.held(pane) == expected)

    def pixels(self, canvas="dream-0"):
        height, width, *values = self.find(f"#{canvas}").evaluate(PIXELS)
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]

    def shows(self, frame, canvas="dream-0"):
        """Waits until exactly that is seen."""
        self.until(lambda: np.array_equal(self.pixels(canvas), np.broadcast_to(frame, (*frame.shape[:2], 3))))

    def is_told(self, sentence):
        """In a toast that has just come."""
        expect(self.find(".toast").last).to_have_text(sentence)

    def begin(self, clip):
        """From that clip."""
        self.find("#clip").fill(str(clip))
        self.press("Enter")
        self.until(lambda: self.session.origin.clip == clip)
        self.at(step=0)

    def paused(self):
        """Stops time."""
        self.press("p")
        self.at(paused=True)
        return self


@pytest.fixture
def player(browser, sessions):
    """A function from the options of a context to a player in it, of whom no page may complain."""
    players, contexts = [], []

    def make(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1120, "height": 760}} | options))
        players.append(Player(contexts[-1].new_page(), sessions))
        return players[-1]

    yield make
    for context in contexts:
        context.close()
    assert [said for player in players for said in player.said] == []


@pytest.fixture
def toyer(player, toy):
    return player().open(toy).plays()


@pytest.fixture
def sticker(player, echo):
    return player().open(echo).plays()


@contextlib.contextmanager
def playing(player, *components, options=None, **known):
    """Somebody who plays a world with these actions, time standing still while nothing is held."""
    with serving(Game(Echo(*components), "echo", clock="held", rate=30.0, **known)) as port:
        yield player(**options or {}).open(port).plays()


def place(player, state, canvas="dream-0"):
    """Where the toy world's square, as it looks in ``state``, is seen: (row, column)."""
    return np.asarray(locate(player.pixels(canvas) / 255, np.asarray(state.side[0]), state.color[0], state.background))


def roomy(known):
    """A clip with room for the square to go right, and its state."""
    truth = known["starts"].truth
    states = [truth.begin(clip) for clip in range(len(known["starts"].frames))]
    room = [32 - s.position[0, 1] - s.side[0] for s in states]
    seen = [np.abs(s.color[0].astype(int) - s.background).sum() > 100 for s in states]
    clip = int(np.argmax(np.where(seen, room, 0)))
    assert room[clip] >= 20
    return clip, states[clip]


# ----- keys in, changed picture out -----


def test_a_held_key_moves_the_square(scripts, toyer, known):
    """Eight steps to the right are sixteen pixels, and nothing moves while nothing is pressed."""
    tour, _ = scripts
    clip, state = roomy(known)
    tour.set_speed(toyer.page, 10)
    toyer.begin(clip)
    toyer.shows(known["starts"].frames[clip, -1])
    assert toyer.rests() == 0
    start = place(toyer, state)
    right = toyer.cap("RIGHT")
    expect(right).to_have_attribute("aria-pressed", "false")
    toyer.down("ArrowRight")
    expect(right).to_have_attribute("aria-pressed", "true")
    expect(right).to_have_class(re.compile(r"\bdown\b"))
    expect(toyer.find("#told-0")).to_have_text("RIGHT")
    tour.wait_for_step(toyer.page, 8)
    toyer.up("ArrowRight")
    steps = toyer.rests()
    expect(right).to_have_attribute("aria-pressed", "false")
    expect(toyer.find("#told-0")).to_have_text("")
    assert 8 <= steps <= 10
    np.testing.assert_array_equal(place(toyer, state, "truth-0") - start, [0, 2 * steps])
    np.testing.assert_allclose(place(toyer, state) - start, [0, 2 * steps], atol=2)


def test_a_tap_is_one_step(scripts, player, toy):
    """Be it over before the next step is due."""
    tour, _ = scripts
    toyer = player(**PHONE).open(toy).plays()
    tour.set_speed(toyer.page, 4)
    toyer.until(lambda: toyer.session.rate == 4)
    for steps, tap in enumerate(
        (
            lambda: toyer.press("ArrowLeft"),
            lambda: toyer.press("w"),
            lambda: toyer.cap("DOWN").click(),
            lambda: toyer.cap("DOWN").tap(),
            lambda: toyer.cap("DOWN").evaluate("(cap) => cap.click()"),  # a screen reader's
            lambda: toyer.cap("DOWN").press("Enter"),
        ),
        1,
    ):
        seen = toyer.pixels("truth-0")
        tap()
        toyer.at(step=steps)
        assert not np.array_equal(toyer.pixels("truth-0"), seen)
        tour.set_speed(toyer.page, 4 if steps < 2 else 60)
    assert toyer.rests() == 6
    assert int(toyer.session.hands[0].last["action"]) == 2


def test_keys_on_the_page_are_held_by_mouse_and_by_several_thumbs(player, toy):
    toyer = player(**PHONE).open(toy).plays().paused()
    caps = [toyer.cap(name) for name in ("UP", "LEFT")]
    places = []
    for cap in caps:
        box = cap.bounding_box()
        places.append({"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2})
    toyer.page.mouse.move(**places[0])
    toyer.page.mouse.down()
    toyer.holds({"action": 1})
    expect(caps[0]).to_have_attribute("aria-pressed", "true")
    toyer.page.mouse.move(5, 5)  # it stays held wherever the mouse goes
    toyer.page.wait_for_timeout(50)
    assert toyer.held() == {"action": 1}
    toyer.page.mouse.up()
    toyer.holds(None)
    expect(caps[0]).to_have_attribute("aria-pressed", "false")
    touch = toyer.page.context.new_cdp_session(toyer.page)
    fingers = [dict(id=i, **point) for i, point in enumerate(places)]
    for kind, left, lit, action in (
        ("touchStart", fingers[:1], [True, False], {"action": 1}),
        ("touchStart", fingers, [True, True], {"action": 3}),
        ("touchEnd", fingers[1:], [True, False], {"action": 1}),
        ("touchEnd", [], [False, False], None),
    ):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": left})
        toyer.holds(action)
        for cap, on in zip(caps, lit, strict=True):
            expect(cap).to_have_attribute("aria-pressed", str(on).lower())


def test_who_looks_away_holds_nothing(sticker):
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    sticker.down("ArrowLeft")
    sticker.holds({"stick": [-1, 0]})
    sticker.page.evaluate("() => window.dispatchEvent(new Event('blur'))")
    sticker.holds(None)
    sticker.up("ArrowLeft")
    sticker.down("ArrowUp")
    sticker.holds({"stick": [0, 1]})
    sticker.page.evaluate(hide, True)
    sticker.holds(None)
    steps, seen = sticker.session.now.step, sticker.pixels()
    sticker.until(lambda: sticker.session.now.step > steps + 5)  # the world goes on; the tab draws nothing
    assert np.array_equal(sticker.pixels(), seen)
    sticker.session.paused = True
    sticker.page.wait_for_timeout(150)
    sticker.page.evaluate(hide, False)
    sticker.shows(np.asarray(sticker.session.now.panes[0].state.frame))


# ----- time -----


def test_time_stops_and_goes_on(sticker):
    """Running at first: the space bar, the button, and the key for one step, which pauses."""
    sticker.until(lambda: int(sticker.find("#figure-rate").inner_text()) >= 5)
    sticker.press(" ")
    sticker.at(paused=True)
    expect(sticker.find("#pause-text")).to_have_text("go on")
    expect(sticker.find("#said")).to_have_text("Paused")
    sticker.down("ArrowLeft")
    steps = sticker.rests()
    sticker.press(".")
    sticker.at(step=steps + 1)
    sticker.find("#step").click()
    sticker.at(step=steps + 2)
    sticker.up("ArrowLeft")
    expect(sticker.find("#figure-rate")).to_have_text("0")
    sticker.find("#pause").click()
    sticker.at(paused=False)
    sticker.until(lambda: sticker.steps() > steps + 4)
    sticker.press(" ")  # it goes to the game, not to the button that was clicked
    sticker.at(paused=True)
    steps = sticker.rests()
    sticker.press("Enter")
    sticker.at(step=steps + 1)
    assert sticker.rests() == steps + 1
    sticker.find("#pause").focus()
    sticker.press(" ")  # but to one that has the focus by Tab, as anywhere
    sticker.at(paused=False)


def test_speed_and_clock(toyer):
    assert toyer.rests() == 0
    expect(toyer.find("#clock-held")).to_be_checked()
    toyer.find("#clock-always").check()
    toyer.until(lambda: toyer.session.clock == "always" and toyer.steps() > 3)
    expect(toyer.find("#figure-ms")).to_have_text(re.compile(r"^(\d\.\d|\d\d+)$"))
    assert float(toyer.find("#figure-ms").inner_text()) > 0
    assert float(toyer.body.get_attribute("data-rate")) > 0
    toyer.press("Backspace")  # of what runs on nothing would be undone
    toyer.at(paused=True)
    toyer.press("p")
    toyer.at(paused=False)
    toyer.find("#clock-held").check()
    toyer.until(lambda: toyer.session.clock == "held")
    toyer.rests()
    toyer.find("#speed").focus()
    toyer.press("Home")
    toyer.until(lambda: toyer.session.rate == 1)
    expect(toyer.find("#speed-text")).to_have_text("1/s")
    toyer.press("End")
    toyer.until(lambda: toyer.session.rate == 60)
    expect(toyer.find("#speed-text")).to_have_text("60/s")
    assert toyer.held() is None


# ----- beginnings -----


def test_it_begins_from_clips_from_nothing_and_again(toyer, known):
    frames = known["starts"].frames
    toyer.shows(frames[0, -1])
    toyer.begin(3)
    toyer.shows(frames[3, -1])
    toyer.press("n")
    toyer.until(lambda: toyer.session.origin.clip != 3)
    another = toyer.session.origin.clip
    toyer.shows(frames[another, -1])
    expect(toyer.find("#clip")).to_have_value(str(another))
    toyer.find("#another").click()
    toyer.until(lambda: toyer.session.origin.clip != another)
    toyer.press("ArrowUp")
    toyer.at(step=1)
    toyer.press("x")
    toyer.at(step=0)
    toyer.shows(frames[toyer.session.origin.clip, -1])
    toyer.find("#context").select_option("1")
    toyer.until(lambda: toyer.session.context == 1)
    toyer.begin(5)
    toyer.shows(frames[5, -1])
    toyer.find("#nothing").click()
    toyer.until(lambda: toyer.session.origin.start == "nothing")
    toyer.shows(np.asarray(toyer.session.now.panes[0].state.frame))
    assert toyer.pixels().std() > 1
    expect(toyer.find("#truth-0")).to_be_hidden()
    expect(toyer.find("#truth")).to_be_hidden()
    for wrong in ("32", "-1", "1.5", ""):
        toyer.find("#clip").fill(wrong)
        toyer.press("Enter")
        toyer.is_told(f"clip: {wrong or 'no number'} found, a whole number from 0 to 31 expected.")
        expect(toyer.find("#clip")).to_have_value("0")
    assert toyer.session.origin.start == "nothing"


def test_the_seed_decides(toyer):
    def dream():
        toyer.at(step=0)
        toyer.press("ArrowRight")
        toyer.at(step=1)
        return toyer.pixels()

    seed = toyer.find("#seed")
    dreams = []
    for number in ("12", "13", "12"):
        seed.click()
        seed.press("Control+a")
        seed.press_sequentially(f"b{number}.r")  # which are commands anywhere else
        seed.press("ArrowUp")
        seed.fill(number)
        assert toyer.session.hands[0].held is None
        seed.press("Enter")
        toyer.until(lambda number=number: toyer.session.origin.seed == int(number))
        dreams.append(dream())
    assert np.array_equal(dreams[0], dreams[2])
    assert not np.array_equal(dreams[0], dreams[1])
    assert toyer.session.status()["panes"] == 1
    assert not toyer.session.status()["recording"]
    assert toyer.session.now.step == 1
    toyer.find("#new-seed").click()
    toyer.until(lambda: toyer.session.origin.seed != 12)
    expect(seed).to_have_value(str(toyer.session.origin.seed))
    before = toyer.session.origin.seed
    seed.fill("4294967296")
    seed.press("Enter")
    toyer.is_told("seed: 4294967296 found, a whole number from 0 to 4294967295 expected.")
    expect(seed).to_have_value(str(before))


def test_k_is_chosen_and_what_takes_long_is_said(toyer, sticker, monkeypatch):
    expect(sticker.find("#k-group")).to_be_hidden()  # where there is nothing to choose
    expect(sticker.find("#context-group")).to_be_hidden()
    expect(sticker.find("#from-data")).to_be_hidden()
    assert toyer.find("#k option").all_inner_texts() == ["1", "2"]
    toyer.find("#k").select_option("2")
    toyer.until(lambda: toyer.session.k == 2)
    step, is_compiled = Echo.step, threading.Event()
    monkeypatch.setattr(Echo, "step", lambda *told: is_compiled.wait(5) and step(*told))
    expect(sticker.find("#waking")).to_be_visible()
    expect(sticker.find("#waking-text")).to_have_text("waking the world… (working)")
    is_compiled.set()
    expect(sticker.find("#waking")).to_be_hidden()


# ----- pictures -----


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, "png")
    return out.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def choose(player, name, data, kind="image/png"):
    """Chooses that file, as the dialog of the button does."""
    player.find("#file").set_input_files({"name": name, "mimeType": kind, "buffer": data})


def drop(player, name, data, kind="image/png"):
    """Drops that file, or one of so many bytes, somewhere."""
    script = """([name, kind, data]) => {
      const carried = new DataTransfer();
      const byte = (c) => c.charCodeAt(0);
      const bytes = typeof data === "number" ? new Uint8Array(data) : Uint8Array.from(atob(data), byte);
      carried.items.add(new File([bytes], name, { type: kind }));
      return carried;
    }"""
    data = data if isinstance(data, int) else base64.b64encode(data).decode()
    carried = player.page.evaluate_handle(script, [name, kind, data])
    player.find("#stage").dispatch_event("dragover", {"dataTransfer": carried})
    expect(player.find("#drop")).to_be_visible()
    player.find("#stage").dispatch_event("drop", {"dataTransfer": carried})
    expect(player.find("#drop")).to_be_hidden()


def test_a_picture_is_begun_from(sticker, player):
    """Its middle, averaged down; exactly, where it is as large as a frame."""
    sticker.paused()
    exact = noise(16, 16, 3)
    drop(sticker, "exact.png", png(exact))
    sticker.shows(exact)
    assert sticker.session.origin.start == "picture"
    np.testing.assert_array_equal(sticker.session.origin.picture, exact)
    wide = noise(64, 200, 3)
    choose(sticker, "wide.png", png(wide))
    sticker.until(lambda: not np.array_equal(sticker.session.origin.picture, exact))
    mean = wide[:, 68:132].reshape(16, 4, 16, 4, 3).mean((1, 3))
    np.testing.assert_allclose(sticker.session.origin.picture, mean, atol=2)
    clear = np.concatenate([exact, np.zeros((16, 16, 1), np.uint8)], -1)
    choose(sticker, "clear.png", png(clear))
    sticker.shows(np.full((16, 16, 3), 255, np.uint8))  # white shines through
    sticker.press(".")
    sticker.at(step=1)
    sticker.press("x")  # again is from the picture, too
    sticker.at(step=0)
    sticker.shows(np.full((16, 16, 3), 255, np.uint8))
    with serving(Game(Echo(STICK, frame=(8, 24, 1)), "grey", clock="held")) as port:
        grey = player().open(port).plays()
        seen = noise(8, 24, 3)
        choose(grey, "colour.png", png(seen))
        grey.shows(np.asarray(Image.fromarray(seen).convert("L"))[..., None])


def test_odd_pictures_begin_something_or_are_refused_in_a_sentence(toyer):
    damaged = png(noise(64, 64, 3))
    huge = png(np.zeros((1, 9000), np.uint8))
    unreadable = "{} cannot be read as a picture: it may be damaged, or of a rare format."
    for give, name, data, kind, told in (
        (choose, "half.png", damaged[: len(damaged) // 2], "image/png", unreadable),
        (drop, "note.png", b"this is no picture", "image/png", unreadable),
        (drop, "empty.png", b"", "image/png", unreadable),
        (choose, "note.txt", b"nor is this", "text/plain", "{} is not a picture: text/plain found."),
        (drop, "<b>x</b>.zip", b"PK", "", "{} is not a picture: a file of an unknown type found."),
        (choose, "far.png", huge, "image/png", "{} is too large: 9000 x 1 pixels found, at most 8192 a side expected."),
        (drop, "big.png", 21 * 2**20, "image/png", "{} is too large: 21.0 MB found, at most 20 MB expected."),
    ):
        give(toyer, name, data, kind)
        toyer.is_told(told.format(name))
    assert toyer.find(".toast").count() == 3  # the older ones make room
    assert toyer.session.origin.start == "data"
    for shape in ((1, 1), (2, 4000), (4000, 2), (1, 8000)):
        choose(toyer, "odd.png", png(np.full((*shape, 3), [200, 100, 50])))
        toyer.shows(np.full((32, 32, 3), [200, 100, 50], np.uint8))
        toyer.press("n")
        toyer.until(lambda: toyer.session.origin.start == "data")
    choose(toyer, "odd.png", png(np.full((50, 50, 3), [0, 100, 50])))
    toyer.shows(np.full((32, 32, 3), [0, 100, 50], np.uint8))
    toyer.press("ArrowUp")
    toyer.at(step=1)


# ----- there and back -----


def test_undo_brings_every_picture_back(toyer, known):
    toyer.begin(roomy(known)[0])
    toyer.at(undo=0)
    expect(toyer.find("#undo")).to_be_disabled()
    seen = [(toyer.pixels(), toyer.pixels("truth-0"))]
    for steps in range(1, 5):
        toyer.press("ArrowDown" if steps % 2 else "ArrowRight")
        toyer.at(step=steps, undo=steps)
        seen.append((toyer.pixels(), toyer.pixels("truth-0")))
    assert not np.array_equal(seen[3][0], seen[4][0])
    expect(toyer.find("#undo-count")).to_have_text("4")
    for steps, undo in ((3, "z"), (2, "Backspace"), (1, "click"), (0, "Backspace"), (0, "Backspace")):
        toyer.find("#undo").click() if undo == "click" else toyer.press(undo)
        toyer.at(step=steps)
        toyer.shows(seen[steps][0])
        toyer.shows(seen[steps][1], "truth-0")
    expect(toyer.find("#undo")).to_be_disabled()


def test_two_futures_of_one_state(toyer, known, caplog):
    toyer.begin(roomy(known)[0])
    toyer.press("b", "b")  # the second one, too quick for the first to be answered, asks for nothing
    toyer.at(panes=2)
    expect(toyer.find("#dream-1")).to_be_visible()
    expect(toyer.find("#branch")).to_be_disabled()
    assert np.array_equal(toyer.pixels(), toyer.pixels("dream-1"))
    expect(toyer.cap("UP", 1)).to_contain_text("W")
    toyer.down("ArrowRight", "w")
    toyer.holds({"action": 4}, 0)
    toyer.holds({"action": 1}, 1)
    for pane, key, told in ((0, "RIGHT", "RIGHT"), (1, "UP", "UP")):
        expect(toyer.cap(key, pane)).to_have_attribute("aria-pressed", "true")
        expect(toyer.cap(key, 1 - pane)).to_have_attribute("aria-pressed", "false")
        expect(toyer.find(f"#told-{pane}")).to_have_text(told)
    toyer.until(lambda: toyer.steps() >= 4)
    toyer.up("ArrowRight", "w")
    toyer.rests()
    left, right = toyer.pixels(), toyer.pixels("dream-1")
    assert np.abs(left.astype(int) - right).max() > 30
    assert not np.array_equal(toyer.pixels("truth-0"), toyer.pixels("truth-1"))
    toyer.find("#keep-1").click()
    toyer.at(panes=1)
    toyer.shows(right)
    expect(toyer.find("#pane-1")).to_be_hidden()
    toyer.press("d")  # WASD play the one dream that is left
    toyer.until(lambda: toyer.session.hands[0].last == {"action": 4})
    toyer.rests()
    toyer.press("z", "z", "z")  # over the end of the branch, to before its last step
    toyer.at(panes=2)
    toyer.press("[")
    toyer.at(panes=1)
    toyer.press("ArrowLeft")
    toyer.until(lambda: toyer.session.hands[0].last == {"action": 3})
    toyer.down("ArrowUp")
    toyer.find("#branch").click()
    toyer.at(panes=2)
    toyer.holds({"action": 1}, 0)  # what is held goes on to be
    toyer.holds(None, 1)
    toyer.press("[")  # and is let go of here, for it may have been held in the other
    toyer.at(panes=1)
    toyer.holds(None, 0)
    toyer.press("[", "]")  # nothing to keep
    toyer.press("b")
    toyer.at(panes=2)
    toyer.page.evaluate(AT_ONCE, [{"key": "p"}, {"key": "]"}, {"key": "w", "code": "KeyW"}])
    toyer.holds({"action": 1})  # of the one that is kept, though the page has yet to hear of it
    toyer.at(panes=1, paused=True)
    toyer.up("w")
    toyer.holds(None)
    toyer.rests()
    assert toyer.find(".toast").count() == 0
    assert "refused" not in caplog.text  # nothing of all this was


def test_the_truth_is_beside_the_dream_or_not(toyer, player, toy):
    truth, button = toyer.find("#truth-0"), toyer.find("#truth")
    for push in (lambda: toyer.press("t"), button.click):
        expect(truth).to_be_visible()
        expect(button).to_have_attribute("aria-pressed", "true")
        push()
        expect(truth).to_be_hidden()
        expect(button).to_have_attribute("aria-pressed", "false")
        push()
    phone = player(**PHONE).open(toy).plays()
    expect(phone.find("#truth-0")).to_be_hidden()  # where there is less room, it is asked for
    phone.find("#truth").tap()
    expect(phone.find("#truth-0")).to_be_visible()


def test_a_recording_is_downloaded(toyer):
    record, count = toyer.find("#record"), toyer.find("#record-count")
    record.click()
    expect(record).to_have_attribute("aria-pressed", "true")
    for steps in range(1, 6):
        toyer.press("ArrowRight" if steps < 5 else "ArrowLeft")
        toyer.at(step=steps)
        expect(count).to_have_text(str(steps))
    with toyer.page.expect_download(timeout=SOON) as downloading:
        toyer.press("r")
    assert downloading.value.suggested_filename == "dream.gif"
    with Image.open(downloading.value.path()) as film:
        assert film.format == "GIF"
        assert film.n_frames == 5
        assert film.size[0] == 2 * film.size[1]  # the truth is beside the dream
    expect(record).to_have_attribute("aria-pressed", "false")
    expect(count).to_be_hidden()
    record.click()
    expect(record).to_have_attribute("aria-pressed", "true")
    record.click()
    toyer.is_told("nothing was recorded")


# ----- help, and what is typed -----


def test_help_is_on_a_key_and_keys_do_not_play_meanwhile(toyer):
    help = toyer.find("#help")
    toyer.down("ArrowLeft")
    toyer.holds({"action": 3})
    toyer.page.keyboard.press("?")
    expect(help).to_be_visible()
    toyer.holds(None)
    toyer.up("ArrowLeft")
    steps = toyer.rests()
    toyer.session.hands[0].last = None
    toyer.press("ArrowRight", "w", "b")
    help.get_by_text("No game runs here").click()  # what has the focus now is no part of the help
    toyer.press("ArrowRight", "w", "b", "r", ".")
    assert toyer.rests() == steps
    assert toyer.session.hands[0].last is None
    assert toyer.session.status()["panes"] == 1
    assert not toyer.session.status()["paused"]
    for said in ("Dreamer 4", "the toy world", "32 x 32", "action (5 choices)"):
        expect(toyer.find("#about")).to_contain_text(said)
    expect(toyer.find("#world-keys")).to_have_text(re.compile("↑UP.*→RIGHT"))
    expect(toyer.find("#stand-ins")).to_be_visible()
    toyer.press("Escape")
    expect(help).to_be_hidden()
    toyer.press("ArrowRight")
    toyer.at(step=steps + 1)
    for close in (toyer.find("#help-close").click, lambda: toyer.page.mouse.click(3, 3)):
        toyer.find("#help-open").click()
        expect(help).to_be_visible()
        close()
        expect(help).to_be_hidden()
    toyer.page.keyboard.press("Control+b")  # the browser's
    toyer.press("ArrowRight")
    toyer.at(step=steps + 2, panes=1)


# ----- actions of all kinds -----


def test_arrows_tilt_a_stick(sticker):
    for keys, tilt in (
        (["ArrowLeft"], [-1, 0]),
        (["ArrowUp"], [0, 1]),
        (["ArrowRight", "ArrowDown"], [1, -1]),
        (["ArrowRight", "ArrowLeft"], [-1, 0]),  # the latest
    ):
        sticker.down(*keys)
        sticker.holds({"stick": tilt})
        sticker.up(*keys)
        sticker.holds(None)
    expect(sticker.cap("x −")).to_be_visible()
    x = sticker.find("#pad-0").get_by_role("slider").nth(0)
    x.fill("0.25")
    sticker.holds({"stick": [0.25, 0]})
    expect(sticker.find("#told-0")).to_have_text("x 0.25")
    sticker.find("#pad-0").get_by_role("spinbutton").nth(1).fill("-3.5")  # beyond the slider
    sticker.holds({"stick": [0.25, -3.5]})
    sticker.press("Tab")
    sticker.find("#pad-0").get_by_role("button", name="centre").click()
    sticker.holds(None)
    sticker.find("#pad-0").get_by_role("spinbutton").nth(0).fill("1e39")  # more than the server's numbers hold
    sticker.is_told(servers.REFUSALS[servers.Hold])
    sticker.find("#pad-0").get_by_role("button", name="centre").click()
    sticker.press("ArrowLeft")
    sticker.until(lambda: sticker.session.hands[0].last["stick"].tolist() == [-1, 0])


def test_chords_make_the_choices_that_have_several_keys(player):
    """The most keys win, then the latest; a key may mean something beside others only."""
    known = {"labels": {"joystick": NAMES}, "keys": {"joystick": KEYS}}
    with playing(player, JOYSTICK, **known) as playerful:
        names = playerful.find("#pad-0 .cap").evaluate_all("(caps) => caps.map((cap) => cap.ariaLabel)")
        assert names == ["UP", "↓", "LEFT", "FIRE"]
        for keys, told in (
            (["f"], "FIRE"),
            (["ArrowUp", "f"], "UPFIRE"),
            (["f", "ArrowUp"], "UPFIRE"),
            (["ArrowUp", "ArrowLeft"], "UPLEFT"),
            (["ArrowUp", "ArrowLeft", "f"], "UPFIRE"),
            (["f", "ArrowUp", "ArrowLeft"], "UPLEFT"),
            (["ArrowLeft", "f", "ArrowUp"], "UPFIRE"),
            (["f", "ArrowLeft"], "LEFT"),
            (["ArrowDown"], "NOOP"),
            (["ArrowDown", "f"], "DOWNFIRE"),
        ):
            playerful.down(*keys)
            playerful.holds({"joystick": NAMES.index(told)})
            expect(playerful.find("#told-0")).to_have_text(told)
            lit = playerful.find("#pad-0 .cap.down").count()
            assert lit == len(keys)
            playerful.up(*keys)
            playerful.holds(None)
        playerful.page.keyboard.press("?")
        expect(playerful.find("#world-keys")).to_have_text(re.compile(r"^\s*FFIRE↑UP←LEFT↑ \+ ←UPLEFT↑ \+ FUPFIRE"))


def test_several_components_and_two_dreams_share_a_keyboard(player):
    with playing(player, *PARTS) as many:
        names = many.find("#pad-0 .part").evaluate_all("(parts) => parts.map((part) => part.ariaLabel)")
        assert names == ["look", "jump", "learnt action 0"]
        rest = {"look": [0, 0, 0], "jump": [0, 0], "latent_0": 0}
        many.down("ArrowRight", "2")
        many.holds(rest | {"look": [1, 0, 0], "jump": [0, 1]})
        many.up("ArrowRight", "2")
        many.holds(None)
        many.find("#pad-0").get_by_role("button", name="learnt action 0").click()  # 2 is its second key, then
        many.down("2")
        many.holds(rest | {"latent_0": 2})
        many.up("2")
        many.press("b")
        many.at(panes=2)
        many.down("Shift", "ArrowLeft")
        many.holds(rest | {"look": [-1, 0, 0]}, 1)
        many.up("Shift")
        many.down("ArrowUp")
        many.holds(rest | {"look": [0, 1, 0], "latent_0": 2}, 0)  # a learnt code stays as it was chosen to be
        many.up("ArrowLeft", "ArrowUp")
        many.holds(None, 0)
        many.holds(None, 1)


def test_gamepads_play(player):
    with playing(player, *PARTS) as many:
        many.page.evaluate(PADS)
        many.is_told("Gamepad connected: pad 1")
        rest = {"look": [0, 0, 0], "jump": [0, 0], "latent_0": 0}
        press = "([pad, button, pressed]) => { window.pads[pad].buttons[button].pressed = pressed; }"
        tilt = "([pad, axis, value]) => { window.pads[pad].axes[axis] = value; }"
        many.page.evaluate(tilt, [0, 0, -0.5])
        many.page.evaluate(tilt, [0, 1, -0.14])  # a stick never rests quite
        many.holds(rest | {"look": [-0.5, 0, 0]})
        expect(many.cap("x −")).to_have_attribute("aria-pressed", "true")
        many.page.evaluate(tilt, [0, 0, 0])
        many.page.evaluate(tilt, [0, 2, 0.75])  # the right stick: the third axis
        many.holds(rest | {"look": [0, 0, 0.76]})
        many.page.evaluate(tilt, [0, 2, 0])
        many.holds(None)
        many.page.evaluate(press, [0, 12, True])
        many.page.evaluate(press, [0, 0, True])
        many.holds(rest | {"look": [0, 1, 0], "jump": [1, 0]})
        many.page.evaluate(press, [0, 12, False])
        many.page.evaluate(press, [0, 0, False])
        many.holds(None)
        many.press("b")
        many.at(panes=2)
        many.page.evaluate(press, [1, 15, True])
        many.holds(rest | {"look": [1, 0, 0]}, 1)
        assert many.held(0) is None
        many.page.evaluate("() => { window.pads[1].connected = false; }")
        many.holds(None, 1)


# ----- places -----


def test_where_it_is_full_one_is_told_and_may_try_again(player, echo):
    first, second, late = player().open(echo).plays().paused(), player().open(echo).plays(), player().open(echo)
    reason = "2 are playing here already, which is all this server takes; try again later"
    for _ in range(2):
        late.at(state="closed")
        expect(late.find("#closed-reason")).to_have_text(reason)
        expect(late.find("#connect")).to_be_focused()
        late.press(" ")
        expect(late.find("#connect")).to_be_visible()
    first.page.close()
    end = time.monotonic() + SOON / 1000
    while late.body.get_attribute("data-state") != "playing":  # as soon as the server has heard of it
        assert time.monotonic() < end
        if late.find("#connect").is_visible():
            late.find("#connect").click()
        late.page.wait_for_timeout(50)
    expect(late.find("#closed")).to_be_hidden()
    late.plays()
    late.down("ArrowLeft")
    late.holds({"stick": [-1, 0]})
    steps = second.steps()
    second.until(lambda: second.steps() > steps)


def test_a_server_that_stops_says_so(player):
    with playing(player, STICK) as left:
        left.down("ArrowLeft")
        left.holds({"stick": [-1, 0]})
    left.at(state="closed")
    expect(left.find("#closed-reason")).to_have_text("The server is stopping.")
    expect(left.cap("x −")).to_have_attribute("aria-pressed", "false")
    left.press("p", "b", ".", "x", "r", "ArrowRight", "[")
    drop(left, "late.png", png(noise(16, 16, 3)))
    left.page.keyboard.press("?")
    expect(left.find("#help")).to_be_visible()  # help is there nevertheless


def test_a_token_is_taken_from_the_address(player, browser):
    with serving(Game(Echo(STICK), "secret"), Guard(token="secret/+")) as port:
        player().open(port, "#token=secret%2F%2B").plays()
        stranger = player().open(port)
        stranger.at(state="closed")
        expect(stranger.find("#closed-reason")).to_contain_text("open the page by that address")
        refused = [stranger.said.pop() for said in list(stranger.said) if "403" in said]
        assert len(refused) == 1


# ----- how it looks, and how it is told -----


def fits(player, width, height, dream):
    """Nothing is to be scrolled for, keys are large enough for thumbs, and so is the dream."""
    player.page.set_viewport_size({"width": width, "height": height})
    player.find("summary").tap()
    expect(player.find("#seed")).to_be_visible()
    assert player.page.evaluate("() => document.documentElement.scrollWidth") == width
    player.find("summary").tap()
    expect(player.find("#seed")).to_be_hidden()
    player.until(lambda: player.find("#dream-0").bounding_box()["width"] >= dream)  # it grows with the room that it has
    boxes = player.find("canvas, .cap, #bar button").evaluate_all(BOXES)
    assert len(boxes) > 10
    for name, left, top, right, bottom in boxes:
        assert 0 <= left <= right <= width, name
        assert 0 <= top <= bottom <= height, name
        assert min(right - left, bottom - top) >= 40, name


def test_on_a_phone_all_is_within_reach(player, toy, echo):
    toyer = player(**PHONE).open(toy).plays()
    fits(toyer, 740, 360, 180)
    fits(toyer, 360, 740, 280)
    toyer.find("#branch").tap()
    toyer.at(panes=2)
    fits(toyer, 360, 740, 130)
    sticker = player(**PHONE).open(echo).plays().paused()
    fits(sticker, 360, 740, 200)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_can_be_read_by_day_and_by_night(scheme, player, toy):
    toyer = player(color_scheme=scheme).open(toy).plays()
    toyer.press("b")
    toyer.at(panes=2)
    toyer.down("ArrowLeft")
    expect(toyer.find("#told-0")).to_have_text("LEFT")
    choose(toyer, "note.txt", b"", "text/plain")
    toyer.is_told(re.compile("is not a picture"))
    for _ in range(2):
        found = toyer.page.evaluate(CONTRASTS)
        assert len(found) > 30
        assert [(name, round(ratio, 2)) for name, ratio, _ in found if ratio < 4.5] == []
        ground = toyer.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        levels = [int(level) for level in re.findall(r"\d+", ground)]
        assert max(levels) < 40 if scheme == "dark" else min(levels) > 230
        toyer.page.keyboard.press("?")
    expect(toyer.find("#help")).to_be_visible()


def test_everything_has_a_name_and_a_place_in_line(toyer, player):
    tree = toyer.page.context.new_cdp_session(toyer.page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "spinbutton", "combobox", "slider", "radio", "image", "canvas", "textbox", "group"}
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node.get("role", {}).get("value") in roles
    ]
    assert len(found) > 25
    assert [role for role, name in found if not name.strip()] == []
    names = [name for _, name in found]
    assert {"Help", "UP", "LEFT", "pause", "seed", "K", "context", "speed", "New seed"} <= set(names)
    reached, last = [], None
    for _ in range(60):
        toyer.press("Tab")
        at = toyer.page.evaluate("() => [document.activeElement.id || document.activeElement.ariaLabel]")[0]
        if not at or at in reached[:1]:
            break
        if at != last:
            reached.append(at)
        last = at
    assert reached == [
        *("help-open", "UP", "DOWN", "LEFT", "RIGHT"),
        *("pause", "step", "again", "branch", "truth", "record"),
        *("data", "clip", "another", "picture", "nothing", "seed", "new-seed", "k", "context", "clock-held", "speed"),
    ]
