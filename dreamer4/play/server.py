"""The page's other side: it serves the page and, on a socket for each player, plays the game.

    async with a socket:  hello -> start -> (a message | a tick) ... until the page goes, idles, or breaks a rule

All of a session's work is done by threads, one for each session and one job at a time, so that sockets are answered
meanwhile and nobody waits for what another's world compiles. docs/play.md has the protocol.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import socket as sockets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import parse_qs

from dreamer4.errors import UserError
from dreamer4.play.game import Game
from dreamer4.play.guard import Guard
from dreamer4.play.messages import LONGEST, Context, Hold, K, Message, Record, Reset, Seen, read_message
from dreamer4.play.pictures import encode_frame
from dreamer4.play.session import Session, warm_up

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError:
    raise UserError("to play a world in the browser takes the extra: `uv run --extra play ...`") from None

LOG = logging.getLogger("dreamer4.play")
Result = TypeVar("Result")
Answers = list[dict[str, Any] | bytes]
"""What is said to a page, one thing after another."""

AHEAD = 3
"""Ticks that a page may be behind: a slow one gets fewer, not later ones."""
QUEUE = 2000
"""Messages that may wait, as while a program compiles."""
NEXT_PORTS = 100
GIVEN_UP = 30_000
"""Milliseconds after which the system ends a connection of which the other side takes nothing in, where it can."""
PATIENCE, PATIENCE_FOR = 0.5, 4
"""Seconds, and times of the last tick's, after which a player is told that something takes long."""
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
RULE, FULL, MISTAKE, IDLE = 1008, 1013, 1011, 4000
"""Codes with which a socket is closed; the last is the server's own."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
REFUSALS: dict[type, str] = {
    Hold: "this world has no such action",
    Reset: "it cannot begin from there",
    K: "this world does not take that K",
    Context: "it cannot begin from so many frames",
}
NOT_UNDERSTOOD = "that was not understood"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one page, and all of them, may ask of the server."""

    sessions: int = 8
    idle_seconds: float = 600.0
    """Without anything done, after which a session ends."""
    unread_seconds: float = 20.0
    """For which what is said may wait to be taken in, after which a session ends."""
    messages_per_second: float = 200.0
    """Longer ones, which are pictures, count as several, but at most as a quarter of ``burst``."""
    burst: int = 400
    mistakes: int = 20
    """Messages that are not understood, after which a session ends."""


OWN, USUAL = Guard(), Limits()


class Server:
    """A game to be served: ``app`` is the ASGI application. ``ready`` is called once it answers."""

    def __init__(
        self,
        game: Game,
        guard: Guard = OWN,
        limits: Limits = USUAL,
        ready: Callable[[], None] = lambda: None,
    ):
        self.game, self.guard, self.limits, self.ready = game, guard, limits, ready
        self.playing = 0
        self.pool = concurrent.futures.ThreadPoolExecutor(limits.sessions + 1, "player")
        self.app = Guarded(self._routes(), guard)

    def run(self, listening: sockets.socket) -> None:
        """Serves what comes to ``listening`` until it is interrupted."""
        self.make_uvicorn().run(sockets=[listening])

    def make_uvicorn(self) -> uvicorn.Server:
        """What serves ``app``, with the limits that are the transport's to keep."""
        height, width, channels = self.game.about.frame
        return uvicorn.Server(
            uvicorn.Config(
                self.app,
                ws="websockets-sansio",
                ws_max_size=max(LONGEST, height * width * channels),
                ws_per_message_deflate=False,  # a small message is not to become a huge one
                access_log=False,  # it would keep the token
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )

    def _routes(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.work(warm_up, self.game).add_done_callback(_log_failure)  # while the page is on its way
            self.ready()
            yield
            self.pool.shutdown(wait=False, cancel_futures=True)

        pages = [Route(path, _serve(data, kind)) for path, data, kind in page_files()]
        app = Starlette(routes=[*pages, WebSocketRoute("/play", self.play)], lifespan=lifespan)
        app.router.redirect_slashes = False
        return app

    def work(self, job: Callable[..., Result], *arguments: Any) -> "asyncio.Future[Result]":
        """The result of ``job``, to be done by one of the threads."""
        return asyncio.get_running_loop().run_in_executor(self.pool, job, *arguments)

    async def play(self, socket: WebSocket) -> None:
        """One player, from the first message to the last."""
        await socket.accept()  # even where it is full: a page is not told why its socket was not accepted
        if self.playing >= self.limits.sessions:
            reason = f"{self.playing} are playing here already, which is all this server takes; try again later"
            ending: Close | None = Close(FULL, reason)
        else:
            self.playing += 1
            try:
                ending = await Player(self, socket).play()
            except WebSocketDisconnect:
                ending = None
            except Exception:
                LOG.exception("a session ended by a mistake of the server's own")
                ending = Close(MISTAKE, "something went wrong; the server's log says what")
            finally:
                self.playing -= 1
        if ending is not None:
            if ending.code == RULE:
                LOG.warning("a session was ended: %s", ending.reason)
            with contextlib.suppress(WebSocketDisconnect):
                await self.send(socket.close(ending.code, ending.reason))

    async def send(self, sending: Awaitable[None]) -> None:
        """Raises WebSocketDisconnect where the page is not there to hear it, or takes nothing in."""
        try:
            async with asyncio.timeout(self.limits.unread_seconds):
                await sending
        except (TimeoutError, RuntimeError):  # RuntimeError: the transport has closed it
            raise WebSocketDisconnect(1006) from None


@dataclasses.dataclass(frozen=True)
class Close:
    """What ends a session."""

    code: int
    reason: str


class Player:
    """One page, one socket, one session."""

    def __init__(self, server: Server, socket: WebSocket):
        self.server, self.socket, self.session = server, socket, Session(server.game)
        self.inbox: asyncio.Queue[Message | bytes | UserError | None] = asyncio.Queue()
        self.sent = self.seen = 0
        self.mistakes = 0
        self.active = time.monotonic()

    async def play(self) -> Close | None:
        """Until something ends it; None where the page went."""
        reader = asyncio.create_task(self._read())
        reader.add_done_callback(lambda _: self.inbox.put_nowait(None))  # wakes the game
        try:
            return await self._game(reader)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _game(self, reader: "asyncio.Task[Close | None]") -> Close | None:
        """Messages as they come and ticks when they are due; what ends it."""
        await self._say(self.server.game.hello())
        await self._do(self._start)
        due = time.monotonic()
        while True:
            if reader.done():  # what is still in the inbox is not worth doing
                return reader.result()
            ready = self.session.due and self.sent - self.seen < AHEAD
            idle = self.active + self.server.limits.idle_seconds
            try:
                async with asyncio.timeout_at(_loop_time(min(due, idle) if ready else idle)):
                    message = await self.inbox.get()
            except TimeoutError:
                if time.monotonic() >= idle:
                    return Close(IDLE, "nothing was done for a while")
                due = max(due, time.monotonic()) + 1 / self.session.rate
                await self._do(self._tick)
                continue
            if message is None or isinstance(message, Seen):
                continue
            await self._do(self._obey, message)
            if self.mistakes >= self.server.limits.mistakes:
                return Close(RULE, "too much that was not understood")

    async def _read(self) -> Close | None:
        """Puts what the page says into the inbox, until it goes or says too much."""
        limits = self.server.limits
        allowance, last = float(limits.burst), time.monotonic()
        while True:
            received = await self.socket.receive()
            if received["type"] == "websocket.disconnect":
                return None
            picture, text = received.get("bytes"), received.get("text")
            now = time.monotonic()
            allowance = min(limits.burst, allowance + (now - last) * limits.messages_per_second)
            allowance -= min(max(1, len(picture or text or "") / LONGEST), limits.burst / 4)
            last = now
            if allowance < 0 or self.inbox.qsize() >= QUEUE:
                return Close(RULE, "too many messages at once")
            try:
                message = picture if picture is not None else read_message(text or "")
            except UserError as error:
                message = error
            if isinstance(message, Seen):  # at once: the game may be waiting for it
                self.seen = max(self.seen, min(message.tick, self.sent))
            else:
                self.active = now
            self.inbox.put_nowait(message)

    async def _do(self, job: Callable[..., Answers], *arguments: Any) -> None:
        """Has one of the threads do ``job``, and says what comes of it. What takes long is said to."""
        working = self.server.work(job, *arguments)
        try:
            patience = PATIENCE + PATIENCE_FOR * self.session.ms / 1000
            late = not (await asyncio.wait({working}, timeout=patience))[0]
            if late:
                await self._say(self.session.status() | {"busy": "working"})
            answers = await asyncio.shield(working)
            for answer in [self.session.status(), *answers] if late else answers:
                await self._say(answer)
        finally:  # of a page that went meanwhile, too: it makes room for another when its work is done
            await asyncio.wait({working})

    async def _say(self, answer: dict[str, Any] | bytes) -> None:
        if isinstance(answer, bytes):
            await self.server.send(self.socket.send_bytes(answer))
        else:
            await self.server.send(self.socket.send_text(json.dumps(answer, allow_nan=False)))

    # What follows is done by the threads, one at a time.

    def _start(self) -> Answers:
        self.session.start()
        return [self.session.status(), self._frames()]

    def _tick(self) -> Answers:
        self.session.tick()
        frames = self._frames()
        return [frames, *self._film()] if self.session.recorded_all else [frames]

    def _obey(self, message: Message | bytes | UserError) -> Answers:
        try:
            if isinstance(message, UserError):
                raise message
            if isinstance(message, bytes):
                self.session.reset_to(message)
                return [self.session.status(), self._frames()]
            if message == Record(False):
                return self._film()
            changed = self.session.obey(message)
        except UserError as error:
            self.mistakes += 1
            LOG.warning("a message was refused: %.500r", str(error))
            return [{"type": "error", "text": REFUSALS.get(type(message), NOT_UNDERSTOOD)}]
        status: Answers = [] if isinstance(message, Hold) else [self.session.status()]
        return [*status, self._frames()] if changed else status

    def _film(self) -> Answers:
        film = self.session.finish_recording()
        if film is None:
            return [self.session.status(), {"type": "error", "text": "nothing was recorded"}]
        return [self.session.status(), pack({"type": "gif"}, [(0, "gif", film, "image/gif")])]

    def _frames(self) -> bytes:
        """What is to be seen now, as a message of its own tick."""
        self.sent += 1
        shown = [(pane, what, *encode_frame(frame)) for pane, what, frame in self.session.frames()]
        status = self.session.status()
        header = {"type": "frames", "tick": self.sent, "step": self.session.now.step, "ms": round(self.session.ms, 2)}
        return pack(header | {name: status[name] for name in ("undo", "recorded")}, shown)


def pack(header: dict[str, Any], files: list[tuple[int, str, bytes, str]]) -> bytes:
    """One message: the length of the header, the header with an entry for each file, and the files."""
    images = [{"pane": pane, "what": what, "bytes": len(data), "mime": mime} for pane, what, data, mime in files]
    head = json.dumps(header | {"images": images}, allow_nan=False).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *(data for _, _, data, _ in files)])


class Guarded:
    """An application to which only what ``guard`` knows gets through, with headers that hold a page to this server."""

    def __init__(self, app: ASGIApp, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if scope["type"] == "websocket":
            tokens = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
            known = self.guard.knows_host(hosts) and self.guard.knows_origin(headers.getlist("origin"), hosts)
            if known and self.guard.knows_token(tokens):
                return await self.app(scope, receive, send)
            LOG.warning("a socket was refused: host %.200r, origin %.200r", hosts, headers.getlist("origin"))
            return await send({"type": "websocket.close", "code": RULE})  # before it is accepted: 403

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        if not self.guard.knows_host(hosts):
            LOG.warning("a request was refused: host %.200r", hosts)
            return await PlainTextResponse("This server goes by another name.", 421)(scope, receive, send_guarded)
        return await self.app(scope, receive, send_guarded)


def page_files() -> list[tuple[str, bytes, str]]:
    """The path, the bytes and the type of each file of the page; the first is served at ``/``, too."""
    folder = resources.files("dreamer4.play") / "page"
    endings = {file: file.name.rsplit(".", 1)[-1] for file in folder.iterdir() if file.is_file()}
    files = [(f"/{file.name}", file.read_bytes(), TYPES[end]) for file, end in endings.items() if end in TYPES]
    return [("/", *entry[1:]) for entry in files if entry[0] == "/index.html"] + files


def listen(host: str, port: int) -> sockets.socket:
    """A socket that listens there; any free port for 0. Raises UserError where there is no such host, where the port is
    taken, which names the next free one, and where this user may not have it."""
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    if not 0 <= port < 2**16:
        raise UserError(f"port: {port} found, 0 to 65535 expected")
    try:
        address = sockets.getaddrinfo(host, port, family, sockets.SOCK_STREAM)[0][-1]
    except (OSError, ValueError) as error:  # ValueError: what no name can be
        raise UserError(f"host: {host!r} found, a name or an address of this machine expected ({error})") from None
    try:
        listening = sockets.create_server(address, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = next((p for p in range(port + 1, min(port + NEXT_PORTS, 65536)) if _is_free(host, p, family)), None)
            hint = "" if free is None else f"; {free} is free: --port {free}"
            raise UserError(f"port: {port} is taken{hint}") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"host: {host!r} found, an address of this machine expected") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port: {port} is not this user's to take; try one above 1023") from None
        raise
    if hasattr(sockets, "TCP_USER_TIMEOUT"):  # those that are accepted there have it, too
        listening.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT, GIVEN_UP)
    return listening


def _is_free(host: str, port: int, family: int) -> bool:
    try:
        sockets.create_server((host, port), family=family).close()
    except OSError:
        return False
    return True


def _serve(data: bytes, kind: str) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        return Response(data, media_type=kind)

    return answer


def _loop_time(moment: float) -> float:
    """A time of ``time.monotonic``, in that of the running loop."""
    return asyncio.get_running_loop().time() + moment - time.monotonic()


def _log_failure(task: "asyncio.Future[Any]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        LOG.error("the world could not be started", exc_info=error)
