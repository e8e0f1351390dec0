#!/usr/bin/env bash
# Set-up, then the long tests that scripts/test.sh leaves out: processes, long contexts, browsers, notebooks. The page in
# a browser needs chromium and chromedriver, several nodes need Slurm and root; without them those tests are skipped, and
# named.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh test
# on top of .venv, where the tests of scripts/test.sh would read what torchao writes to stderr
venv=.venv/slow
if [ ! -e "$venv/ready" ]; then
    .venv/bin/python -m venv "$venv"
    base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$base')" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    touch "$venv/ready"
fi
"$venv/bin/python" -m pip --disable-pip-version-check --quiet install --constraint constraints.txt gradio ipykernel nbclient selenium torchao triton uv
# the kernel for GPUs runs in Triton's interpreter
TRITON_INTERPRET=1 "$venv/bin/python" -m pytest -m slow -rs "$@"
