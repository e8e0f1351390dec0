#!/usr/bin/env bash
# Set-up, then the linters and the tests; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mlinter modeling_lnfree/ --no-progress
.venv/bin/codespell
.venv/bin/deptry .
.venv/bin/mypy
# a file of tests to a process, a process to a core, a thread to a process
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@"
