"""The house rules that no tool of ours checks: what stands where, and what must stand nowhere."""

import ast
import importlib.machinery
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("dreamer4/**/*.py"), *ROOT.glob("experiments/**/*.py")])


def repository_files():
    """What git tracks, and what it would on the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def imported(source):
    """The names in a source file's imports; ``from a import b`` gives both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(files):
    return sorted(str(file.relative_to(ROOT)) for file in files)


def test_no_grab_bag_modules():
    grab_bag = re.compile(r"(utils?|helpers?|misc|common)\.py")
    assert relative(source for source in repository_files() if grab_bag.fullmatch(source.name)) == []


def test_every_folder_of_the_package_is_one():
    """import-linter does not see a folder without __init__.py: its contracts would hold by saying nothing."""
    folders = {source.parent for source in ROOT.glob("dreamer4/**/*.py")}
    assert relative(folder for folder in folders if not (folder / "__init__.py").exists()) == []


def test_linen_stays_in_nn_and_models():
    users = [s for s in SOURCES if any(re.match(r"flax\.linen\b", name) for name in imported(s))]
    assert [user for user in relative(users) if not user.startswith(("dreamer4/nn/", "dreamer4/models/"))] == []


def test_nothing_unpickles():
    """A pickle runs code as it loads. perceptual.py alone reads one, through an unpickler that admits arrays only."""
    picklers = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    users = [source for source in SOURCES if picklers & {name.split(".")[0] for name in imported(source)}]
    assert set(relative(users)) <= {"dreamer4/nn/perceptual.py"}
    allowing = re.compile(r"allow_pickle\s*=\s*(?!False\b)")
    assert relative(source for source in SOURCES if allowing.search(source.read_text())) == []


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"https?://\S+?(\.whl|\.tar\.gz|\.tgz|\.deb|/simple/?)([\s\"'#]|$)", id="download"),
        pytest.param(r"\b(pypi|pythonhosted|npmjs)\.(org|com|io)\b", id="registry"),
        pytest.param(r"(^|[^\w.])/(work|farm|root|home|Users)/", id="machine path"),
    ],
)
def test_no_file_names_a_registry_or_a_machine(pattern):
    """uv's lock and exports can carry the registry that they were made with; it is another one elsewhere."""
    found = []
    for file in repository_files():
        text = file.read_bytes().decode(errors="ignore")
        found += [f"{file.relative_to(ROOT)}: {match.group()}" for match in re.finditer(pattern, text, re.MULTILINE)]
    assert found == []


def test_the_lock_is_not_committed():
    assert ROOT / "uv.lock" not in repository_files()


@pytest.mark.parametrize("command", ["uv run experiments/train_tokenizer.py", "uv run pytest"])
def test_readme_holds_the_first_commands_alone_on_a_line(command):
    assert command in (ROOT / "README.md").read_text().splitlines()


@pytest.fixture(scope="module")
def pins():
    """The script .ci/pins, as a module."""
    loader = importlib.machinery.SourceFileLoader("pins", str(ROOT / ".ci" / "pins"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("pins", loader))
    loader.exec_module(module)
    return module


def test_constraints_and_requirements_pin_the_same_versions(pins):
    project = (ROOT / "pyproject.toml").read_text()
    files = {file.name: file.read_text() for file in ROOT.glob("requirements/*.txt")}
    assert pins.differences(project, files, files) == []
    asked = tomllib.loads(project)
    named = {*asked["project"]["optional-dependencies"], *asked["dependency-groups"], "base"}
    assert files.keys() == {f"{name}.txt" for name in named}


OLD = "-r base.txt\na==1 ; python_full_version < '3.12' \\\n    --hash=sha256:00\nb==2 \\\n    --hash=sha256:01\n"


def test_pins_keep_the_markers_that_choose_a_version(pins):
    new = "a==3 ; python_full_version >= '3.12' \\\n    --hash=sha256:02\nb==2 ; sys_platform == 'win32'\n"
    markers = ["a==1 ; python_full_version < '3.12'", "a==3 ; python_full_version >= '3.12'", "b==2"]
    assert pins.pins(OLD, new) == markers


@pytest.mark.parametrize(
    ("fresh", "complaint"),
    [
        pytest.param(OLD, None, id="the same"),
        pytest.param(OLD.replace("00", "00 --hash=sha256:09"), None, id="a wheel more"),
        pytest.param(OLD.replace("00", "09"), "other hashes of a==1", id="another hash"),
        pytest.param(OLD.replace("b==2", "b==3"), "lacks b==3", id="another version"),
        pytest.param(OLD + "c==1 \\\n    --hash=sha256:03\n", "lacks c==1", id="a package more"),
    ],
)
def test_pins_tell_a_change_from_a_release_that_gained_a_wheel(pins, fresh, complaint):
    project = pins.with_pins(
        "[tool.uv]\nconstraint-dependencies = [\n]\nbuild-constraint-dependencies = [\n]\n",
        {"constraint-dependencies": pins.pins(OLD), "build-constraint-dependencies": []},
    )
    found = pins.differences(project, {"base.txt": OLD, "build.txt": ""}, {"base.txt": fresh, "build.txt": ""})
    assert any(complaint in line for line in found) if complaint else found == []


@pytest.mark.parametrize("script", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.stem)
def test_experiments_import_dreamer4_before_jax(script):
    """It sets what jax reads when it is first imported."""
    lines = script.read_text().splitlines()
    # (The names of jaxtyping that are jax's own import it.)
    jax = [
        i for i, line in enumerate(lines) if re.match(r"import jax|from jax\.|from jaxtyping .*(Array|PyTree)", line)
    ]
    ours = [i for i, line in enumerate(lines) if line.startswith("from dreamer4")]
    assert not jax or ours[0] < jax[0]
