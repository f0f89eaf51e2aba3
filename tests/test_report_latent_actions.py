import base64
import html.parser
import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as imageio
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from rich.console import Console

from dreamer4.batch import ActionComponent, Batch
from dreamer4.data.episodes import Column, Episode, Schema
from dreamer4.data.toy import MOVES
from dreamer4.data.writer import EpisodeWriter
from dreamer4.errors import UserError
from dreamer4.metrics.control import read_calibration
from dreamer4.train.checkpoint import Identity
from stores import ids_of, write_store

DIGEST = "ab" * 32
pytestmark = pytest.mark.usefixtures("kept_compilations")
QUICK = ("--clips", "6", "--labelled-clips", "20", "--frames", "4")
EPISODES = dict(zip([*ids_of("train", 3), *ids_of("validation")], [6, 7, 5, 9], strict=True))


@pytest.fixture(scope="module")
def scripts():
    """The experiments, which import each other as scripts do."""
    names = ("latent_action_scores", "latent_action_page", "report_latent_actions")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def moved(frames):
    return jnp.stack([jnp.roll(frames, tuple(move), (2, 3)) for move in MOVES.tolist()])


def infer(model, params, video):
    """A code for each direction that the toy world's square can take; all codes of a transition are the same."""
    errors = jnp.mean((moved(video[:, :-1]) - video[:, 1:]) ** 2, axis=(3, 4, 5))
    ids = jnp.repeat(jnp.argmin(errors, axis=0)[..., None], model.tokens, axis=-1)
    return SimpleNamespace(ids=ids, codes=params["book"][ids])


def predict(model, params, video, codes):
    ids = jnp.argmin(jnp.sum((codes[..., 0, None, :] - params["book"]) ** 2, -1), -1)
    there = jnp.take_along_axis(moved(video[:, :-1]), ids[None, :, :, None, None, None], axis=0)[0]
    return 0.9 * there + 0.1 * video[:, :-1]


@pytest.fixture(scope="module")
def make_report(scripts, tmp_path_factory):
    """The experiment as a function of its arguments, on a run that knows the toy world."""

    def make(*arguments, tokens=1, channels=3, data=None, run=None):
        run = run or tmp_path_factory.mktemp("runs") / "run"
        run.mkdir(exist_ok=True)
        model = SimpleNamespace(tokens=tokens, code_count=5, height=16, width=16, channels=channels)
        toy = {"height": 16, "width": 16, "min_side": 4, "max_side": 6}
        config = {"data": data and str(data), "toy": toy, "train": {"seed": 0, "clip_length": 4}}
        params = {"book": np.asarray(MOVES, np.float32)}
        with pytest.MonkeyPatch.context() as patch:
            for name, function in {
                "load_latent_action": lambda _: SimpleNamespace(model=model, params=params, config=config, step=7),
                "find": lambda *_: Identity(7, DIGEST),
                "infer": infer,
                "predict": predict,
                "codes_of": lambda model, params, ids: params["book"][ids],
            }.items():
                patch.setattr(scripts.report_latent_actions, name, function)
            options = tyro.cli(
                scripts.report_latent_actions.Options, args=["--run", str(run), *map(str, (*QUICK, *arguments))]
            )
            scripts.report_latent_actions.report(options)
        out = run / "evaluation"
        return SimpleNamespace(
            run=run,
            figures=json.loads((out / "report.json").read_text()),
            text=(out / "report.html").read_text(),
            page=Page((out / "report.html").read_text()),
        )

    return make


class Page(html.parser.HTMLParser):
    """What a page shows. Fails where a tag is not closed, or where it asks for anything outside the page."""

    VOID = ("meta", "img", "br")
    SHAPES = ("rect", "line", "circle", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.words, self.counts = [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            assert not (name in ("src", "href") and not value.startswith("data:")), value
            if name == "src":
                self.pictures.append(imageio.imread(base64.b64decode(value.split(",")[1]), extension=".png"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def toy(make_report):
    return make_report()


# ----- the toy world -----


def test_the_page_holds_all_pictures_and_asks_for_nothing_outside(toy):
    assert "@import" not in toy.text
    assert "url(" not in toy.text
    assert "prefers-color-scheme: dark" in toy.text
    assert 'name="viewport"' in toy.text
    pairs, codes = toy.page.pictures[:6], toy.page.pictures[6:]
    assert all(picture.shape == (16, 4 * 16 + 3 * 2, 3) for picture in pairs)
    assert len(codes) == 2 * (1 + np.count_nonzero(toy.figures["embedding"]["usage"]))
    assert all(picture.shape == (2 * 16 + 2, 16, 3) for picture in codes)


def test_a_strip_is_frame_prediction_next_frame_and_their_difference(toy):
    for picture in toy.page.pictures[:6]:
        frame, predicted, truth, heat = (picture[:, i * 18 : i * 18 + 16].astype(int) for i in range(4))
        assert np.abs(predicted - (0.9 * truth + 0.1 * frame)).max() <= 1
        wrong = np.abs(predicted - truth).mean(-1) / 255
        # Up to a third of the heat map's range it is red alone.
        np.testing.assert_allclose(heat[..., 0] / 255, np.clip(wrong * 6, 0, 1), atol=0.02)
        assert not np.any(heat[wrong < 0.16][:, 1:])


def test_every_split_has_its_figures(toy):
    splits = toy.figures["splits"]
    assert list(splits) == ["validation", "test"]
    assert any("no split of clips that were trained on" in note for note in toy.figures["notes"])
    for figures in splits.values():
        assert figures["pairs"] == 6 * 3
        assert figures["over_copy"] == pytest.approx(20, abs=0.05)
        assert figures["events"]["square moved"]["purity"] == 1
        assert figures["elements"]["square"]["drop"] > 3
    assert len({figures["psnr"] for figures in splits.values()}) == 2
    assert toy.figures["step"] == 7
    assert toy.figures["digest"] == DIGEST
    assert toy.figures["embedding"]["method"] in ("PCA", "t-SNE")
    words = " ".join(toy.page.words)
    for said in ("validation", "test", "Square moved", "Round the square", "0.5 or more"):
        assert said in words


def test_the_codes_of_the_actions_are_saved_with_the_run(toy):
    calibration = read_calibration(toy.run / "calibration.json", DIGEST)
    # The stand-in's codes are the directions, of which only the actions at a bounce are another's.
    np.testing.assert_array_equal(calibration.code_of(np.eye(5)[1:]), [[1], [2], [3], [4]])
    control = toy.figures["control"]
    assert [(row["action"], row["code"]) for row in sorted(control["table"], key=lambda x: x["code"])] == [
        ("up", [1]),
        ("down", [2]),
        ("left", [3]),
        ("right", [4]),
    ]
    assert list(control["curve"]) == ["1", "4", "16"]
    assert control["curve"]["16"]["mean"] > 0.75 > control["curve"]["1"]["mean"]
    assert control["all"] > control["most_frequent_action"]


def test_several_codes_of_a_transition_are_told_together_and_one_by_one(make_report):
    found = make_report(tokens=7)
    told = found.figures["splits"]["test"]["events"]["square moved"]
    assert len(told["positions"]) == 7
    high = told["best_chance"]["nmi"]["high"]
    assert told["best_chance"]["nmi"]["mean"] < high < told["positions"][0]["nmi"]
    assert f"(95 %: {high:.3f})" in found.text
    assert all(x["purity"] == 1 for x in told["positions"])
    words = " ".join(found.page.words)
    assert "position that tells most" in words
    assert "perplexity at position 6" in words
    assert "1. · " in words  # of so many codes the rank alone is told


def test_a_gray_model_is_shown_the_toy_world_in_gray(make_report, toy):
    found = make_report(channels=1)
    for picture in found.page.pictures[:6]:  # frame, prediction and next frame; the heat map keeps its colours
        assert not np.any(np.ptp(picture[:, : 3 * 18].astype(int), axis=-1))
    for split, figures in found.figures["splits"].items():
        assert figures["over_copy"] == pytest.approx(20, abs=0.1)
        assert figures["elements"]["square"]["drop"] > 3
        assert figures["psnr"] != toy.figures["splits"][split]["psnr"]
        assert figures["actions"] == toy.figures["splits"][split]["actions"]
    assert found.figures["notes"] == toy.figures["notes"]


# ----- data sets -----


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_a_store_that_knows_neither_actions_nor_state_has_the_rest(make_report, data):
    store = write_store(data / "bare", EPISODES, noise=True, labelled=False)
    found = make_report("--data", store)
    assert list(found.figures["splits"]) == ["train", "validation"]
    assert found.figures["splits"]["train"]["pairs"] == 6 * 3  # of the 9 windows that there are
    assert found.figures["control"] is None
    assert not (found.run / "calibration.json").exists()
    for split in found.figures["splits"].values():
        assert split["actions"] is split["bricks"] is None
        assert split["elements"] == {}
    notes = " ".join(found.figures["notes"])
    for missing in ("no test clips of 4 frames", "no true actions", "no true state"):
        assert missing in notes
    assert len(found.page.pictures) > 6
    assert " ".join(found.page.words).count("this is not to be said") == 2


def test_fewer_windows_than_asked_for_are_all_taken(make_report, data):
    store = write_store(data / "<b>[red]", EPISODES, noise=True)
    found = make_report("--data", store, "--clips", "50")
    assert [split["pairs"] for split in found.figures["splits"].values()] == [9 * 3, 6 * 3]
    assert found.figures["control"]["clips"] == 9
    assert found.figures["splits"]["train"]["actions"]["pairs"] == 9 * 3
    # What comes from outside is no markup.
    assert "b" not in found.page.counts
    assert "&lt;b&gt;" in found.text


def test_with_a_gray_model_bricks_are_not_spoken_of_and_that_is_said(make_report, data):
    path = data / "bricks"
    schema = Schema((16, 16, 3), (), state={"bricks": Column((6, 18), np.dtype(bool))})
    with EpisodeWriter(path, schema, {"made": "by a test"}) as writer:
        for name, length in EPISODES.items():
            video = np.random.default_rng(length).integers(0, 256, (length, 16, 16, 3), np.uint8)
            no, first = np.zeros(length, np.float32), np.arange(length) == 0
            writer.add(name, Episode(video, {}, no, first, no > 0, {"bricks": np.ones((length, 6, 18), bool)}))
    found = make_report("--data", path, channels=1)
    assert any("bricks are told by their colours" in note for note in found.figures["notes"])
    assert all(split["bricks"] is None for split in found.figures["splits"].values())
    assert "Bricks are told by their colours" in " ".join(found.page.words)


# ----- bad input -----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": (24, 16)}, "data: frames of (24, 16, 3) found, (16, 16, 3) expected, as in {run}"),
        ({"channels": 1}, "data: frames of (16, 16, 1) found, (16, 16, 3) expected, as in {run}"),
        (
            {"lengths": dict.fromkeys(EPISODES, 3)},
            "data: no two clips of 4 frames found in a split of {data}",
        ),
    ],
)
def test_data_that_cannot_be_reported_on_are_told_and_nothing_is_written(make_report, tmp_path, options, sentence):
    run, data = tmp_path / "run", tmp_path / "data"
    write_store(data, **{"lengths": EPISODES} | options)
    with pytest.raises(UserError) as error:
        make_report("--data", data, run=run)
    assert str(error.value).startswith(sentence.format(run=run, data=data))
    assert list(run.iterdir()) == []


def test_data_of_the_run_that_are_gone_are_told(make_report, tmp_path):
    with pytest.raises(UserError, match=r"its data set .* is not there"):
        make_report(data=tmp_path / "gone")


def test_a_run_that_is_missing_is_told(scripts, tmp_path):
    report = scripts.report_latent_actions
    with pytest.raises(UserError, match=r"run: there is no .*; train one with uv run experiments/train_latent_action"):
        report.report(report.Options(run=tmp_path / "none"))


def test_results_go_to_a_folder(make_report, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file, a folder expected"):
        make_report("--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ----- parts -----


def test_codes_that_differ_along_a_plane_keep_their_distances_on_it(scripts, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rng = np.random.default_rng(0)
    plane, _ = np.linalg.qr(rng.normal(size=(9, 2)))
    flat = rng.normal(size=(20, 2)) * [3, 1]
    points, method = scripts.report_latent_actions.embed(flat @ plane.T + 5, 0)
    assert method == "PCA"
    np.testing.assert_allclose(distances(points), distances(flat), atol=1e-6)
    assert np.ptp(points[:, 0]) > np.ptp(points[:, 1])
    line, _ = scripts.report_latent_actions.embed(flat[:, :1], 0)
    np.testing.assert_allclose(distances(line), distances(flat[:, :1]), atol=1e-6)


def distances(points):
    return np.linalg.norm(points[:, None] - points, axis=-1)


def test_the_terminal_shows_each_split_in_eighty_columns(scripts, toy):
    printed = Console(file=io.StringIO(), width=80)
    printed.print(scripts.report_latent_actions.table(toy.figures))
    shown = printed.file.getvalue()
    assert "…" not in shown
    for split, figures in toy.figures["splits"].items():
        assert f"{split} " in shown
        assert f"{figures['psnr']:.2f}" in shown
        chance = figures["actions"]["chance"]
        for measure in ("nmi", "purity"):
            for value in (figures["actions"][measure], *chance[measure].values()):
                assert f"{value:.3f}" in shown
    assert shown.count("by chance") == shown.count("95 % below") == 2


def test_the_reader_of_actions_is_scored_on_clips_that_it_has_not_seen(scripts):
    """Codes that mean one action in the clips for calibration and another one in those held out: nothing is read."""
    report = scripts.report_latent_actions
    action = np.random.default_rng(0).integers(0, 3, (8, 5))

    def clips(codes):
        """Clips whose frames show ``codes`` in their first pixel."""
        video = np.zeros((*codes.shape, 16, 16, 3), np.uint8)
        video[:, :, 0, 0, 0] = codes
        no = np.zeros(codes.shape, np.float32)
        return Batch(video, {"action": action}, no, no > 0, no > 0, np.ones(len(codes), bool), {})

    model = scripts.latent_action_scores.LatentActions(
        infer=lambda params, video: ((255 * video[:, 1:, 0, 0, :1]).round().astype(int), video[:, 1:, 0, 0, :1, None]),
        predict=lambda params, video, codes: video[:, :-1],
        codes_of=lambda params, ids: ids[..., None] * 1.0,
        params={},
        tokens=1,
        code_count=3,
    )
    space = (ActionComponent("action", "categorical", 3),)
    for shift, right in ((0, 1.0), (1, 0.0)):
        held_out = clips((action + shift) % 3)
        material = report.Material({"validation": held_out}, clips(action), space, {}, "here", [])
        measured = {"validation": scripts.latent_action_scores.measure(model, held_out, 4)}
        options = report.Options(batch_size=4)
        made, figures = report.control_figures(model, material, measured, "validation", options, DIGEST)
        assert figures["all"] == right
        assert figures["curve"]["4"]["scores"] == [right] * 5
        assert made.code_of(np.eye(3)).tolist() == [[0], [1], [2]]
