import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]

SUMS = """\
def add(a, b):
    return a + b


def double(x):
    return 2 * x
"""
TESTS = """\
from toy.sums import add, double


def test_add():
    assert add(2, 3) == 5


def test_double():
    assert double(0) == 0


def test_wrong():
    assert add(2, 2) == 5
"""
FAULTS = """\
[[fault]]
name = "subtracts"
file = "toy/sums.py"
old = "a + b"
new = "a - b"
tests = ["tests/test_sums.py::test_add"]

[[fault]]
name = "trebles"
file = "toy/sums.py"
old = "2 * x"
new = "3 * x"
tests = ["tests/test_sums.py::test_double"]
note = "a test that only knows 0"

[[fault]]
name = "nameless"
file = "toy/sums.py"
old = "a + b"
new = "a + c"
tests = ["tests/test_sums.py::test_add"]

[[fault]]
name = "unimportable"
file = "toy/sums.py"
old = "def add"
new = "import toy.nowhere\\n\\ndef add"
tests = ["tests/test_sums.py::test_add"]
"""


@pytest.fixture(scope="module")
def mutate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("mutate")


@pytest.fixture
def toy(mutate, tmp_path, monkeypatch):
    """A tree with a package, its tests and a list of faults, and ``run`` on another list of faults."""
    for name, text in {"toy/__init__.py": "", "toy/sums.py": SUMS, "tests/test_sums.py": TESTS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    # Other plugins take pytest seconds to load.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist")

    def run(faults=FAULTS, **options):
        (tmp_path / "faults.toml").write_text(faults)
        asked = mutate.Options(faults=tmp_path / "faults.toml", tree=tmp_path, **options)
        return mutate.run(asked, Console(file=said, width=120))

    said = io.StringIO()
    return SimpleNamespace(path=tmp_path, run=run, said=said)


def test_what_is_caught_survives_or_breaks_is_told_apart(mutate, toy):
    before = {path: path.read_bytes() for path in toy.path.rglob("*.py")}
    outcomes = toy.run(jobs=4)
    assert [(outcome.fault.name, outcome.verdict) for outcome in outcomes] == [
        ("subtracts", "caught"),
        ("trebles", "survived"),
        ("nameless", "broken"),
        ("unimportable", "broken"),
    ]
    assert outcomes[0].detail.startswith("assert -1 == 5")
    assert "NameError" in outcomes[2].detail
    assert {path: path.read_bytes() for path in toy.path.rglob("*.py")} == before
    assert "survived: trebles" in toy.said.getvalue()
    shown = io.StringIO()
    Console(file=shown, width=120).print(mutate.table(outcomes))
    assert re.search(r"^ *subtracts +toy/sums.py +caught +[\d.]+ +assert -1 == 5", shown.getvalue(), re.MULTILINE)


def test_tests_that_fail_without_a_fault_are_told_and_nothing_is_tried(mutate, toy):
    with pytest.raises(mutate.ListError, match=r"test_sums.py: without a fault the tests of subtracts fail"):
        toy.run(FAULTS.replace("::test_add", "::test_wrong"), only=("subtracts",))


def test_tests_that_do_not_end_are_stopped(mutate, toy):
    fault = mutate.Fault("sleeps", "toy/sums.py", "a + b", 'a + __import__("time").sleep(600)', ("tests/test_sums.py",))
    outcome = mutate.try_fault(fault, toy.path, timeout=2)
    assert (outcome.verdict, outcome.detail) == ("broken", "no end after 2 s")
    assert outcome.seconds < 300
    assert not mutate.RUNNING


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(("a + b", "a +  b"), "subtracts: old text found 0 times in toy/sums.py, once expected", id="none"),
        pytest.param(("a + b", "return"), "subtracts: old text found 2 times in toy/sums.py, once expected", id="two"),
        pytest.param(("a - b", "a + b"), "subtracts: old and new text are equal", id="equal"),
        pytest.param(("a - b", "a -"), "subtracts: with the new text toy/sums.py is not Python", id="syntax"),
        pytest.param(("toy/sums.py", "toy/none.py"), "subtracts: there is no file toy/none.py", id="file"),
        pytest.param(
            ("test_sums.py", "test_none.py"), "subtracts: there is no test file tests/test_none.py", id="tests"
        ),
        pytest.param(("::test_add", "::test_none"), "subtracts: tests/test_sums.py has no test test_none", id="test"),
        pytest.param(('name = "trebles"', 'name = "subtracts"'), "subtracts: this name occurs twice", id="name"),
        pytest.param(('old = "a + b"\n', ""), r"fault 1 \(subtracts\): old missing", id="missing"),
        pytest.param(("note", "remark"), r"fault 2 \(trebles\): remark found", id="unknown"),
        pytest.param(('["tests/test_sums.py::test_add"]', "[]"), r"fault 1 \(subtracts\): tests: \[\] found", id="aim"),
        pytest.param(("[[fault]]", "[[fault"), "faults.toml: ", id="toml"),
    ],
)
def test_a_list_that_does_not_fit_the_tree_is_told(mutate, toy, change, sentence):
    with pytest.raises(mutate.ListError, match=sentence):
        toy.run(FAULTS.replace(*change, 1))


def test_all_mistakes_of_a_list_are_told_at_once(mutate, toy):
    with pytest.raises(mutate.ListError) as found:
        toy.run(FAULTS.replace("a + b", "a * b"))
    assert str(found.value).count("\n") == 1
    with pytest.raises(mutate.ListError, match="--only: there is no fault adds"):
        toy.run(only=("adds", "trebles"))


def test_a_package_that_is_not_the_copys_is_told(mutate, toy, monkeypatch):
    monkeypatch.setattr(
        mutate, "environment", lambda copy: os.environ | {"PYTHONPATH": str(toy.path), "PYTHONSAFEPATH": "1"}
    )
    with pytest.raises(mutate.ListError, match=rf"toy is imported from {re.escape(str(toy.path))}/toy/__init__.py"):
        toy.run()


def test_the_exit_status_says_how_it_ended(mutate, toy, monkeypatch, capsys):
    outcomes = {"caught": 0, "survived": 1, "broken": 1}
    (toy.path / "faults.toml").write_text(FAULTS)
    fault = mutate.read_faults(toy.path / "faults.toml")[0]
    for verdict, status in outcomes.items():
        monkeypatch.setattr(mutate, "run", lambda *_, v=verdict: [mutate.Outcome(fault, v, "because", 1.0)])
        assert mutate.main(mutate.Options()) == status
        assert (f"{verdict}: subtracts" in capsys.readouterr().out.splitlines()) == bool(status)
    monkeypatch.undo()
    assert mutate.main(mutate.Options(faults=toy.path / "none.toml")) == 2


def test_the_list_fits_the_tree(mutate):
    """What an edit breaks is repaired with it: ``old`` becomes what stands there now."""
    faults = mutate.read_faults(ROOT / "tools" / "faults.toml")
    mutate.check(faults, ROOT)
    assert len(faults) >= 60


@pytest.mark.slow
def test_no_fault_survives():
    command = [sys.executable, "tools/mutate.py", "--jobs", "2", "--timeout", "900"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
