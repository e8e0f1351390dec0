#!/usr/bin/env bash
# Set-up, then scripts/private_inference.py in .venv/private, which adds CrypTen to .venv; arguments go to the script.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
venv=.venv/private
if [ ! -e "$venv/ready" ]; then
    .venv/bin/python -m venv "$venv"
    base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$base')" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    # what CrypTen 0.4.1 names as requirements cannot be installed any more (sklearn), and it needs none of it here
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install --no-deps crypten==0.4.1
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install omegaconf onnx
    touch "$venv/ready"
fi
exec "$venv/bin/python" scripts/private_inference.py "$@"
