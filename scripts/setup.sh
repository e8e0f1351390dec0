#!/usr/bin/env bash
# Makes .venv at the project's root and installs the project with its tests into it. Does nothing where that is done.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version 2>&1); name another one by PYTHON=..." >&2
    exit 1
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
PIP=(.venv/bin/python -m pip --disable-pip-version-check --quiet)

# torch first: left to itself, pip takes a CUDA build of several GB on Linux, also where there is no GPU.
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if [ "$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
        "${PIP[@]}" install torch
    # A version with +cpu is never a CUDA build. It is found where pip is configured to look for one; else uv knows where.
    elif ! "${PIP[@]}" install 'torch==2.13.0+cpu' 2>/dev/null; then
        "${PIP[@]}" install uv
        if ! .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu torch; then
            echo "setup: no CPU build of torch was found; install one into .venv and run this again" >&2
            exit 1
        fi
    fi
fi

# what an editable install has written down
installed=.venv/lnfree-installed
if ! cmp -s pyproject.toml "$installed"; then
    "${PIP[@]}" install --editable '.[test]'
    cp pyproject.toml "$installed"
fi
