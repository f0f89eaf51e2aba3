import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_benchmark_reports_one_compilation_for_each_shape_of_batch(tmp_path):
    command = [sys.executable, "experiments/benchmark.py", "tokenizer", "--preset", "debug", "--steps", "2"]
    command += ["--rounds", "1", "--json", str(tmp_path / "figures.json")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["compilations"] == 1
    assert 0 <= figures["data_wait"] < 1
    for name in ("frames_per_s", "matmul_share", "first_step_s"):
        assert figures[name] > 0
        assert name in ended.stdout
