"""scripts/test_gpu.sh where there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ..conftest import ROOT


def run(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    command = ["bash", "scripts/test_gpu.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow  # a process
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_without_a_gpu_it_is_one_line():
    without = run()
    assert without.returncode == 1 and without.stdout == ""
    assert without.stderr == "scripts/test_gpu.sh: torch sees no CUDA GPU here; nothing was run\n"


@pytest.mark.slow  # tests, benchmark and four trainings
def test_all_of_it_on_a_cpu_at_a_tiny_size(tmp_path):
    tried = run("--tiny", OUT=str(tmp_path / "out"))
    assert tried.returncode == 0, tried.stdout + tried.stderr
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert document["tests"]["passed"] > 50 and document["tests"]["failed"] == 0
    assert document["benchmark"]["sections"].keys() == {"attention", "passes", "training-entropy", "bf16"}
    rows = document["trainings"]
    assert [row["variant"] for row in rows] == ["SM+LN+G", "SM+LN+R", "SM+G", "SM+R"]
    for row in rows:
        assert row["steps"] == 6 and row["perplexity"] > 1 and not row["not finished"]
        assert len(row["entropies"]) == 3 and all(entropy > 0 for entropy in row["entropies"])
    assert all(max(layer) - min(layer) > 0.1 for layer in zip(*(row["entropies"] for row in rows), strict=True))
    # the table is the last that is printed
    last = tried.stdout.rstrip().splitlines()[-len(rows) :]
    assert [line.split(" | ")[0] for line in last] == [f"| {row['variant']}" for row in rows]
    assert (tmp_path / "out" / "entropy.png").stat().st_size > 10_000
