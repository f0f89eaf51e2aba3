import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import tyro

from dreamer4.errors import UserError
from noise_runs import noise_run
from stores import ids_of, write_store

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
QUICK = ("--clips", "4", "--context", "2", "--horizon", "4")


@pytest.fixture(scope="module")
def scripts():
    """The experiments, which import each other as scripts do."""
    names = ("train_tokenizer", "train_dynamics", "train_maskgit", "compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A function that makes the run of a preset, whose parameters are noise."""
    return lambda script, *arguments: noise_run(script, tmp_path_factory.mktemp("runs") / "run", *arguments)


@pytest.fixture(scope="module")
def runs(scripts, make_run):
    """One over latents and one over codes; the second has a log."""
    latents = make_run(scripts.train_tokenizer, "debug")
    codes = make_run(scripts.train_tokenizer, "tinyworlds-debug")
    flags = ("--corpus", "0", "--latent-deviation", "None")
    both = (
        make_run(scripts.train_dynamics, "debug", "--tokenizer", latents, *flags),
        make_run(scripts.train_maskgit, "debug", "--tokenizer", codes, "--corpus", "0"),
    )
    (both[1] / "metrics.jsonl").write_text('{"step": 1, "seconds": 1}\n{"step": 3, "seconds": 90.0}\n')
    return both


@pytest.fixture(scope="module")
def compare(scripts):
    """The experiment as a function of its arguments."""
    return lambda *arguments: scripts.compare.compare(
        tyro.cli(scripts.compare.Options, args=[str(a) for a in arguments])
    )


@pytest.fixture(scope="module")
def compared(compare, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "comparison"
    compare(*runs, *QUICK, "--out", out)
    return SimpleNamespace(out=out, report=json.loads((out / "comparison.json").read_text()))


@pytest.mark.slow
def test_each_run_has_its_figures_on_the_same_clips(compared, runs):
    latents, codes = (compared.report["runs"][str(run)] for run in runs)
    assert [latents["kind"], codes["kind"]] == ["latents", "codes"]
    for figures in (latents, codes):
        assert figures["parameters"] > 0
        assert figures["frames_per_s"] > 0
        assert len(figures["steps"]["dream"]["psnr"]) == 4
        # The last frame repeated is the same to both: dreams are measured against the same truth.
        assert figures["psnr"] - figures["over_copy"] == pytest.approx(latents["psnr"] - latents["over_copy"])
    assert latents["psnr"] != codes["psnr"]
    assert latents["reconstruction"] != codes["reconstruction"]
    assert latents["k"] == codes["k"] == 2  # the runs' own
    assert "minutes" not in latents
    assert codes["minutes"] == 1.5
    assert compared.report["options"].items() >= {"clips": 4, "split": "validation", "seed": 0, "data": None}.items()


@pytest.mark.slow
def test_the_table_has_a_row_for_each_run(scripts, compared, runs):
    options = tyro.cli(scripts.compare.Options, args=[str(a) for a in (*runs, *QUICK)])
    made = scripts.compare.table(compared.report["runs"], options)
    columns = {" ".join(str(c.header).split()): list(c.cells) for c in made.columns}
    assert columns["run"] == [f"{runs[0]} (latents)", f"{runs[1]} (codes)"]
    assert columns["dynamics trained min"] == ["", "1.5"]
    assert columns["PSNR dB"] == [f"{compared.report['runs'][str(run)]['psnr']:.2f}" for run in runs]


@pytest.mark.slow
def test_the_film_has_the_truth_above_a_row_for_each_run(scripts, compared):
    frames = imageio.imread(compared.out / "comparison.gif", index=None)
    assert len(frames) == 6
    rows, columns = frames.shape[1:3]
    assert rows / columns == 3 / 4
    truth = np.random.default_rng(0).random((2, 3, 4, 5, 1), np.float32)
    dreams = [np.full((2, 1, 4, 5, 1), value, np.float32) for value in (0.25, 0.75)]
    made = scripts.compare.film(truth, dreams)
    assert made.shape == (3, 3 * 6, 2 * 7, 1)
    np.testing.assert_array_equal(made[:, 1:5, 1:6], truth[0])
    np.testing.assert_array_equal(made[:2, 7:11, 8:13], truth[1, :2])  # the dream has not begun
    assert (made[2, 7:11, 1:6] == 0.25).all()
    assert (made[2, 13:17, 1:6] == 0.75).all()
    assert made[:, 0, 0, 0].tolist() == [0.5, 0.5, 1]


def test_minutes_are_those_of_the_whole_log(scripts, tmp_path):
    assert scripts.compare.minutes(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "seconds": {60 * n}}}\n' for n in (1, 2, 5)))
    assert scripts.compare.minutes(tmp_path) == {"minutes": 5.0}


@pytest.mark.parametrize("count", [1, 2])
def test_one_run_alone_is_refused(compare, runs, count):
    with pytest.raises(UserError, match=r"runs: .* found, 2 or more, each once, expected"):
        compare(*[runs[0]] * count)


def test_one_run_by_two_paths_is_one_run(scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs: .* found, 2 or more, each once, expected"):
        scripts.compare.Options((Path("x"), tmp_path / "x"))


def test_clips_that_differ_are_refused_before_anything_is_dreamt(compare, runs, scripts, make_run, tmp_path):
    lengths = dict.fromkeys(ids_of("validation", 2) + ids_of("train", 2), 12)
    data = write_store(tmp_path / "data", lengths, noise=True)
    codes = make_run(scripts.train_tokenizer, "tinyworlds-debug", "--data", data)
    other = make_run(scripts.train_maskgit, "debug", "--tokenizer", codes, "--corpus", "0", "--data", data)
    with pytest.raises(UserError, match="were not asked for the same clips, give one --data"):
        compare(runs[0], other, *QUICK, "--out", tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file, a folder expected"):
        compare(*runs, *QUICK, "--out", tmp_path / "file")
    assert not (tmp_path / "out").exists()


def test_a_lone_clip_is_refused(scripts):
    with pytest.raises(UserError, match="clips: 1 found, 2 or more expected"):
        scripts.compare.Options((Path("a"), Path("b")), clips=1)


def test_a_run_that_dreams_nothing_is_refused(compare, runs, tmp_path):
    with pytest.raises(UserError, match="run: there is no"):
        compare(runs[0], tmp_path / "none", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"a run of train_tokenizer.py tinyworlds found, one that dreams expected"):
        compare(runs[1] / "tokenizer", runs[0], "--out", tmp_path / "out")
