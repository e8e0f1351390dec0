"""scripts/test_gpu.sh where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from ..conftest import ROOT


def run(**environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", "scripts/test_gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow  # a process each
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_without_a_gpu_it_is_one_line_and_with_a_cpu_in_its_place_the_tests_pass():
    without = run()
    assert without.returncode == 1
    assert without.stderr == "scripts/test_gpu.sh: torch sees no CUDA GPU here; nothing was run\n"
    tried = run(LNFREE_GPU_DEVICE="cpu")
    assert tried.returncode == 0 and " passed" in tried.stdout and "skipped" not in tried.stdout
