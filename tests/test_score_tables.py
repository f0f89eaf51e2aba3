import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro

from dreamer4.rollout.evaluation import VIDEOS

OPTIONS = {"clips": 5, "split": "validation", "context": 2, "horizon": 4}


@pytest.fixture(scope="module")
def scripts():
    """The experiments, which import each other as scripts do."""
    names = ("score_tables", "curves", "compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def scores():
    rng = np.random.default_rng(0)
    drawn = {name: {"mse": rng.random(4, np.float32), "ssim": rng.random(4, np.float32)} for name in VIDEOS}
    drawn["random"]["delta_psnr"] = rng.random(4, np.float32)
    return drawn


@pytest.fixture(scope="module")
def report(scripts, scores):
    """Of a model without a tokenizer that takes no steps."""
    without = {name: figures for name, figures in scores.items() if name != "reconstruction"}
    told = scripts.score_tables.tabulate({None: without}, {None: 7.0})
    return {"options": OPTIONS, "film_k": None} | told


def test_what_has_no_tokenizer_and_takes_no_steps_has_the_other_figures(scripts, scores, report):
    assert report.keys() == {"options", "film_k", "copy", "k"}
    with_both = scripts.score_tables.tabulate({2: scores}, {2: 7.0})
    assert with_both["k"] == {"2": report["k"]["dream"]}
    assert with_both["tokenizer"]["ssim"] == pytest.approx(scores["reconstruction"]["ssim"].mean())
    assert report["k"]["dream"]["frames_per_s"] == 7


def test_the_table_of_such_a_model_names_its_dream(scripts, report):
    first, *others = scripts.score_tables.table(report).columns
    assert list(first.cells) == ["last frame", "dream"]
    assert "position" not in " ".join(str(column.header) for column in others)
    assert all(list(column.cells)[1] for column in others)


def test_the_curves_of_such_a_model_are_a_picture(scripts, report, tmp_path):
    scripts.curves.draw_curves(tmp_path / "curves.png", report)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_beside_others_such_a_model_has_gaps(scripts, report):
    rows = {
        "a": {"kind": "pixels", "parameters": 1.0} | report["k"]["dream"],
        "b": {"kind": "codes", "parameters": 1.0, "tokenizer_parameters": 2.0, "k": 8, "reconstruction": 30.0},
    }
    made = scripts.compare.table(rows, tyro.cli(scripts.compare.Options, args=["a", "b"]))
    columns = {" ".join(str(column.header).split()): list(column.cells) for column in made.columns}
    assert columns["run"] == ["a (pixels)", "b (codes)"]
    assert columns["steps a frame"] == ["", "8"]
    assert columns["tokenizer's PSNR dB"] == ["", "30.00"]
    assert columns["frames per s"] == ["7", ""]


def test_the_position_is_that_of_step_8_or_the_last(scripts):
    for length, expected in ((16, 108.0), (5, 105.0)):
        steps = np.arange(1, length + 1, dtype=np.float32)
        figures = scripts.score_tables.row({"mse": steps, "ssim": steps, "position": 100 + steps})
        assert figures["position"] == expected
        assert figures["ssim"] == steps.mean()
