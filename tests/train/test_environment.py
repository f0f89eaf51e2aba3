import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dreamer4.train import environment
from dreamer4.train.environment import describe, explain, prepare_process

PROGRAM = """
import resource
from dreamer4.train.environment import prepare_process
prepare_process()
import jax.numpy as jnp
import numpy as np
jnp.arange(3).block_until_ready()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 24, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(4)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
def test_memory_is_kept_and_small_compilations_are(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    variables |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert int(done.stdout) < 100  # 4096 pages of 4 KiB otherwise, every time
    assert any((tmp_path / "dreamer4" / "xla").iterdir())


@pytest.fixture
def config(monkeypatch):
    """What would have been set, in place of setting it for the whole test session."""
    changes = {}
    monkeypatch.setattr(environment, "_keep_freed_memory", lambda: None)
    monkeypatch.setattr(jax.config, "update", changes.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return changes


def test_a_cache_folder_named_by_the_user_is_respected(tmp_path, monkeypatch, config):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    prepare_process()
    assert config["jax_compilation_cache_dir"] == str(tmp_path / "mine")


def test_a_bucket_is_not_taken_for_a_folder(monkeypatch, config):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/cache")
    prepare_process()
    assert config["jax_compilation_cache_dir"] == "gs://bucket/cache"


def test_an_unwritable_cache_is_said_and_passed_over(tmp_path, monkeypatch, config, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    prepare_process()
    assert config == {"jax_enable_compilation_cache": False}
    assert "compilations are not kept" in caplog.text
    assert "file/dreamer4" in caplog.text


def test_the_cache_can_be_switched_off(config):
    prepare_process(compilation_cache=False)
    assert config == {"jax_enable_compilation_cache": False}


def test_the_description_names_versions_and_devices_and_no_place():
    description = describe()
    assert description["packages"]["jax"] == jax.__version__
    assert sum(description["devices"].values()) == jax.device_count()
    text = json.dumps(description)
    assert str(Path.home()) not in text
    assert str(Path(environment.__file__).parents[2]) not in text


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_told_and_whether_it_was_changed(tmp_path, monkeypatch):
    module = tmp_path / "dreamer4" / "train" / "environment.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(module))
    assert describe()["git"] is None

    module.write_text("first")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "First")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert describe()["git"] == {"commit": commit, "dirty": False}
    module.write_text("second")
    assert describe()["git"] == {"commit": commit, "dirty": True}


# ----- how jax was set up -----


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_platform_that_is_not_there_is_named(monkeypatch, error):
    def devices():
        raise error

    there = SimpleNamespace(config=SimpleNamespace(jax_platforms="cuda"), devices=devices)
    monkeypatch.setattr(environment, "jax", there)
    sentence = explain(error)
    assert sentence is not None
    assert sentence.startswith("JAX_PLATFORMS: 'cuda' found, but no such device can be used")
    assert str(error) in sentence


def error_of(call) -> Exception:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    return caught.value


def test_settings_of_jax_that_no_model_runs_under_are_named():
    with jax.numpy_rank_promotion("raise"):
        error = error_of(lambda: jnp.ones((2, 3)) + jnp.ones(3))
    assert str(explain(error)).startswith("JAX_NUMPY_RANK_PROMOTION: 'raise' found, 'allow' or 'warn' expected")
    with jax.transfer_guard("disallow"):
        error = error_of(lambda: jax.jit(lambda x: x + 1)(np.ones(3)))
    assert str(explain(error)).startswith("JAX_TRANSFER_GUARD: Disallowed host-to-device transfer")
    assert explain(ValueError("a mistake of ours")) is None


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_damaged_compilation_is_removed_and_made_anew(tmp_path, monkeypatch, kept_compilations, caplog, keep):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()

    def double(x):
        return x * 2

    def twice() -> bytes:
        jax.clear_caches()
        assert jax.jit(double)(np.float32(3)) == 6
        (entry,) = tmp_path.glob("jit_double-*-cache")
        return entry.read_bytes()

    sound, (entry,) = twice(), tmp_path.glob("jit_double-*-cache")
    (tmp_path / "jit_doubles-0-cache").write_bytes(b"another program's")
    entry.write_bytes(sound[: int(len(sound) * keep)])
    monkeypatch.setattr(environment, "_keep_freed_memory", lambda: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: others.append(str(message))
        prepare_process()
        assert abs(len(twice()) - len(sound)) < 100  # the time that it took is part of it
        warnings.warn("something else", stacklevel=1)
    assert "a damaged compilation of jit_double is removed" in caplog.text
    assert (tmp_path / "jit_doubles-0-cache").exists()
    assert others == ["something else"]
