import dataclasses
import errno
import json
import logging
import os
import re
import resource
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from orbax.checkpoint._src.serialization import tensorstore_utils

from dreamer4.errors import UserError
from dreamer4.train import checkpoint
from dreamer4.train.checkpoint import Checkpoints, adopt, find, restore_params
from dreamer4.train.manifest import read_manifest
from dreamer4.train.run_folder import RunFolder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    carry: Any


def make_state(step: int = 0, size: int = 64) -> State:
    params = {
        "encoder": {
            "kernel": jax.random.normal(jax.random.key(step), (3, size)),
            "bias": jnp.zeros(size, jnp.bfloat16),
        },
        "empty": {},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), params_mask(params)))
    opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[1]
    carry = {"scales": (jnp.float32(jnp.inf), jnp.float32(-0.0)), "nothing": None, "seen": jnp.ones(3, bool)}
    return State(jnp.int32(step), params, opt_state, None, carry)


def params_mask(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def shapes(state: State) -> State:
    return jax.eval_shape(lambda: state)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder: Path, *steps: int, psnr: dict[int, float] | None = None, keep: int = 3, best: str | None = None):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            metrics = {"eval/psnr": psnr[step]} if psnr else {}
            checkpoints.save(step, make_state(step), metrics, {"seed": step}, best)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_training_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"eval/psnr": 31.25, "train/loss": float("nan")}, {"train": {"seed": 1}})
        restored, manifest = checkpoints.restore(shapes(state))
    assert_same(restored, state)
    assert isinstance(restored, State)
    assert manifest["step"] == 7
    assert manifest["metrics"] == {"eval/psnr": 31.25, "train/loss": None}
    assert manifest["config"] == {"train": {"seed": 1}}


def test_typed_keys_come_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(3)}, {}, {})
        restored, _ = checkpoints.restore({"key": jax.random.key(0)})
    assert (jax.random.key_data(restored["key"]) == jax.random.key_data(jax.random.key(3))).all()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    expected = np.arange(1 << 20, dtype=np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            x = jnp.asarray(expected) + 0
            checkpoints.save(step, {"x": x}, {}, {})
            for _ in range(3):
                x = overwrite(x)
            x.block_until_ready()
            restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct(expected.shape, expected.dtype)}, step)
            np.testing.assert_array_equal(restored["x"], expected)


def test_leaves_are_placed_as_the_target_says(tmp_path):
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec("data"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(8.0)}, {}, {})
        restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)})
    assert restored["x"].sharding == sharding


def test_the_newest_are_kept_and_the_best(tmp_path):
    psnr = {1: 20.0, 2: 30.0, 3: 25.0, 4: 30.0, 5: float("nan")}
    save(tmp_path, *psnr, psnr=psnr, keep=2, best="eval/psnr")
    assert names(tmp_path) == {"2", "4", "5", "best"}
    assert (tmp_path / "best").read_text() == "2\n"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 5
        assert checkpoints.restore(shapes(make_state()), "best")[1]["step"] == 2


def test_lower_is_better_with_a_minus(tmp_path):
    save(tmp_path, 1, 2, 3, psnr={1: 0.3, 2: 0.1, 3: 0.2}, best="-eval/psnr")
    assert (tmp_path / "best").read_text() == "2\n"


def test_a_link_lost_to_a_kill_is_made_up_for(tmp_path):
    save(tmp_path, 1, 2, psnr={1: 20.0, 2: 30.0}, best=None)
    save(tmp_path, 3, psnr={3: 25.0}, best="eval/psnr")
    assert (tmp_path / "best").read_text() == "2\n"


def test_a_step_saved_again_is_replaced(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(9), {}, {})
        restored, _ = checkpoints.restore(shapes(make_state()))
    assert_same(restored, make_state(9))
    assert names(tmp_path) == {"1"}


def flip_a_bit(folder: Path) -> None:
    path = largest_file(folder / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = largest_file(folder / "state")
    os.truncate(path, path.stat().st_size - 1)


def empty_a_file(folder: Path) -> None:
    os.truncate(largest_file(folder / "state"), 0)


def lose_a_file(folder: Path) -> None:
    largest_file(folder / "state").unlink()


def lose_everything(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def tear_the_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    os.truncate(manifest, manifest.stat().st_size // 2)


def change_the_manifest(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 2', '"seed": 3'))


DAMAGES = [flip_a_bit, truncate, empty_a_file, lose_a_file, lose_everything, tear_the_manifest, change_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        restored, manifest = checkpoints.restore(shapes(make_state()))
    assert manifest["step"] == 1
    assert_same(restored, make_state(1))
    assert names(tmp_path) == {"1", "2.damaged"}
    assert f"{tmp_path / '2'} is damaged" in caplog.text


def test_a_damaged_best_gives_way_to_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, psnr={1: 30.0, 2: 20.0, 3: 25.0}, best="eval/psnr")
    flip_a_bit(tmp_path / "1")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(shapes(make_state()), "best")[1]["step"] == 3
        checkpoints.save(4, make_state(4), {"eval/psnr": 22.0}, {}, "eval/psnr")
    assert (tmp_path / "best").read_text() == "3\n"


def test_all_damaged_is_never_a_fresh_start(tmp_path):
    save(tmp_path, 1, 2)
    flip_a_bit(tmp_path / "1")
    truncate(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"no sound checkpoint \(2: .* bytes instead of .*; 1: .* not as it was"):
            checkpoints.restore(shapes(make_state()))
        with pytest.raises(UserError, match=r"every checkpoint is damaged \(1.damaged, 2.damaged\)"):
            checkpoints.latest()


def test_a_damaged_step_asked_for_by_number_is_not_replaced_by_another(tmp_path):
    save(tmp_path, 1, 2)
    flip_a_bit(tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="no sound checkpoint"):
            checkpoints.restore(shapes(make_state()), 2)
        with pytest.raises(UserError, match="no checkpoint of step 5"):
            checkpoints.restore(shapes(make_state()), 5)


def test_an_empty_folder_has_no_latest(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(UserError, match="no checkpoint"):
            checkpoints.restore(shapes(make_state()))


def test_what_a_crash_left_is_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "tmp.2" / "state").mkdir(parents=True)
    (tmp_path / "tmp.2" / "state" / "half").write_bytes(b"half")
    (tmp_path / "tmp.best").symlink_to("2")  # of a version that made links
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
    assert names(tmp_path) == {"1"}


# ----- which is the best, on any file system -----


PSNR = {1: 30.0, 2: 20.0, 3: 25.0}


def best_step(run: Path) -> int:
    """What a reader takes for the best."""
    found = find(run, "best")
    assert found is not None
    return found.step


@pytest.fixture(scope="module")
def with_best(tmp_path_factory):
    """A run whose best checkpoint is its first."""
    run = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "symlink", no_links)
        save(run / "checkpoints", *PSNR, psnr=PSNR, best="eval/psnr")
    return run


@pytest.fixture
def scored(with_best, tmp_path):
    return Path(shutil.copytree(with_best, tmp_path / "run"))


def no_links(*_, **__):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def as_link(best: Path) -> None:
    best.unlink()
    best.symlink_to("1")


def as_folder(best: Path) -> None:
    """As ``cp -rL``, zip and S3 make of a link."""
    best.unlink()
    shutil.copytree(best.parent / "1", best)


def test_a_file_system_without_links_takes_a_best_checkpoint(scored):
    assert (scored / "checkpoints" / "best").read_text() == "1\n"
    assert best_step(scored) == 1


@pytest.mark.parametrize("change", [as_link, as_folder])
def test_the_best_of_older_runs_and_of_copies_is_read_and_renewed(scored, change):
    checkpoints = scored / "checkpoints"
    change(checkpoints / "best")
    assert best_step(scored) == 1
    assert restore_params(scored)[1] == {"seed": 1}
    save(checkpoints, 4, psnr={4: 28.0}, keep=1, best="eval/psnr")
    assert names(checkpoints) == {"1", "4", "best"}
    assert (checkpoints / "best").read_text() == "1\n"
    assert best_step(scored) == 1
    save(checkpoints, 5, psnr={5: 31.0}, keep=1, best="eval/psnr")
    assert best_step(scored) == 5


def test_a_copied_best_that_does_not_say_its_step_is_set_aside(scored):
    checkpoints = scored / "checkpoints"
    as_folder(checkpoints / "best")
    (checkpoints / "best" / "manifest.json").write_text("{")
    shutil.rmtree(checkpoints / "1")
    state = contents(checkpoints / "best")
    save(checkpoints, 4, psnr={4: 20.0}, best="eval/psnr")
    assert contents(checkpoints / "best.damaged") == state
    assert best_step(scored) == 3


def test_a_link_stays_until_the_file_is_there(scored, monkeypatch):
    best = scored / "checkpoints" / "best"
    as_link(best)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            Checkpoints(best.parent)
    assert best.is_symlink()
    assert best_step(scored) == 1


def test_a_copy_of_the_best_alone_becomes_its_step(scored):
    checkpoints = scored / "checkpoints"
    as_folder(checkpoints / "best")
    shutil.rmtree(checkpoints / "1")
    save(checkpoints, 4, psnr={4: 20.0}, best="eval/psnr")
    assert best_step(scored) == 1


@pytest.mark.parametrize("content", ["7\n", "", "seven"])
def test_a_best_that_is_not_there_is_said(scored, caplog, content):
    (scored / "checkpoints" / "best").write_text(content)
    assert best_step(scored) == 3
    assert "best" in caplog.text
    assert "the newest is used" in caplog.text


def test_folders_that_cannot_be_synced_are_passed_over(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(shapes(make_state()))[1]["step"] == 1
    held = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert held == set(synced)  # orbax leaves it to us


def test_orbax_neither_locks_nor_syncs(tmp_path):
    save(tmp_path, 1)
    context = tensorstore_utils.get_ts_context()
    assert context["file_io_locking"].to_json() == {"mode": "none"}
    assert context["file_io_sync"].to_json() is False


def test_an_orbax_without_the_place_for_it_writes_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delattr(tensorstore_utils, "_DEFAULT_OCDBT_TS_CONTEXT")
    checkpoint._go_on_without_locks()
    monkeypatch.setitem(sys.modules, tensorstore_utils.__name__, None)
    checkpoint._go_on_without_locks()
    assert caplog.text.count("orbax locks and syncs its files") == 2


# ----- folders that arrays can be in -----


@pytest.mark.parametrize("name", ["a]b", "a%20b#c", "a:b", "ü", "a{b}", "q/../x", "link/../x"])
def test_a_run_is_kept_and_read_under_any_name(tmp_path, monkeypatch, name):
    (tmp_path / "q" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("q/deep")
    monkeypatch.chdir(tmp_path)
    save(Path(name) / "checkpoints", 1)
    params, _ = restore_params(Path(name), "latest")
    np.testing.assert_array_equal(params["encoder"]["kernel"], make_state(1).params["encoder"]["kernel"])


@pytest.mark.parametrize("name", ["a[b", "a*b", "a?b", "a\\b", "gs:", os.fsdecode(b"bad\xff")])
def test_a_name_under_which_arrays_would_be_lost_is_refused_before_the_training(tmp_path, name):
    with pytest.raises(UserError, match="cannot be kept in a folder"):
        Checkpoints(tmp_path / name / "checkpoints")
    with pytest.raises(UserError, match="cannot be kept in a folder"), RunFolder.open(tmp_path / name, {}):
        pass
    assert names(tmp_path) == set()


def test_a_checkpoint_without_the_index_of_its_arrays_is_not_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_UNWRITABLE", re.compile("nothing"))  # so that orbax does not find its own files
    run = tmp_path / "a[b]"
    with pytest.raises(UserError, match=r"step 1 could not be written \(Failed to find the array .*none before it"):
        save(run, 1)
    assert names(run) == set()


def test_a_checkpoint_that_lacks_a_part_of_an_array_is_not_sealed(tmp_path):
    save(tmp_path, 1)
    state, leaves = tmp_path / "1" / "state", read_manifest(tmp_path / "1")["leaves"]
    checkpoint._check_whole(state, leaves)
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}).result()
    del store[b"params/encoder/kernel/0.0"]
    with pytest.raises(ValueError, match="params/encoder/kernel: 0 of its 1 parts are there"):
        checkpoint._check_whole(state, leaves)


def test_another_shape_is_told_with_both_shapes(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.zeros((3, 64)), "old": jnp.zeros(2)}}, {}, {})
        target = {"params": {"w": jnp.zeros((3, 32), jnp.bfloat16), "new": jnp.zeros(2)}}
        with pytest.raises(UserError) as error:
            checkpoints.restore(target)
    assert "params/w: float32[3,64] there, bfloat16[3,32] expected" in str(error.value)
    assert "params/new: nothing there, float32[2] expected" in str(error.value)
    assert "params/old: float32[2] there, nothing expected" in str(error.value)
    assert names(tmp_path) == {"1"}


def test_a_newer_format_is_not_taken_for_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("dreamer4.train.manifest.FORMAT", 2)
    save(tmp_path, 1)
    monkeypatch.setattr("dreamer4.train.manifest.FORMAT", 1)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"written in format 2; .* reads 1"):
        checkpoints.restore(shapes(make_state()))
    assert names(tmp_path) == {"1"}


@pytest.mark.parametrize("surface", ["save", "wait", "close"])
def test_a_disk_full_in_the_manifest_surfaces_and_spares_the_last_good_one(tmp_path, monkeypatch, surface):
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", full)
        checkpoints.save(2, make_state(2), {}, {})
        with pytest.raises(UserError, match=r"step 2 could not be written .*No space left.* last good one is 1"):
            checkpoints.save(3, make_state(3), {}, {}) if surface == "save" else getattr(checkpoints, surface)()
    checkpoints.close()
    assert names(tmp_path) == {"1"}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(shapes(make_state()))[1]["step"] == 1


def test_a_failed_write_of_arrays_surfaces_without_a_traceback_and_the_next_save_works(tmp_path, caplog):
    save(tmp_path, 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        try:
            checkpoints.save(2, {"x": jax.random.normal(jax.random.key(0), (100_000,))}, {}, {})
            with pytest.raises(UserError, match=r"step 2 could not be written .*File too large"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert names(tmp_path) == {"1"}
        checkpoints.save(3, make_state(3), {}, {})
    assert names(tmp_path) == {"1", "3"}
    assert not any(record.exc_info for record in caplog.records)


def test_parameters_of_another_run_come_by_their_own_structure(tmp_path):
    folder = tmp_path / checkpoint.FOLDER
    save(folder, 1, 2, 3, psnr={1: 20.0, 2: 30.0, 3: 25.0}, best="eval/psnr")
    params, config = restore_params(tmp_path)
    assert config == {"seed": 2}
    expected = make_state(2).params
    del expected["empty"]
    assert_same(params, expected)
    assert restore_params(tmp_path, "latest", ("ema", "params"))[1] == {"seed": 3}
    with pytest.raises(UserError, match="holds carry, opt_state, params, step, but no ema"):
        restore_params(tmp_path, parts=("ema",))


def test_reading_another_run_changes_nothing_there(tmp_path):
    folder = tmp_path / checkpoint.FOLDER
    save(folder, 1, 2)
    flip_a_bit(folder / "2")
    assert restore_params(tmp_path)[1] == {"seed": 1}
    assert names(folder) == {"1", "2"}
    with pytest.raises(UserError, match="no checkpoint"):
        restore_params(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_parameters_of_a_damaged_run_end_in_a_sentence(tmp_path, damage):
    folder = tmp_path / checkpoint.FOLDER
    save(folder, 2)
    damage(folder / "2")
    for restore in (restore_params, lambda run: adopt(run, run / "copy")):
        with pytest.raises(UserError, match=r"no sound checkpoint \(2: .*\)") as error:
            restore(tmp_path)
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_its_run_drops_while_it_is_read_ends_in_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / checkpoint.FOLDER
    save(folder, 2)
    monkeypatch.setattr(checkpoint, "verify", lose_everything)
    with pytest.raises(UserError, match=r"2 is damaged: manifest.json is missing"):
        restore_params(tmp_path)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1 to 3, of which 2 is the best."""
    run = tmp_path / "tokenizer"
    save(run / checkpoint.FOLDER, 1, 2, 3, psnr={1: 20.0, 2: 30.0, 3: 25.0}, best="eval/psnr")
    (run / "config.json").write_text('{"seed": 2}')
    return run


def test_an_adopted_checkpoint_outlives_its_run(tmp_path, run):
    into = tmp_path / "dynamics" / "tokenizer"
    assert find(into) is None
    expected, config = restore_params(run)
    copy = adopt(run, into)
    assert copy.step == 2
    assert copy.digest == json.loads((run / "checkpoints" / "2" / "manifest.json").read_text())["sha256"]
    shutil.rmtree(run)
    params, copied_config = restore_params(into)
    assert_same(params, expected)
    assert copied_config == config
    assert (into / "config.json").read_text() == '{"seed": 2}'
    assert names(into) == {"checkpoints", "config.json"}
    assert names(into / "checkpoints") == {"2"}
    assert find(into) == copy
    with pytest.raises(UserError, match="tokenizer: there is no such run"):
        adopt(run, into)


def test_adopting_again_writes_nothing(tmp_path, run):
    into = tmp_path / "copy"
    copy = adopt(run, into)
    before = contents(into)
    assert adopt(run, into) == copy
    assert contents(into) == before


def test_another_checkpoint_is_not_copied_over_the_one_that_is_there(tmp_path, run):
    into = tmp_path / "copy"
    held = adopt(run, into)
    before = contents(into)
    save(run / checkpoint.FOLDER, 4, psnr={4: 35.0}, best="eval/psnr")
    found = adopt(run, tmp_path / "elsewhere")
    assert (held.step, found.step) == (2, 4)
    told = rf"step 2 \({held.digest[:12]}\).* step 4 \({found.digest[:12]}\).* another run folder or --no-resume"
    with pytest.raises(UserError, match=told):
        adopt(run, into)
    with Checkpoints(run / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(2, make_state(9), {"eval/psnr": 40.0}, {}, "eval/psnr")
    with pytest.raises(UserError, match=rf"step 2 \({held.digest[:12]}\).* step 2 \((?!{held.digest[:12]})"):
        adopt(run, into)
    assert contents(into) == before


def test_the_checkpoint_before_a_damaged_one_is_adopted(tmp_path, run, caplog):
    flip_a_bit(run / "checkpoints" / "2")
    assert adopt(run, tmp_path / "copy").step == 3
    assert f"{run / 'checkpoints' / '2'} is damaged" in caplog.text
    assert names(run / "checkpoints") == {"1", "2", "3", "best"}
    assert adopt(run, tmp_path / "first", 1).step == 1


def test_a_run_without_checkpoints_cannot_be_adopted(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run/checkpoints: no checkpoint$"):
        adopt(tmp_path / "run", tmp_path / "copy")
    assert names(tmp_path) == {"run"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_set_aside_and_made_again(tmp_path, run, damage):
    into = tmp_path / "copy"
    copy = adopt(run, into)
    damage(into / "checkpoints" / "2")
    assert find(into) is None
    assert adopt(run, into) == copy
    assert find(into) == copy
    assert names(into / "checkpoints") == {"2", "2.damaged"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full", r"copy: checkpoint 2 of .*tokenizer cannot be copied there \(No space left on device\)"),
        ("wrong", r"checkpoints/tmp.2 is damaged: state/.* has 5 bytes instead of \d+"),
    ],
)
def test_a_copy_that_fails_leaves_nothing_half(tmp_path, run, monkeypatch, fault, message):
    into, copyfile = tmp_path / "copy", shutil.copyfile

    def faulty(source: Path, target: Path) -> None:
        copyfile(source, target)
        if target.name != "manifest.json":
            if fault == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            target.write_bytes(b"wrong")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", faulty)
        with pytest.raises(UserError, match=message):
            adopt(run, into)
    assert find(into) is None
    assert names(into) == {"checkpoints"}
    assert names(into / "checkpoints") == set()
    assert adopt(run, into).step == 2


def test_a_copy_killed_before_its_rename_is_not_there(tmp_path, run, monkeypatch):
    into = tmp_path / "copy"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_rename", killed)
        patch.setattr(checkpoint, "_remove", lambda path: None)  # nothing cleans up after a kill
        with pytest.raises(KeyboardInterrupt):
            adopt(run, into)
    assert names(into / "checkpoints") == {"tmp.2"}
    assert find(into) is None
    assert adopt(run, into, 3).step == 3
    assert names(into / "checkpoints") == {"3"}


def test_the_manifest_covers_every_file(tmp_path):
    save(tmp_path, 1)
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    files = {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
