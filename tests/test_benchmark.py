import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(folder, *arguments):
    """What ``benchmark.py`` prints, and the figures that it writes."""
    command = [sys.executable, "experiments/benchmark.py", *arguments, "--json", str(folder / "figures.json")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, json.loads((folder / "figures.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "preset", "shapes"),
    [
        ("tokenizer", "debug", 1),
        ("video_tokenizer", "tinyworlds-debug", 1),
        ("dynamics", "debug", 2),
    ],
)
def test_the_benchmark_reports_one_compilation_for_each_shape_of_batch(tmp_path, model, preset, shapes):
    printed, figures = benchmark(tmp_path, model, "--preset", preset, "--steps", "2", "--rounds", "1")
    assert figures["compilations"] == shapes
    assert 0 <= figures["data_wait"] < 1
    for name in ("frames_per_s", "matmul_share", "first_step_s"):
        assert figures[name] > 0
        assert name in printed


@pytest.mark.slow
def test_the_benchmark_of_latent_actions_reports_each_batch_size(tmp_path):
    arguments = ("--preset", "debug", "--batch-sizes", "4", "8", "--steps", "2", "--rounds", "1")
    printed, figures = benchmark(tmp_path, "latent_action", *arguments)
    assert list(figures["batch_size"]) == ["4", "8"]
    for size, rates in figures["batch_size"].items():
        assert rates["compilations"] == 1
        assert rates["frames_per_s"] == pytest.approx(2 * int(size) * 1e3 / rates["step_ms"])
        assert f"batch_size {size} frames_per_s" in printed


@pytest.mark.slow
def test_the_benchmark_of_dreams_reports_each_context_with_and_without_the_cache(tmp_path):
    arguments = ("--contexts", "4", "8", "--k", "1", "--frames", "4", "--rounds", "1")
    _, figures = benchmark(tmp_path, "generate", *arguments)
    assert figures["frames_per_s"].keys() == {"cached", "uncached"}
    for rates in figures["frames_per_s"].values():
        assert rates.keys() == {"4", "8"}
        assert min(rates.values()) > 0


@pytest.mark.slow
def test_the_benchmark_of_codes_reports_frames_and_codes(tmp_path):
    _, figures = benchmark(tmp_path, "unmask", "--t", "1", "--frames", "2", "--rounds", "1")
    assert 0 < figures["frames_per_s"]["painted"] < 2 * figures["frames_per_s"]["codes"]
