#!/usr/bin/env bash
# Set-up, then the long tests that scripts/test.sh leaves out: processes, long contexts, browsers.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
.venv/bin/python -m pytest -m slow "$@"
