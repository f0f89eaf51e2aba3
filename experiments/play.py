"""Play a trained world in the browser: ``uv run --extra play experiments/play.py [--run RUN] [FLAGS]``.

Without a run it is the toy world that comes with dreamer4. The page has help on ``?``.
"""

import dataclasses
import functools
import logging
import os
import re
import secrets
import socket
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tyro
from dream_clips import held_out

from dreamer4.batch import ActionSpace, Batch
from dreamer4.calibration import find_calibration, make_action_codes
from dreamer4.config import at_least, from_json
from dreamer4.data import toy
from dreamer4.data.columns import LATENT
from dreamer4.data.episodes import read_index
from dreamer4.data.toy_player import NAMES
from dreamer4.dreamers import Trained, load
from dreamer4.errors import UserError
from dreamer4.metrics.control import CALIBRATION, Calibration
from dreamer4.play.game import Game, Starts, Truth
from dreamer4.play.guard import Guard, host_name, is_local
from dreamer4.play.server import Limits, Server, listen
from dreamer4.rollout.evaluation import Horizon
from dreamer4.train.cli import main
from dreamer4.world import BUNDLED, Action, World
from dreamer4.world import load as load_world

# isort: split
import jax  # (after dreamer4, which says how much XLA prints)
import numpy as np

KEYS = {"UP": "ArrowUp", "DOWN": "ArrowDown", "LEFT": "ArrowLeft", "RIGHT": "ArrowRight", "FIRE": "KeyF"}
STICK = {"ArrowLeft": [0, -1.0], "ArrowRight": [0, 1.0], "ArrowUp": [1, 1.0], "ArrowDown": [1, -1.0]}
"""Two axes, x to the right and y upwards: the axis and the value of each key."""
IDLE_NAMES = ("NOOP",)
"""What data sets call the action that does nothing, and that may be done at any time."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Play a world that was trained here, or the bundled one."""

    run: Path | None = None
    """Run of train_dynamics.py, train_maskgit.py or train_next_frame.py, or a folder of export.py; the bundled toy
    world where none is given."""
    data: Path | None = None
    """Data set to begin from; where none is given, what the run was trained on."""
    k: int | None = None
    """Steps a frame; where none are given, as in the run."""
    context: int = 8
    """Most real frames that a dream begins from."""
    clips: int = 64
    """Held-out clips to choose from, the same at each call."""
    rate: float = 15.0
    """Steps a second, to begin with."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own asks players for a token, and so do ``names``."""
    port: int = 8000
    """0 takes any free one."""
    token: str | None = None
    """What players must bring; where none is given, one is made up at each start, if there may be strangers."""
    names: tuple[str, ...] = ()
    """Names by which players elsewhere may call this machine or its proxy, beside its addresses; any port does."""
    sessions: int = 8
    """Players at a time."""
    idle: float = 600.0
    """Seconds without anything done, after which a session ends."""
    browser: bool = True
    """Open the page."""

    def __post_init__(self) -> None:
        at_least(1, self, "context", "clips", "rate", "sessions", "idle")
        at_least(0, self, "port")
        if self.token == "":
            raise UserError("token: '' found, some letters expected")
        for name in self.names:
            if host_name(name) is None:
                raise UserError(
                    f"names: {name!r} found, a name such as world.example expected, without https:// or a path"
                )


def play(options: Options) -> None:
    """Serves the world until it is interrupted."""
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, force=True
    )
    with listen(options.host, options.port) as listening:  # first: what takes long should not be for nothing
        serve(options, listening)


def serve(options: Options, listening: socket.socket) -> None:
    """The world, to what comes to ``listening``."""
    run = options.run or BUNDLED
    trained = load(run)
    calibration = find_calibration(run, trained.config)
    world = load_world(trained, options.k, calibration=calibration)
    say_calibration(world, trained, run)
    title = "toy" if options.run is None else options.run.name
    ks, known = choices_of_k(world), known_of(trained, run, options, calibration)
    game = Game(world, title, ks=ks, rate=options.rate, context=options.context, **known)
    # Under other names strangers come in through a proxy, wherever this listens.
    is_alone = is_local(options.host) and not options.names
    token = options.token or (None if is_alone else secrets.token_urlsafe(16))
    url = address(options, listening.getsockname()[1], token)
    guard = Guard((*filter(None, map(host_name, options.names)), socket.gethostname().lower()), token)
    limits = Limits(sessions=options.sessions, idle_seconds=options.idle)

    def ready() -> None:
        if not is_alone:
            where = options.names[0] if options.names else options.host
            print(
                f"warning: whoever reaches {where} and has this link can play; nothing is encrypted here",
                file=sys.stderr,
            )
        print(f"playing {world.describe().kind} ({run if options.run else 'the bundled world'}): {url}", flush=True)
        if options.browser and has_display():
            webbrowser.open(url)

    Server(game, guard, limits, ready).run(listening)


def address(options: Options, port: int, token: str | None) -> str:
    """The link to the page. The token stands behind a #, so that browsers keep it to themselves."""
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(options.host, options.host)
    fragment = "" if token is None else f"#token={quote(token, safe='')}"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{fragment}"


def has_display() -> bool:
    """Whether a browser could be seen: one that takes over the terminal is not meant."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(x) for x in ("DISPLAY", "WAYLAND_DISPLAY"))


def say_calibration(world: World, trained: Trained, run: Path) -> None:
    """How well a world that was trained on latent actions takes real ones or, where it does not, how to make it."""
    about = world.describe()
    if about.calibration is not None:
        print(f"{run / CALIBRATION}: {about.calibration}", flush=True)
    elif any(c.inferred for c in about.actions):
        data = trained.config["data"]
        told = " that says what actions it is for" if (run / CALIBRATION).exists() else ""
        print(
            f"there is no {run / CALIBRATION}{told}, so that latent codes are played, not real"
            f" actions: for one run extract_latent_actions.py again, with the same --model and --data {data}, and copy"
            f" {Path(data) / LATENT / CALIBRATION} there",
            file=sys.stderr,
        )


def known_of(trained: Trained, run: Path, options: Options, calibration: Calibration | None = None) -> dict[str, Any]:
    """What is known of a run's world beside its model: where it may begin, its truth, names and keys of its actions,
    and what is done while no key is held. Where nothing can be, time stands still meanwhile. With a ``calibration`` the
    actions are its real ones."""
    space, data = trained.model.actions, options.data or trained.config["data"]
    is_toy = data is None
    if calibration is not None:
        space, names = make_action_codes(calibration, space).real, calibration.names
    else:
        names = {toy.ACTIONS[0].name: NAMES} if data is None else names_of_actions(run, data)
    names = {c.name: names[c.name] for c in space if len(names.get(c.name, ())) == c.size}
    rest = neutral(space, names)
    known = {
        "labels": names if calibration is None else names | mark_unseen(calibration, space, names),
        "keys": keys_of(space, names),
        "neutral": rest,
        "clock": "held" if rest is None else "always",
    }
    try:
        clips = clips_of(trained, run, options)
    except UserError as error:
        print(f"there are no real frames to begin from: {error}", file=sys.stderr)
        return known
    context = slice(None, options.context)
    # Of these the codes themselves are known, even where a calibration stands between them and the player.
    actions = {c.name: np.asarray(clips.action[c.name])[:, context] for c in trained.model.actions}
    truth = toy_truth(from_json(toy.ToyConfig, trained.config["toy"], f"{run}: toy"), clips) if is_toy else None
    return known | {"starts": Starts(np.asarray(clips.video)[:, context], actions, truth)}


def mark_unseen(
    calibration: Calibration, space: ActionSpace, names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """What the choices are called of which some were never seen, and so have no code of their own."""
    if len(space) != 1 or space[0].kind != "categorical":
        return {}
    (c,) = space
    seen = calibration.actions.max(axis=0) > 0.5
    called = names.get(c.name, tuple(map(str, range(c.size))))
    marked = tuple(name if known else f"{name} (never seen)" for name, known in zip(called, seen, strict=True))
    return {} if seen.all() else {c.name: marked}


def clips_of(trained: Trained, run: Path, options: Options) -> Batch:
    """As many as are asked for or, where there are not so many, half of that, and so on."""
    count = options.clips
    while True:
        try:
            return held_out(trained, run, options.data, "validation", count, Horizon(options.context, 1))
        except UserError:
            if count == 1:
                raise
            count //= 2


def toy_truth(config: toy.ToyConfig, clips: Batch) -> Truth:
    """The toy world itself, from where its clips end."""
    step = jax.jit(functools.partial(toy.step, config))
    (component,) = toy.ACTIONS

    def begin(clip: int) -> toy.ToyState:
        return toy.ToyState(**{name: x[clip, -2] for name, x in clips.state.items()})  # the last frame is not shown

    def follow(state: toy.ToyState, action: Action | None) -> tuple[toy.ToyState, np.ndarray]:
        state, frame, _ = step(state, toy.STAND if action is None else action[component.name])
        return state, np.asarray(frame)

    return Truth(begin, follow)


def names_of_actions(run: Path, data: str | Path) -> Mapping[str, tuple[str, ...]]:
    """What the data set calls the choices of its actions; nothing where it is not there."""
    made = run / "data"  # of a recording, which the run was trained on
    try:
        return read_index(made if made.exists() else Path(data)).schema.action_names
    except UserError:
        return {}


def neutral(space: ActionSpace, names: Mapping[str, tuple[str, ...]]) -> Action | None:
    """What does nothing and may be done at any time: no switch, and of the choices the one that is called so. None
    where a component has no such thing."""
    rest: Action = {}
    for c in space:
        idle = [i for i, name in enumerate(names.get(c.name, ())) if name in IDLE_NAMES]
        if c.kind == "continuous" or (c.kind == "categorical" and not idle):
            return None
        rest[c.name] = np.asarray(idle[0] if idle else np.zeros(c.shape), c.dtype)
    return rest


def keys_of(space: ActionSpace, names: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """The keys of each component for which there are better ones than the page's own: arrows for what is called up,
    or for two axes."""
    keys: dict[str, dict[str, Any]] = {}
    for c in space:
        chords = {chord(name): i for i, name in enumerate(names.get(c.name, ()))}
        if found := {keys: i for keys, i in chords.items() if keys}:
            keys[c.name] = found
        elif c.kind == "continuous" and c.size == 2:
            keys[c.name] = STICK
    return keys


def chord(name: str) -> str:
    """The keys for an action with a name such as ``UPFIRE``, held together: ``ArrowUp+KeyF``; nothing for others."""
    if not re.fullmatch(f"({'|'.join(KEYS)})+", name):
        return ""
    return "+".join(KEYS[word] for word in re.findall("|".join(KEYS), name))


def choices_of_k(world: World) -> tuple[int, ...]:
    """Steps a frame that the model can take: powers of two, and its own."""
    own, choices = world.describe().k, []
    for k in sorted({1, 2, 4, 8, 16, 32, 64, own} - {None}):
        try:
            world.with_k(k)
            choices.append(k)
        except UserError:
            continue
    return tuple(choices)


if __name__ == "__main__":
    main(lambda: play(tyro.cli(Options)))
