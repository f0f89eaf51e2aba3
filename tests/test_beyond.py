import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from dreamer4.config import to_json
from dreamer4.errors import UserError
from dreamer4.rollout.evaluation import Horizon
from dreamer4.train.fit import TrainConfig
from noise_worlds import EXPERIMENTS


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        names = ("beyond", "curves", "train_dynamics", "train_maskgit", "evaluate")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def scores_of(dream, copy):
    """Errors at each step, in powers of a tenth."""
    made = {"dream": dream, "copy": copy}
    return {name: {"mse": 10.0 ** -np.array(x, float), "ssim": np.zeros(len(x))} for name, x in made.items()}


def fail(*_):
    raise AssertionError("not asked for")


def test_figures_are_split_where_the_longest_training_clip_ends(scripts):
    """Two frames of context in clips of five: three steps lie within."""
    scores = scores_of([3, 3, 3, 2, 2], [1, 1, 1, 1, 1])
    found = scripts.beyond.beyond(scores, 4, Horizon(2, 5), 5, fail, 8, fail)
    expected = {"psnr_within": 30, "over_copy_within": 20, "psnr_beyond": 20, "over_copy_beyond": 10}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert (found["trained_frames"], found["horizon"], found["k"]) == (5, 5, "4")
    assert found["steps"]["dream"]["psnr"] == pytest.approx([30, 30, 30, 20, 20], abs=1e-3)
    assert scripts.beyond.describe(found) == (
        "dream of 5 frames (K = 4): 30.00 dB within the 5 frames of the longest training clip (+20.00 over copy),"
        " 20.00 dB beyond (+10.00 over copy)"
    )


def test_all_is_beyond_where_the_context_fills_the_training_clips(scripts):
    found = scripts.beyond.beyond(scores_of([2, 2], [1, 1]), 1, Horizon(8, 2), 8, fail, 8, fail)
    assert found["psnr_beyond"] == pytest.approx(20, abs=1e-3)
    assert "psnr_within" not in found
    assert "within" not in scripts.beyond.describe(found)


@pytest.mark.parametrize("length", [3, 4])  # short of the end of the training clips, and to it
def test_a_horizon_that_does_not_go_beyond_is_followed_by_one_that_does(scripts, length):
    asked = []

    def dream(clips, horizon):
        asked.append(horizon)
        assert clips == "longer clips"
        return scores_of([3] * 4 + [2] * 3, [1] * 7)

    def take(horizon):
        asked.append(horizon)
        return "longer clips"

    short = scores_of([5] * length, [5] * length)
    found = scripts.beyond.beyond(short, 4, Horizon(2, length), 6, take, 3, dream)
    assert asked == [Horizon(2, 7)] * 2
    assert found["horizon"] == 7
    assert (found["psnr_within"], found["psnr_beyond"]) == pytest.approx((30, 20), abs=1e-3)
    assert scripts.beyond.beyond(short, 4, Horizon(2, length), 6, fail, 0, fail) is None


def test_clips_that_are_too_short_are_said_and_end_nothing(scripts, capsys):
    def take(horizon):
        raise UserError("data: the longest episode has 7 frames")

    assert scripts.beyond.beyond(scores_of([1], [1]), 4, Horizon(2, 1), 6, take, 3, fail) is None
    said = "nothing is shown beyond the 6 frames of the longest training clip: data: the longest episode has 7 frames"
    assert said in capsys.readouterr().out


def test_the_trained_frames_are_those_of_the_longest_batch(scripts):
    for config, frames in ((scripts.train_dynamics.TOY, 24), (scripts.train_maskgit.TOY, 8), (TrainConfig(), 16)):
        train = getattr(config, "train", config)
        trained = SimpleNamespace(config={"train": to_json(train)})
        assert scripts.beyond.trained_frames(trained, "run") == frames


def test_the_default_evaluation_of_the_presets_goes_beyond_the_longest_training_clip(scripts):
    options = scripts.evaluate.Options()
    for config in (scripts.train_dynamics.TOY, scripts.train_maskgit.TOY):
        window = max(frames for _, frames in config.train.shapes)
        horizon = scripts.beyond.longer(Horizon(options.context, options.horizon), window, options.beyond)
        assert horizon.end >= window + 16


@pytest.mark.slow
def test_the_curves_mark_where_the_longest_training_clip_ends(scripts, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    marked, plot = [], axes.plot
    drawn = []
    monkeypatch.setattr(axes, "axvline", lambda self, x, **_: marked.append(x))
    monkeypatch.setattr(axes, "plot", lambda self, x, y, **style: drawn.append(len(y)) or plot(self, x, y, **style))
    steps = {"psnr": [20.0] * 4}
    report = {"options": {"context": 2, "horizon": 4}, "film_k": 1, "copy": {"steps": steps}}
    report |= {"k": {"1": {"steps": {"dream": steps, "shuffled": steps}}}}
    scripts.curves.draw_curves(tmp_path / "curves.png", report)
    assert (marked, drawn) == ([], [4, 4, 4])
    further = {"trained_frames": 6, "horizon": 7, "k": "1", "steps": {"dream": {"psnr": [20.0] * 7}}}
    scripts.curves.draw_curves(tmp_path / "curves.png", report | {"beyond": further})
    assert marked == [4.5]  # between the fourth dreamt frame, which is the clip's sixth, and the fifth
    assert drawn[3:] == [4, 4, 4, 7]
