import dataclasses
import functools
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import tyro
from safetensors.numpy import load_file

from dreamer4.errors import UserError
from dreamer4.runs import load_next_frame
from dreamer4.train.exported import exported_step, read_exported, write_exported
from dreamer4.train.manifest import DamageError
from dreamer4.train.run_folder import RunFolder
from dreamer4.world import load
from noise_worlds import EXPERIMENTS, KINDS

FILES = {"card.md", "config.json", "manifest.json", "model.safetensors"}


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        return importlib.import_module("export")


@pytest.fixture(scope="module")
def export(script):
    """The experiment as a function of its arguments."""
    return lambda *arguments: script.export(tyro.cli(script.Options, args=[str(a) for a in arguments]))


@pytest.fixture(scope="module")
def exported(run_of, export, tmp_path_factory):
    """A function from the kind of a run to the folder that it is exported to, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("worlds")

    def of(kind):
        if not (folder / kind).exists():
            export(run_of(kind), "--out", folder / kind)
        return folder / kind

    return of


@pytest.fixture(scope="module")
def load_once():
    """Of a folder that stays as it is."""
    return functools.cache(load)


def assert_same(one, other):
    """The same parameters, bit by bit, of the same model with the same steps: whatever they dream is the same."""
    assert one.describe() == other.describe()
    assert one.dreamer == other.dreamer
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_world_comes_back(run_of, exported, load_once, kind):
    run, folder = load_once(run_of(kind)), load_once(exported(kind))
    assert_same(folder, run)
    if kind == "next_frame":  # of which a step compiles in no time
        frames = [world.step(world.reset(seed=1), [0.5, -1])[1] for world in (folder, run)]
        np.testing.assert_array_equal(*frames)
        assert np.ptp(frames[0]) > 0


def test_the_folder_holds_what_it_should_and_stands_alone(run_of, exported, load_once, tmp_path):
    here = {path.relative_to(exported("dynamics")).as_posix() for path in exported("dynamics").rglob("*.*")}
    assert here == FILES | {f"tokenizer/{name}" for name in FILES - {"card.md"}}
    assert {path.name for path in exported("next_frame").iterdir()} == FILES
    assert not [path.name for path in exported("dynamics").parent.iterdir() if path.name not in KINDS]
    moved = shutil.copytree(exported("dynamics"), tmp_path / "moved")
    assert load(moved).describe() == load_once(run_of("dynamics")).describe()


def test_the_parameters_are_plain_safetensors(run_of, exported, load_once):
    arrays = load_file(exported("dynamics") / "model.safetensors")
    assert all("/" in name or array.ndim for name, array in arrays.items())
    found = sum(array.size for array in arrays.values())
    found += sum(array.size for array in load_file(exported("dynamics") / "tokenizer" / "model.safetensors").values())
    assert found == load_once(run_of("dynamics")).describe().parameters


def test_no_folder_of_this_machine_is_told(script, run_of, exported):
    for kind in KINDS:
        for path in exported(kind).rglob("*.*"):
            assert str(run_of(kind).parent).encode() not in path.read_bytes()
    config = {"data": str(run_of("dynamics")), "toy": {"runs": [str(run_of("maskgit")), "runs/a"]}, "k": 4}
    assert script.portable(config) == {"data": "dynamics", "toy": {"runs": ["maskgit", "runs/a"]}, "k": 4}


def test_what_judged_a_model_stays_behind(script, run_of, tmp_path):
    trained = load_next_frame(run_of("next_frame"))
    judged = dataclasses.replace(trained, config=trained.config | {"discriminator": {"layers": 3}})
    script.write_parameters(tmp_path / "out", judged, run_of("next_frame"))
    jax.tree.map(np.testing.assert_array_equal, load_next_frame(tmp_path / "out").params, trained.params)


def test_arrays_of_any_order_and_shape_come_back(tmp_path):
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    params = {"a": {"turned": turned}, "number": np.float32(2), "none": np.zeros((0, 3), np.int32)}
    write_exported(tmp_path / "out", params, {"frame": [1]}, 7)
    found, config = read_exported(tmp_path / "out")
    assert (config, exported_step(tmp_path / "out")) == ({"frame": [1]}, 7)
    np.testing.assert_array_equal(found["a"]["turned"], turned)
    assert found["number"].shape == ()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert found["none"].shape == (0, 3)


def test_what_is_exported_can_be_exported(exported, export, load_once, tmp_path):
    export(exported("next_frame"), "--out", tmp_path / "again")
    assert_same(load(tmp_path / "again"), load_once(exported("next_frame")))


# ----- the card -----


def test_the_card_tells_what_is_known(exported, load_once):
    card = (exported("dynamics") / "card.md").read_text()
    about = load_once(exported("dynamics")).describe()
    for told in (
        "# dynamics\n",
        "- **Frames:** 16 x 16 x 3 (height, width, channels)",
        "- **Actions:** `action`, one of 5",
        f"- **Parameters:** {about.parameters:,}, ",
        "- **K:** 2 steps a frame",
        "- **Trained on:** the toy world",
        "- **By:** `uv run experiments/train_dynamics.py`, to step 3",
        "None are known.",
        'world = dreamer4.load("dynamics")',
        "world.step(state, 0)",
    ):
        assert told in card
    card = (exported("next_frame") / "card.md").read_text()
    assert "- **Actions:** `controls`, 2 numbers" in card
    assert "world.step(state, [0, 0])" in card
    assert "K:" not in card


LOG = (
    {"step": 1, "seconds": 30.0, "eval/psnr": 10.0, "eval/ssim": 0.1},
    {"step": 2, "seconds": 90.0, "eval/psnr": 12.3456, "eval/ssim": None},
    {"step": 3, "seconds": 120.0, "train/loss": 1.0},
    {"step": 4, "seconds": 600.0, "eval/psnr": 99.0},
)
ENVIRONMENT = {"devices": {"cpu": 1}, "cpus": 2, "packages": {"jax": "0.10.1"}}


@pytest.fixture
def logged(run_of, tmp_path):
    run = shutil.copytree(run_of("next_frame"), tmp_path / "logged")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return run


def test_the_card_has_the_figures_of_that_checkpoint(logged, export, tmp_path):
    export(logged, "--out", tmp_path / "a", "--command", "uv run experiments/train_next_frame.py debug")
    card = (tmp_path / "a" / "card.md").read_text()
    told = "`uv run experiments/train_next_frame.py debug`, to step 3, 2.0 minutes on 1 cpu (2 cores, jax 0.10.1)"
    assert told in card
    assert "| psnr | 12.35 |" in card
    assert "ssim" not in card
    assert "| psnr | 99" not in card


def test_the_card_prefers_the_table_of_evaluate(logged, export, tmp_path):
    row = {"psnr": 22.861, "ssim": 0.8, "over_copy": None, "frames_per_s": 61.0}
    report = {
        "options": {"clips": 64, "horizon": 16, "context": 8},
        "step": 3,
        "device": "cpu",
        "k": {"1": row, "4": {**row, "psnr": 23.0}},
    }
    for step, told in ((3, "| PSNR, dB | 22.86 | 23 |"), (2, "| psnr | 12.35 |")):
        (logged / "evaluation").mkdir(exist_ok=True)
        (logged / "evaluation" / "evaluation.json").write_text(json.dumps(report | {"step": step}))
        export(logged, "--out", tmp_path / f"step{step}")
        card = (tmp_path / f"step{step}" / "card.md").read_text()
        assert told in card
    assert "| | K = 1 | K = 4 |" in (tmp_path / "step3" / "card.md").read_text()
    assert "last frame repeated" not in (tmp_path / "step3" / "card.md").read_text()


# ----- bad input -----


def test_a_folder_that_holds_something_is_not_written_to(run_of, export, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(UserError, match=f"out: .*{name} is there and not empty; name another folder"):
            export(run_of("next_frame"), "--out", tmp_path / name)
    assert (tmp_path / "full" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(run_of("next_frame"), "--out", tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full", "empty"}


def test_a_run_that_cannot_be_exported_is_refused(run_of, export, tmp_path):
    with pytest.raises(UserError, match=r"a run of train_tokenizer.py found, one that dreams expected"):
        export(run_of("tokenizer"), "--out", tmp_path / "out")
    with pytest.raises(UserError, match="run: there is no "):
        export(tmp_path / "none", "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()], ids=["flip", "cut", "unlink"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "manifest.json", "config.json", "tokenizer/model.safetensors", "tokenizer/config.json"],
)
def test_damage_is_told_with_the_name_of_the_file(exported, tmp_path, name, damage):
    folder = shutil.copytree(exported("dynamics"), tmp_path / "copy")
    damage(folder / name)
    with pytest.raises(DamageError) as error:
        load(folder)
    sentence = str(error.value)
    assert sentence.startswith(f"{(folder / name).parent} is damaged: {(folder / name).name} ")
    assert "\n" not in sentence


def test_a_card_may_be_edited(exported, tmp_path):
    folder = shutil.copytree(exported("next_frame"), tmp_path / "copy")
    (folder / "card.md").write_text("mine")
    load(folder)


def test_a_torn_last_line_of_metrics_is_left_out(script, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 60}\n{"step": 2, "sec')
    assert script.log(RunFolder(tmp_path), 5) == [{"step": 1, "seconds": 60}]


def test_a_world_is_exported_into_a_folder_that_was_just_mounted(run_of, export, load_once, tmp_path):
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    export(run_of("next_frame"), "--out", tmp_path / "volume")
    assert_same(load(tmp_path / "volume"), load_once(run_of("next_frame")))
    assert {path.name for path in (tmp_path / "volume").iterdir()} == FILES | {"lost+found"}
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_a_link_to_nothing_is_found_out_before_the_export(run_of, export, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link is a link to nowhere"):
        export(run_of("next_frame"), "--out", tmp_path / "link")
