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
.venv/bin/python -m pytest "$@"
