#!/usr/bin/env bash
# Makes .venv at the project's root and installs the project into it, in the versions of constraints.txt; `test` adds
# what the linters and the tests need. Does nothing where that is done. VENV=... is another environment, there or not.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version 2>&1); name another one by PYTHON=..." >&2
    exit 1
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet)

# torch first: left to itself, pip takes a CUDA build of several GB on Linux, also where there is no GPU.
if ! "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
    version=$(grep '^torch==' constraints.txt)
    if [ "$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
        "${PIP[@]}" install --constraint constraints.txt torch
    # A version with +cpu is never a CUDA build. It is found where pip is configured to look for one; else uv knows where.
    elif ! "${PIP[@]}" install --constraint constraints.txt "$version+cpu" 2>/dev/null; then
        "${PIP[@]}" install --constraint constraints.txt uv
        if ! "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --torch-backend cpu "$version"; then
            echo "setup: no CPU build of torch was found; install one into $VENV and run this again" >&2
            exit 1
        fi
    fi
fi

# what an editable install has written down
extra=${1:-}
installed=$VENV/lnfree-installed$extra
if ! cat pyproject.toml constraints.txt | cmp -s - "$installed"; then
    "${PIP[@]}" install --constraint constraints.txt --editable ".${extra:+[$extra]}"
    cat pyproject.toml constraints.txt > "$installed"
fi
