"""Breaks the code on purpose and says which breaks no test notices: ``uv run tools/mutate.py [FLAGS]``.

``faults.toml`` lists faults: a text of a file, what takes its place, and the tests that must then fail. Each fault is
made in a copy of the tree, where only those tests run. A fault is

- caught, if one of its tests fails;
- survived, if they all pass: a test is missing;
- broken, if the tests end by an error of syntax, import or name, do not run, or do not end. Any test notices such a
  fault, so that it says nothing.

Before that the same tests must pass on a copy without a fault. The exit status is 0 if all faults are caught, 1 if not,
and 2 if the list does not fit the tree or its tests fail without a fault.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).parents[1]
CRASH = re.compile(r"\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError)\b")
MOST = 200  # letters of a reason
COLORS = {"caught": "green", "survived": "bold red", "broken": "yellow"}

Verdict = Literal["caught", "survived", "broken"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Run the faults of a list against the tests aimed at them."""

    only: tuple[str, ...] = ()
    """Names of the faults to run; all of them if absent."""
    jobs: int = 1
    """Faults tried at the same time."""
    timeout: float = 300.0
    """Seconds after which tests that do not end are stopped."""
    faults: Path = Path(__file__).with_name("faults.toml")
    """The list."""
    tree: Path = ROOT
    """The tree to copy: a git repository."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """``old``, which ``file`` holds once, becomes ``new``; one of ``tests`` (files or pytest ids) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a fault: ``detail`` is the beginning of what failed, ``seconds`` the time of its tests."""

    fault: Fault
    verdict: Verdict
    detail: str
    seconds: float


class ListError(ValueError):
    """The list of faults does not fit the tree, or its tests fail without a fault: a line for each mistake."""


def read_faults(path: Path) -> list[Fault]:
    """The faults of a TOML file of tables ``[[fault]]``. Raises ListError naming each entry that is not one."""
    try:
        entries = tomllib.loads(path.read_text()).get("fault", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ListError(f"{path}: {error}") from error
    texts = {"name", "file", "old", "new"}
    faults, mistakes = [], []
    for number, entry in enumerate(entries, 1):
        where = f"{path.name}: fault {number} ({entry.get('name', 'without a name')})"
        tests = entry.get("tests", [])
        if missing := sorted(texts - entry.keys()):
            mistakes.append(f"{where}: {', '.join(missing)} missing")
        elif unknown := sorted(entry.keys() - texts - {"tests", "note"}):
            mistakes.append(f"{where}: {', '.join(unknown)} found, only name, file, old, new, tests and note expected")
        elif not (isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests)):
            mistakes.append(f"{where}: tests: {tests!r} found, a list of one or more pytest ids expected")
        elif not all(isinstance(entry[name], str) for name in texts):
            mistakes.append(f"{where}: {', '.join(sorted(texts))} must be texts")
        else:
            faults.append(Fault(**entry | {"tests": tuple(tests)}))
    names = [fault.name for fault in faults]
    mistakes += [
        f"{path.name}: {name}: this name occurs twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if not entries:
        mistakes.append(f"{path.name}: no [[fault]] found, one or more expected")
    if mistakes:
        raise ListError("\n".join(mistakes))
    return faults


def choose(faults: list[Fault], only: tuple[str, ...]) -> list[Fault]:
    """The faults of these names, or all. Raises ListError for a name that none has."""
    unknown = sorted(set(only) - {fault.name for fault in faults})
    if unknown:
        raise ListError(f"--only: there is no fault {', '.join(unknown)}")
    return [fault for fault in faults if not only or fault.name in only]


def check(faults: list[Fault], tree: Path) -> None:
    """Raises ListError with a line for each fault that cannot be made in ``tree``, or whose test is not there."""
    mistakes = []
    for fault in faults:
        try:
            mutate(fault, tree)
        except ListError as error:
            mistakes.append(str(error))
        for test in fault.tests:
            path, *names = test.split("::")
            source = (tree / path).read_text() if (tree / path).is_file() else None
            if source is None:
                mistakes.append(f"{fault.name}: there is no test file {path}")
            elif names and not re.search(rf"^\s*def {re.escape(names[-1].split('[')[0])}\(", source, re.MULTILINE):
                mistakes.append(f"{fault.name}: {path} has no test {names[-1]}")
    if mistakes:
        raise ListError("\n".join(mistakes))


def mutate(fault: Fault, tree: Path) -> str:
    """The source of ``fault.file`` with the fault in it. Raises ListError if its text does not occur exactly once, if
    nothing changes, or if what comes out is not Python."""
    path = tree / fault.file
    if not path.is_file():
        raise ListError(f"{fault.name}: there is no file {fault.file}")
    source = path.read_text()
    if (count := source.count(fault.old)) != 1:
        raise ListError(f"{fault.name}: old text found {count} times in {fault.file}, once expected: {fault.old!r}")
    if fault.old == fault.new:
        raise ListError(f"{fault.name}: old and new text are equal")
    source = source.replace(fault.old, fault.new)
    try:
        if path.suffix == ".py":
            compile(source, fault.file, "exec")
    except SyntaxError as error:
        raise ListError(f"{fault.name}: with the new text {fault.file} is not Python: {error}") from error
    return source


def copy_tree(tree: Path, target: Path) -> None:
    """Copies what git tracks in ``tree``, and what it would on the next ``git add``, as it stands in the folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (tree / name).is_file():  # not one that was deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, target / name)


RUNNING: set[subprocess.Popen] = set()
"""The processes of tests that have not ended."""


def run_tests(copy: Path, tests: tuple[str, ...], timeout: float) -> tuple[int | None, list[str], str]:
    """Runs ``tests`` in ``copy``, in one process, up to the first failure. Returns pytest's exit status (None if time
    ran out), the messages of what failed, and the output."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        report, said = Path(folder) / "report.xml", Path(folder) / "said.txt"
        options = ["-n", "0", "-x", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # Folders of its own: several runs of pytest that tidy up the common one get in each other's way.
        options.append(f"--basetemp={Path(folder) / 'tests'}")
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *tests],
                cwd=copy,
                env=environment(copy),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that it ends with all that its tests have started
            )
        RUNNING.add(process)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None, [], ""
        finally:
            end(process)
        nodes = xml.etree.ElementTree.parse(report).iter() if report.exists() else ()
        messages = [node.get("message", "") for node in nodes if node.tag in ("failure", "error")]
        return process.returncode, messages, said.read_text(errors="replace")


def end(process: subprocess.Popen) -> None:
    """Ends tests and whatever they have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    RUNNING.discard(process)


def environment(copy: Path) -> dict[str, str]:
    """The environment in which Python imports from ``copy``, before what is installed."""
    return os.environ | {"PYTHONPATH": str(copy)}


def check_imports(faults: list[Fault], copy: Path) -> None:
    """Raises ListError unless the packages that hold the faults are imported from ``copy``."""
    tops = {Path(fault.file).parts[0] for fault in faults}
    packages = sorted(top for top in tops if (copy / top / "__init__.py").exists())
    program = "import sys, importlib.util as u; print(*(u.find_spec(n).origin for n in sys.argv[1:]), sep='\\n')"
    found = subprocess.run(
        [sys.executable, "-c", program, *packages],
        cwd=copy,
        env=environment(copy),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for package, origin in zip(packages, found, strict=True) if packages else ():
        if not Path(origin).resolve().is_relative_to(copy.resolve()):
            raise ListError(f"{package} is imported from {origin}, not from the copy in {copy}")


def passes_without(file: str, faults: list[Fault], base: Path, timeout: float) -> str | None:
    """None if the tests in ``file`` that are aimed at ``faults`` pass in ``base``; if not, a sentence with the end of
    pytest's output."""
    tests = tuple(sorted({test for fault in faults for test in fault.tests if test.split("::")[0] == file}))
    status, _, output = run_tests(base, tests, timeout)
    if status == 0:
        return None
    names = ", ".join(fault.name for fault in faults if set(fault.tests) & set(tests))
    end = "\n".join(f"    {line}" for line in output.strip().splitlines()[-12:])
    said = f"do not end in {timeout:g} s" if status is None else f"fail (pytest's exit status is {status})"
    return f"{file}: without a fault the tests of {names} {said}\n{end}"


def try_fault(fault: Fault, base: Path, timeout: float) -> Outcome:
    """Makes the fault in a copy of ``base`` and runs its tests there."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(base, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / fault.file).write_text(mutate(fault, base))
        start = time.perf_counter()
        status, messages, output = run_tests(copy, fault.tests, timeout)
        seconds = time.perf_counter() - start
    return Outcome(fault, *judge(status, messages, output, timeout), seconds)


def judge(status: int | None, messages: list[str], output: str, timeout: float) -> tuple[Verdict, str]:
    """The verdict on a run of pytest, and why: a failed test does not count if its message speaks of an error that any
    test would have met."""
    if status is None:
        return "broken", f"no end after {timeout:g} s"
    if status == 0:
        return "survived", ""
    lines = "\n".join(messages).splitlines()
    crash = next((line.strip() for line in lines if CRASH.search(line)), None)
    if status != 1 or crash or not messages:  # 1: tests were collected and some failed
        last = output.strip().splitlines()[-1:] or [f"pytest's exit status is {status}"]
        return "broken", crash or last[0]
    return "caught", " ".join(" ".join(lines).split())[:MOST]


def run(options: Options, console: Console) -> list[Outcome]:
    """Tries the faults and returns what became of each, in the order of the list. Raises ListError before any is tried
    if the list does not fit or its tests fail without a fault."""
    faults = choose(read_faults(options.faults), options.only)
    check(faults, options.tree)
    with (
        tempfile.TemporaryDirectory(prefix="mutate-") as folder,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        base = Path(folder)
        copy_tree(options.tree, base)
        check_imports(faults, base)

        def each(said, function, items):
            """``function`` of each item, ``jobs`` at once, in order."""
            task = progress.add_task(said, total=len(items))
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in concurrent.futures.as_completed(futures):
                    done = future.result()
                    progress.advance(task)
                    if isinstance(done, Outcome) and done.verdict != "caught":  # not only at the end of a long run
                        console.print(f"{done.verdict}: {done.fault.name} {done.detail}", markup=False)
            except BaseException:
                for future in futures:
                    future.cancel()
                for process in list(RUNNING):
                    end(process)
                raise
            return [future.result() for future in futures]

        files = sorted({test.split("::")[0] for fault in faults for test in fault.tests})
        failed = each("tests without a fault", lambda file: passes_without(file, faults, base, options.timeout), files)
        if any(failed):
            raise ListError("\n".join(filter(None, failed)))
        return each("faults", lambda fault: try_fault(fault, base, options.timeout), faults)


def table(outcomes: list[Outcome]) -> Table:
    """A row for each fault."""
    made = Table("fault", "file", "verdict", "s", "why", box=None)
    made.columns[0].no_wrap = True  # what --only takes
    made.columns[3].justify = "right"
    for outcome in outcomes:
        made.add_row(
            outcome.fault.name,
            outcome.fault.file,
            Text(outcome.verdict, COLORS[outcome.verdict]),
            f"{outcome.seconds:.1f}",
            Text(outcome.detail, overflow="ellipsis", no_wrap=True),
        )
    return made


def main(options: Options) -> int:
    """Runs, prints, and returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of all that clears up
    console = Console()
    start = time.perf_counter()
    try:
        outcomes = run(options, console)
    except ListError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(table(outcomes))
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in COLORS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(outcomes)} faults: {said}, in {time.perf_counter() - start:.0f} s")
    for verdict in ("broken", "survived"):
        names = [outcome.fault.name for outcome in outcomes if outcome.verdict == verdict]
        if names:
            print(f"{verdict}: {', '.join(names)}")
    return 0 if counts["caught"] == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
