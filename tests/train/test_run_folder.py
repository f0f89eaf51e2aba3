import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from dreamer4.errors import UserError
from dreamer4.train.run_folder import RunFolder, write_atomically

CONFIG = {"preset": "toy", "train": {"batch_size": 8, "steps": 100, "betas": [0.9, 0.99]}}


def hold(path: Path, ready) -> None:
    with RunFolder.open(path, CONFIG):
        ready.send(os.getpid())
        signal.pause()


def begin(path: Path) -> None:
    with RunFolder.open(path, CONFIG) as run:
        run.metrics_path.touch()


def test_a_new_run_writes_its_configuration_and_goes_on_with_the_same(tmp_path):
    for _ in range(2):
        with RunFolder.open(tmp_path / "runs" / "x", CONFIG) as run:
            assert json.loads(run.config_path.read_text()) == CONFIG
            assert run.samples.is_dir()
            run.checkpoints.mkdir(exist_ok=True)
            (run.checkpoints / "100").mkdir(exist_ok=True)


def test_another_configuration_is_told_field_by_field(tmp_path):
    begin(tmp_path)
    other = {"preset": "toy", "train": {"batch_size": 16, "steps": 100, "betas": [0.9, 0.95]}}
    with pytest.raises(UserError) as error, RunFolder.open(tmp_path, other):
        pass
    assert str(tmp_path) in str(error.value)
    assert "train.batch_size: 8 there, 16" in str(error.value)
    assert "train.betas: [0.9, 0.99] there, [0.9, 0.95]" in str(error.value)
    assert "steps" not in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_a_start_that_was_refused_does_not_keep_the_next_one_out(tmp_path):
    with pytest.raises(UserError, match="muon"), RunFolder.open(tmp_path, {"optimizer": "muon"}):
        raise UserError("optimizer.name: muon found, adamw expected")
    begin(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    with pytest.raises(UserError, match="another configuration"):
        RunFolder.open(tmp_path, {"optimizer": "muon"}).__enter__()


def test_a_configuration_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="another configuration"):
        RunFolder.open(tmp_path, CONFIG).__enter__()
    assert (tmp_path / "config.json").read_text() == "{}"


def test_the_caller_says_which_fields_may_differ(tmp_path):
    begin(tmp_path)
    with RunFolder.open(tmp_path, {"preset": "debug"}, compare=lambda old, new: []):
        pass


def test_a_folder_is_claimed_once_and_a_kill_frees_it(tmp_path):
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, there), daemon=True)
    holder.start()
    pid = here.recv()
    with pytest.raises(UserError, match=f"{tmp_path}: in use by process {pid}"), RunFolder.open(tmp_path, CONFIG):
        pass
    os.kill(pid, signal.SIGKILL)
    holder.join()
    with RunFolder.open(tmp_path, CONFIG):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_claim_ends_with_the_block(tmp_path):
    with RunFolder.open(tmp_path, CONFIG), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunFolder.open(tmp_path, CONFIG).__enter__()
    with RunFolder.open(tmp_path, CONFIG):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x: a run cannot be written there"):
        RunFolder.open(tmp_path / "file" / "x", CONFIG).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written there \(Permission denied\)"):
        RunFolder.open(tmp_path, CONFIG).__enter__()


def test_a_disk_full_at_the_start_is_told(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written there \(No space left on device\)"):
            RunFolder.open(tmp_path, CONFIG).__enter__()
    with RunFolder.open(tmp_path, CONFIG) as run:
        assert json.loads(run.config_path.read_text()) == CONFIG


def test_checkpoints_without_a_configuration_are_not_taken_over(tmp_path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json"):
        RunFolder.open(tmp_path, CONFIG).__enter__()


def test_a_torn_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"preset"')
    with pytest.raises(UserError, match=r"config\.json: not a configuration in JSON"):
        RunFolder.open(tmp_path, CONFIG).__enter__()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
