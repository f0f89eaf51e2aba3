"""Play in a headless browser: ``uv run --extra play --group browser experiments/tour.py measure`` (or ``picture``).

``measure`` starts ``play.py`` as a player does and tells how long the first frame takes, how many steps a second the
page sees, what that is after 2,000 steps, and how eight pages at once fare; ``picture`` makes the README's screenshot.
It takes a Chromium of the system's.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from dreamer4.errors import UserError
from dreamer4.files import check_new_file
from dreamer4.play.server import listen
from dreamer4.train.cli import main

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    raise UserError("a tour takes Playwright: `uv run --extra play --group browser ...`") from None

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLAY = Path(__file__).parent / "play.py"
WAIT = 120_000  # milliseconds in which a first frame must come, on the slowest machine


@dataclasses.dataclass(frozen=True)
class Measure:
    """Time, speed and fairness of the bundled world, as pages see them."""

    steps: int = 2000
    seconds: float = 10.0
    """For which several pages play at once."""
    json: Path | None = None
    """File to write the figures to, as one object."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """Two futures of the bundled world, and the truth beside them."""

    out: Path = Path("docs/play.png")
    clip: int = 44
    """The one to begin from: a large square of a clear colour, with room on all sides."""


def find_chromium() -> str | None:
    """The path of the system's Chromium; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A headless Chromium."""
    path = find_chromium()
    if path is None:
        raise UserError(f"there is no Chromium here: none of {', '.join(NAMES)} is on the path")
    with sync_playwright() as playwright:
        # Without a sandbox of its own, which a container's root may not make; it sees nothing but our own page.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextlib.contextmanager
def playing(*flags: str) -> Iterator[str]:
    """The link that ``play.py`` prints, as ``uv run --extra play experiments/play.py`` starts it, on a free port."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = ["uv", "run", "--extra", "play", str(PLAY), "--no-browser", "--port", str(port), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                if found := re.search(r"http://\S+", line):
                    yield found[0]
                    return
            raise UserError(f"play.py ended with {process.wait()} before it played")
        finally:
            process.terminate()


def ready(page: Page) -> None:
    """Waits for the first frame."""
    page.wait_for_selector("body[data-state=playing][data-tick]:not([data-tick='0'])", timeout=WAIT)


def step_of(page: Page) -> int:
    return int(page.get_attribute("body", "data-step") or 0)


def wait_for_step(page: Page, step: int) -> None:
    """Asks again and again: the page's own policy lets nobody hand it a script that waits."""
    end = time.monotonic() + WAIT / 1000
    while step_of(page) < step:
        if time.monotonic() > end:
            raise UserError(f"the page is at step {step_of(page)} after {WAIT / 1000:g} s, {step} expected")
        page.wait_for_timeout(5)


def set_speed(page: Page, rate: int) -> None:
    """As the slider does, wherever the page shows it."""
    script = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); }"
    page.locator("#speed").evaluate(script, str(rate))


def measure(options: Measure) -> None:
    """Measures and prints."""
    found: dict[str, Any] = {}
    with browsing() as browser:
        page = browser.new_page()
        start = time.perf_counter()
        with playing() as url:
            page.goto(url)
            ready(page)
            found["seconds_to_first_frame"] = time.perf_counter() - start
            found |= speed(page, options.steps)
            page.close()
            found |= crowd(browser, url, options.seconds)
    for name, value in found.items():
        print(f"{name:32} {value:.2f}" if isinstance(value, float) else f"{name:32} {value}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def speed(page: Page, steps: int) -> dict[str, Any]:
    """Steps a second in the first and in the last tenth of ``steps``, with the server's memory at both ends."""
    set_speed(page, 60)
    page.keyboard.down("ArrowLeft")
    tenth, rates, memory = steps // 10, [], []
    for _ in range(10):
        first, start = step_of(page), time.perf_counter()
        wait_for_step(page, first + tenth)
        rates.append((step_of(page) - first) / (time.perf_counter() - start))
        memory.append(server_memory())
    page.keyboard.up("ArrowLeft")
    return {
        "steps_per_s_first_tenth": rates[0],
        "steps_per_s_last_tenth": rates[-1],
        "steps_per_s_least": min(rates),
        "model_ms": float(page.get_attribute("body", "data-ms") or 0),
        "server_mb_by_tenth": memory,
    }


def server_memory() -> list[float] | float | None:
    """What the server's process holds, in MB, where /proc tells."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(PLAY) in command and b"uv" not in command:
                held = re.search(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())
                return round(int(held[1]) / 1024, 1) if held else None
    return None


def crowd(browser: Browser, url: str, seconds: float, places: int = 8) -> dict[str, Any]:
    """Steps a second of each of as many pages as there are places, and what one more is told."""
    pages = [browser.new_context().new_page() for _ in range(places)]
    for page in pages:
        page.goto(url)
        ready(page)
        page.keyboard.down("ArrowLeft")
    late = browser.new_context().new_page()
    late.goto(url)
    late.wait_for_selector("body[data-state=closed]", timeout=WAIT)
    told = late.locator("#closed-reason").inner_text()
    first, start = [step_of(page) for page in pages], time.perf_counter()
    time.sleep(seconds)
    took = time.perf_counter() - start
    rates = [round((step_of(page) - before) / took, 1) for page, before in zip(pages, first, strict=True)]
    return {f"steps_per_s_of_{places}_pages": rates, "one_more_is_told": told}


def picture(options: Picture) -> None:
    """Goes two ways from one state, keys held, and takes the picture."""
    with browsing() as browser, playing("--k", "1") as url:
        page = browser.new_page(viewport={"width": 1120, "height": 700}, color_scheme="light")
        page.goto(url)
        ready(page)
        page.locator("#clip").fill(str(options.clip))
        page.keyboard.press("Enter")
        page.keyboard.press("b")
        page.wait_for_selector("body[data-panes='2']")
        page.keyboard.down("ArrowRight")
        page.keyboard.down("w")
        wait_for_step(page, 5)
        page.screenshot(path=options.out)
    print(f"done: {options.out}")


def run(options: Measure | Picture) -> None:
    if (out := options.json if isinstance(options, Measure) else options.out) is not None:
        check_new_file(out, "json" if isinstance(options, Measure) else "out")
    measure(options) if isinstance(options, Measure) else picture(options)


if __name__ == "__main__":
    Command = Annotated[Measure, tyro.conf.subcommand("measure")] | Annotated[Picture, tyro.conf.subcommand("picture")]
    main(lambda: run(tyro.cli(Command)))
