#!/usr/bin/env bash
# Set-up, then the paper's four GPT variants: trained, exported, loaded back and compared (scripts/quickstart.py). Goes
# on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py
