import dataclasses
import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from rich.console import Console

from dreamer4.errors import UserError
from dreamer4.train import cli, environment
from dreamer4.train.cli import RunOptions, choose_preset, main, open_run, open_sinks, results_folder
from dreamer4.train.fit import Stopped
from dreamer4.train.logging import Progress
from dreamer4.train.run_folder import RunFolder, set_aside


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    run: Annotated[RunOptions, tyro.conf.OmitArgPrefixes] = RunOptions(Path("runs/x"))
    train: TrainConfig = TrainConfig()


PRESETS = {
    "toy": ("the toy world", Config()),
    "atari": ("frames", Config(RunOptions(Path("runs/atari")), TrainConfig(steps=5000))),
}


def test_no_arguments_are_the_default_preset(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert choose_preset(PRESETS) == PRESETS["toy"][1]


def test_flags_change_the_preset_they_follow():
    config = choose_preset(PRESETS, ["atari", "--train.batch-size", "2", "--run-dir", "runs/y", "--no-resume"])
    assert config == Config(RunOptions(Path("runs/y"), resume=False), TrainConfig(steps=5000, batch_size=2))
    assert choose_preset(PRESETS, ["--train.steps", "7"]).train.steps == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["atarii"], "preset: 'atarii' found; did you mean atari?"), (["zzz"], "'zzz' found; there are toy, atari")],
)
def test_an_unknown_preset_is_named(arguments, sentence):
    with pytest.raises(UserError) as error:
        choose_preset(PRESETS, arguments)
    assert sentence in str(error.value)


def test_a_preset_after_the_flags_is_named():
    with pytest.raises(UserError, match="'atari' found after the flags; the preset comes first"):
        choose_preset(PRESETS, ["--train.steps", "3", "atari"])


def test_an_unknown_flag_ends_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as end:
        choose_preset(PRESETS, ["toy", "--train.step", "3"])
    assert end.value.code == 2
    assert "--train.step" in capsys.readouterr().err.replace("--train.steps", "")
    with pytest.raises(SystemExit):
        choose_preset(PRESETS, ["--train.batchsize", "3"])
    assert "--train.batch-size" in capsys.readouterr().err


def test_a_value_of_the_wrong_kind_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        choose_preset(PRESETS, ["toy", "--train.steps", "many"])
    assert end.value.code == 2
    assert "many" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["toy", "--help"]])
def test_help_is_there(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        choose_preset(PRESETS, arguments)
    assert end.value.code == 0
    assert ("atari" if arguments[0] != "toy" else "--train.steps") in capsys.readouterr().out


FULL = "error: metrics.jsonl: No space left on device; what was saved stays\n"


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("data: there is no x"), 2, "error: data: there is no x\n"),
        (OSError(28, "No space left on device", "metrics.jsonl"), 2, FULL),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Stopped(signal.SIGTERM, 7), 143, "stopped by SIGTERM; step 7 is saved, the same command goes on\n"),
        (Stopped(signal.SIGINT, 7), 130, "stopped by SIGINT; step 7 is saved, the same command goes on\n"),
    ],
)
def test_an_end_is_a_sentence_and_a_status(monkeypatch, capsys, error, status, words):
    monkeypatch.setattr(cli, "prepare_process", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main(lambda: _raise(error))
    assert end.value.code == status
    assert capsys.readouterr().err == words


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "prepare_process", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        main(lambda: _raise(ZeroDivisionError()))
    main(lambda: None)


def test_without_extras_there_are_no_other_sinks(tmp_path):
    assert open_sinks(RunOptions(tmp_path), {}, 0) == []


def leave_a_run(folder: Path, config: dict) -> None:
    with RunFolder.open(folder, config) as run:
        run.metrics_path.write_text('{"step": 1}\n')
        (run.checkpoints / "1").mkdir(parents=True)


def test_without_resume_an_earlier_run_is_kept_under_another_name(tmp_path, capsys):
    path = tmp_path / "x"
    for number in (1, 2):
        leave_a_run(path, {"n": number})
        with open_run(RunOptions(path, resume=False), {"n": number + 1}) as run:
            assert not run.metrics_path.exists()
            assert not run.checkpoints.exists()
        assert f"the run that was in {path} is now in {path}.{number}" in capsys.readouterr().out
        assert (tmp_path / f"x.{number}" / "metrics.jsonl").read_text() == '{"step": 1}\n'
        assert (tmp_path / f"x.{number}" / "checkpoints" / "1").is_dir()
    assert '"n": 1' in (tmp_path / "x.1" / "config.json").read_text()


def test_with_resume_nothing_is_moved(tmp_path):
    leave_a_run(tmp_path / "x", {})
    with open_run(RunOptions(tmp_path / "x"), {}) as run:
        assert run.metrics_path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_run_in_use_is_not_set_aside(tmp_path):
    with RunFolder.open(tmp_path / "x", {}) as run, pytest.raises(UserError, match="x: in use by process"):
        open_run(RunOptions(run.path, resume=False), {})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_only_a_run_is_set_aside(tmp_path, monkeypatch):
    assert set_aside(tmp_path / "nothing") is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    assert set_aside(tmp_path / "mine") is None
    leave_a_run(tmp_path / "x", {})
    monkeypatch.chdir(tmp_path / "x")
    with pytest.raises(UserError, match="the run there cannot be renamed"):
        set_aside(Path())
    assert (tmp_path / "x" / "config.json").exists()


# ----- paths -----


@dataclasses.dataclass(frozen=True)
class Places:
    run: RunOptions
    data: Path | None = None
    more: tuple[Path, ...] = ()


def test_home_is_known_to_every_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setattr(cli, "prepare_process", lambda *_: None)
    places = Places(RunOptions(Path("/me/x")), Path("/me/y"), (Path("/me"), Path("z~")))
    arguments = ["--run.run-dir=~/x", "--data", "~/y", "--more", "~", "z~"]
    assert choose_preset({"toy": ("", Places(RunOptions(Path("a"))))}, arguments) == places
    found = []
    main(lambda: found.append(tyro.cli(Places, args=arguments)))
    assert found == [places]


def read_only(*_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_results_have_a_folder_before_the_work(tmp_path):
    assert results_folder(None, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert results_folder(tmp_path / "c", tmp_path / "d") == tmp_path / "c"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}
    assert not list((tmp_path / "c").iterdir())


def test_a_read_only_run_needs_no_folder_for_figures_that_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "check_writable", read_only)
    assert results_folder(None, tmp_path / "run") is None
    assert capsys.readouterr().out == (
        f"{tmp_path}/run cannot be written (Read-only file system): figures are printed, --out FOLDER keeps them\n"
    )
    with pytest.raises(UserError, match=r"out: .*asked cannot be written \(Read-only file system\)"):
        results_folder(tmp_path / "asked", tmp_path / "run")


def test_a_folder_for_results_is_no_file_and_no_link_to_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="file is a file, a folder expected"):
        results_folder(tmp_path / "file", tmp_path)
    with pytest.raises(UserError, match="link is a link to nowhere"):
        results_folder(None, tmp_path / "link" / "evaluation")


# ----- output -----


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_work_goes_on_when_whoever_read_its_output_has_gone(monkeypatch, name):
    reader, writer = os.pipe()
    with open(writer, "w") as stream:  # noqa: PTH123 (of a descriptor)
        os.close(reader)
        monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, f"__{name}__", stream)
        monkeypatch.setattr(cli, "prepare_process", lambda *_: None)
        done = []

        def work() -> None:
            for step in range(3):
                print("step", step, file=getattr(sys, name), flush=True)
                done.append(step)
            console = Console(stderr=name == "stderr")
            with Progress(1, console=console, interval=0.0) as progress:
                progress.update(1, {})
                done.append("progress")

        main(work)
        assert done == [0, 1, 2, "progress"]
        assert getattr(sys, name) is stream


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_work_goes_on_where_an_output_was_closed_before_the_start(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, f"__{name}__", None)
    monkeypatch.setattr(cli, "prepare_process", lambda *_: None)
    done = []
    main(lambda: done.append("work"))
    assert done == ["work"]


def test_a_disk_full_under_the_output_is_not_passed_over():
    with environment._Output("/dev/full", "w") as output, pytest.raises(OSError, match="No space left"):
        output.write(b"x")


def test_what_jax_was_set_up_for_and_cannot_do_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepare_process", lambda *_: None)
    monkeypatch.setattr(cli, "explain", lambda error: f"JAX_PLATFORMS: {error}")
    with pytest.raises(SystemExit) as end:
        main(lambda: _raise(AssertionError("no such device")))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: JAX_PLATFORMS: no such device\n"
