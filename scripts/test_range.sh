#!/usr/bin/env bash
# The tests on the oldest and the newest supported transformers, and the error of one that is too old, each in a virtual
# environment that takes everything but transformers from .venv. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh test
base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in 5.18.0 5.23.0 5.24.0 4.57.1; do
    venv=.venv/range/$version
    if [ ! -e "$venv/ready" ]; then
        .venv/bin/python -m venv "$venv"
        echo "$base" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
        "$venv/bin/python" -m pip --disable-pip-version-check --quiet install "transformers==$version"
        # of .venv's own .pth files, the editable install's among them, none is read
        "$venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps --editable .
        touch "$venv/ready"
    fi
    echo "== transformers $("$venv/bin/python" -c 'import transformers; print(transformers.__version__)')"
    if [ "$version" = 4.57.1 ]; then
        if message=$("$venv/bin/python" -c 'import modeling_lnfree' 2>&1); then
            echo "transformers $version should have been refused" >&2
            exit 1
        fi
        echo "$message" | tail -n 1 | grep "need transformers 5.18 or newer, found $version"
    else
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/python" -m pytest --numprocesses logical --maxprocesses 4 \
            --dist loadfile "$@"
    fi
done
