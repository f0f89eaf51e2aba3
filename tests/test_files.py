"""File systems that lack something, simulated by what they answer."""

import errno
import fcntl
import importlib.util
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from dreamer4 import files
from dreamer4.config import differences
from dreamer4.data import episodes
from dreamer4.data.columns import LATENT, read_record
from dreamer4.data.episodes import EpisodeStore, Schema
from dreamer4.data.formats.h5 import open_h5
from dreamer4.data.formats.h5_export import write_h5
from dreamer4.data.toy_recordings import write_toy_recordings
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError
from dreamer4.files import check_new_file, check_writable, new_folder, publish, staging, sync
from dreamer4.train.run_folder import RunFolder
from dreamer4.world import load
from stores import add_latents, write_store


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def no_locks(request, monkeypatch):
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def folder_sync(monkeypatch):
    """A function that sets what syncing a folder answers."""
    real = os.fsync

    def answer(number: int) -> None:
        def fsync(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return answer


def test_without_locks_a_data_set_its_latent_actions_and_a_run_are_written_with_a_warning(tmp_path, no_locks, caplog):
    path = write_store(tmp_path / "store", {"a": 12})
    assert "store: its file system has no locks" in caplog.text
    assert EpisodeStore(add_latents(path)).index.frames == 12
    caplog.clear()
    with RunFolder.open(tmp_path / "run", {}) as run:
        assert run.config_path.exists()
    assert "run: its file system has no locks" in caplog.text


def test_a_lock_that_another_holds_is_no_lack_of_locks(tmp_path, monkeypatch):
    def held(*_):
        raise BlockingIOError(errno.EAGAIN, "held")

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(UserError, match="being written by another process"):
        write_store(tmp_path / "store", {"a": 2})


def test_a_system_without_locks_writes_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    spec = importlib.util.spec_from_file_location("files_elsewhere", files.__file__)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    with elsewhere.new_folder(tmp_path / "x", "a") as made:
        (made / "a").touch()
    assert "x: this system has no locks" in caplog.text
    assert (tmp_path / "x" / "a").exists()


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path):
    with new_folder(tmp_path / "x", "a") as made:
        (made / "a").touch()
        with pytest.raises(UserError, match="x is being written by another process"), new_folder(tmp_path / "x", "a"):
            pass
        assert (made / "a").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "a"]


def test_where_folders_cannot_be_synced_a_data_set_is_written_with_a_warning(tmp_path, folder_sync, caplog):
    folder_sync(errno.EINVAL)
    assert EpisodeStore(add_latents(write_store(tmp_path / "store", {"a": 12}))).index.frames == 12
    assert "cannot sync folders" in caplog.text


def test_a_disk_that_fails_is_not_taken_for_one_that_cannot_sync_folders(tmp_path, folder_sync):
    folder_sync(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
    with pytest.raises(UserError, match=r"Input/output.*no data set was made"):
        write_store(tmp_path / "store", {"a": 2})


def test_tensorstore_does_without_what_the_file_system_lacks(tmp_path, folder_sync):
    def asked() -> dict:
        context = episodes.writing_context(tmp_path)
        return {name: context[name].to_json() for name in ("file_io_locking", "file_io_sync")}

    assert asked() == {"file_io_locking": {"mode": "none"}, "file_io_sync": True}
    folder_sync(errno.EINVAL)
    assert asked()["file_io_sync"] is False


def test_without_locks_an_hdf5_file_is_read(tmp_path, monkeypatch):
    write_h5(EpisodeStore(write_store(tmp_path / "store", {"a": 12})), tmp_path / "a.h5")
    real = h5py.File

    def opened(path, mode, locking=None):
        if locking is not False:
            raise OSError(errno.ENOLCK, "unable to lock file, errno = 37, error message = 'No locks available'")
        return real(path, mode, locking=locking)

    monkeypatch.setattr(h5py, "File", opened)
    assert [recording.frames for recording in open_h5(tmp_path / "a.h5").recordings] == [12]


# ----- paths -----


@pytest.mark.parametrize("name", ["q/../z", "a[b]", "a*b?", "a%20b#c", "a:b", "ü", "link/../z"])
def test_a_data_set_is_written_and_read_under_any_name(tmp_path, monkeypatch, name):
    (tmp_path / "q" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("q/deep")
    monkeypatch.chdir(tmp_path)
    path = write_store(Path(name), {"a": 12}, noise=True)
    batch = EpisodeStore(add_latents(path)).read([0], 12)
    assert np.asarray(batch.video).any()
    assert (tmp_path / name / "index.json").exists()
    assert read_record(path) is not None
    if name.startswith("link"):  # whose parent is that of its target
        assert (tmp_path / "q" / "z" / "index.json").exists()


@pytest.mark.parametrize("name", ["a\\b", os.fsdecode(b"bad\xff")])
def test_a_name_that_arrays_cannot_have_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match="arrays cannot be kept in a folder"):
        write_store(tmp_path / name, {"a": 2})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_store(Path("~/store"), {"a": 3})
    assert (tmp_path / "store" / "index.json").exists()
    assert EpisodeStore("~/store").index.frames == 3


@pytest.mark.parametrize(
    "use",
    [load, EpisodeStore, lambda path: EpisodeWriter(path, Schema((4, 4, 3), ()), {})],
    ids=["load", "read", "write"],
)
def test_the_home_of_nobody_is_said(use):
    with pytest.raises(UserError, match=r"~nosuchuser/x: .*home directory"):
        use("~nosuchuser/x")


def test_words_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to("large")
    assert differences({"size": "small"}, {"size": "large"}) == ["size: 'small' there, 'large' asked for"]
    assert differences({"size": "./small"}, {"size": "large"}) == []


def test_a_path_is_the_same_by_any_way_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q").mkdir()
    (tmp_path / "link").symlink_to("data")
    for other in (str(tmp_path / "data" / "x"), "./data/x", "q/../data/x", "link/x", "data/x/"):
        assert differences({"data": "data/x"}, {"data": other}) == []
    assert differences({"data": "data/x"}, {"data": "data/y"}) == ["data: 'data/x' there, 'data/y' asked for"]
    assert differences({"data": None}, {"data": "data/x"}) == ["data: None there, 'data/x' asked for"]
    with RunFolder.open(tmp_path / "run", {"data": "data/x"}) as run:
        run.metrics_path.touch()  # which binds it
    with RunFolder.open(tmp_path / "run", {"data": str(tmp_path / "data" / "x")}):
        pass


# ----- places to write to -----


@pytest.mark.parametrize("name", ["link", "link/inside"])
def test_a_link_to_nothing_is_found_out_before_the_work(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    words = "link is a link to .*unmounted, which is not there"
    store = EpisodeStore(write_store(tmp_path / "store", {"a": 2}))
    with pytest.raises(UserError, match=words):
        EpisodeWriter(tmp_path / name, store.index.schema, {})
    with pytest.raises(UserError, match=words):
        write_h5(store, tmp_path / name)
    with pytest.raises(UserError, match=words), RunFolder.open(tmp_path / name, {}):
        pass
    with pytest.raises(UserError, match=words):
        write_toy_recordings(tmp_path / name, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "store"]


def test_latent_actions_behind_a_link_to_nothing_are_found_out_before_the_work(tmp_path):
    path = write_store(tmp_path / "store", {"a": 2})
    (path / LATENT).symlink_to("nowhere")
    with pytest.raises(UserError, match="latent is a link to nowhere"):
        add_latents(path)


def test_a_file_that_cannot_be_written_is_found_out_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    check_new_file(tmp_path / "new.json", "json")
    with pytest.raises(UserError, match=r"json: .*folder is a folder"):
        check_new_file(tmp_path / "folder", "json")
    with pytest.raises(UserError, match=r"json: .*nowhere/new\.json: its folder does not exist"):
        check_new_file(tmp_path / "nowhere" / "new.json", "json")


def test_what_the_system_does_not_let_write_is_found_out_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "old.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path).name != "old.json")
    with pytest.raises(UserError, match=r"json: .*old\.json cannot be written"):
        check_new_file(tmp_path / "old.json", "json")
    check_new_file(tmp_path / "new.json", "json")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"json: .*new\.json cannot be written"):
        check_new_file(tmp_path / "new.json", "json")


def test_a_folder_that_takes_nothing_is_found_out_whatever_it_says_of_itself(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())

    def refuse(dir):
        raise OSError(errno.EROFS, f"nothing in {dir.name}")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="nothing in b"):
        check_writable(tmp_path / "a" / "b")


def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    def iterdir(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"cannot write .*Permission denied; no data set was made"):
        EpisodeWriter(tmp_path, Schema((4, 4, 3), ()), {})


KEPT_BY_SYSTEMS = {"lost+found", "System Volume Information", ".Trashes"}


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """An empty folder that no folder can be renamed over, as a volume that was just mounted."""
    path = tmp_path / "volume"
    for name in KEPT_BY_SYSTEMS:
        (path / name).mkdir(parents=True)
    real = Path.rename

    def rename(self, target):
        if Path(target) == path:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    return path


def test_a_data_set_is_made_in_a_folder_that_was_just_mounted(mounted):
    write_store(mounted, {"a": 12})
    assert EpisodeStore(mounted).index.frames == 12
    assert {path.name for path in mounted.iterdir()} >= {"index.json", "video", *KEPT_BY_SYSTEMS}
    assert not (mounted / ".part").exists()
    with pytest.raises(UserError, match="already exists"):
        write_store(mounted, {"b": 2})


def test_what_fails_leaves_a_mounted_folder_empty_and_free(mounted):
    schema = Schema((4, 4, 3), ())
    with pytest.raises(UserError, match="no episode to write"), EpisodeWriter(mounted, schema, {}):
        pass
    assert {path.name for path in mounted.iterdir()} == KEPT_BY_SYSTEMS
    write_store(mounted, {"a": 2})


def test_a_publish_that_was_killed_is_said_and_can_be_mended(mounted, monkeypatch):
    real = Path.rename

    def killed(self, target):
        if self.name == "index.json":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing cleans up after a kill
        with pytest.raises(KeyboardInterrupt):
            write_store(mounted, {"a": 2})
    part = mounted / ".part"
    with pytest.raises(UserError, match=rf"interrupted, and {part} the rest: move that up into {mounted} to have"):
        write_store(mounted, {"b": 2})
    for path in part.iterdir():
        path.rename(mounted / path.name)
    assert EpisodeStore(mounted).index.frames == 2


def test_the_index_appears_last_in_a_mounted_folder(mounted, monkeypatch):
    made = staging(mounted)
    (made / "video").mkdir(parents=True)
    for name in ("a", "index.json", "z"):
        (made / name).write_text(name)
    seen = []
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (seen.append(self.name), real(self, target))[1])
    publish(made, mounted, last="index.json")
    assert seen[-1] == "index.json"
    assert sorted(seen) == ["a", "index.json", "video", "z"]
