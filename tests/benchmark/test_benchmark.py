"""The benchmark runs every section, and says which there are; how fast things are is not tested."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training import cli
from training.benchmark.models import build_lnfree, count_flops
from training.benchmark.sections import SECTIONS
from training.benchmark.timing import peak_memory

from ..conftest import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "section must be one of step, bf16, optimizer, designs, .*, got 'speed'"),
        (["step", "--sizes", "huge"], "size must be one of quick, gpt2, pythia70m, got 'huge'"),
        (["--rounds", "0"], "rounds and lengths must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["benchmark", *arguments]) == 1
    assert re.fullmatch(f"lnfree benchmark: error: {message}\n", capsys.readouterr().err)


@pytest.mark.parametrize("length", [128, 512])
def test_flops_of_a_step_are_those_of_a_count_by_hand(length):
    model, input_ids = build_lnfree("SM+R", "quick", length, "cpu"), torch.zeros(2, length, dtype=torch.long)
    tokens, width, layers, vocab_size = 2 * length, 128, 6, 2048
    # forward, and for the backward pass twice as much: 12 D^2 a layer, and the head
    linear = 3 * 2 * tokens * (layers * 12 * width**2 + width * vocab_size)
    # two products, and five for the backward pass, in which the scores are computed again; half of each is seen
    attention = layers * (2 + 5) * 2 * tokens * length * width // 2
    assert count_flops(model, input_ids) == linear + attention


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory")
def test_peak_memory_does_not_depend_on_what_went_before():
    def prepare():
        def run():
            return [torch.ones(100_000, dtype=torch.uint8) for _ in range(400)]

        return run, run

    peaks = [peak_memory(prepare, "cpu")]
    # freed, and kept by malloc, since what lies on top of it is not
    kept = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]
    del kept[:-1]
    peaks.append(peak_memory(prepare, "cpu"))
    assert peaks == pytest.approx([400 * 100_000 / 2**20] * 2, rel=0.1)


@pytest.mark.slow  # trains, generates and starts processes
def test_every_section_prints_a_table_and_writes_its_figures(tmp_path):
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "training.cli", "benchmark", "--rounds", "1", "--lengths", "64", "128"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([*command, "--json", path], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    document = json.loads(path.read_text())
    assert document["sections"].keys() == SECTIONS.keys()
    for section, (title, _) in SECTIONS.items():
        assert f"## {title}\n" in run.stdout
        rows = document["sections"][section]
        assert rows and all(row.keys() == rows[0].keys() for row in rows)
    adamw, muon = document["sections"]["optimizer"]
    assert adamw["of adamw"] == 1 and muon["of adamw"] > 0 and muon["peak MiB"] > 1
    designs = document["sections"]["designs"]
    assert {"SM+LN+G", "SM+R@Stable", "SM+Lin@AERO", "SM+LN+G@HybridNorm-star"} <= {row["design"] for row in designs}
    assert all(row["ms"] > 0 and row["peak MiB"] > 1 for row in designs)
    for row in document["sections"]["entropy"]:
        assert row["plain ms"] > 0 and row["plain MiB"] > 1
    steps = {(row["model"], row["fast CPU"]): row for row in document["sections"]["step"]}
    assert all(row["ms"] > 0 and row["peak MiB"] > 1 for row in steps.values())
    for fast in {fast for _, fast in steps}:
        assert steps["stock", fast]["of stock"] == 1 and steps["SM+R", fast]["of stock, ReLU"] > 0
    assert {row["of plain"] for (_, fast), row in steps.items() if not fast} == {1}
