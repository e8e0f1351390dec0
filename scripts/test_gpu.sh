#!/usr/bin/env bash
# On a machine with a GPU: what it computes, then what it takes. No set-up and no network: PYTHON has torch and
# transformers; `LNFREE_GPU_DEVICE=cpu bash scripts/test_gpu.sh` tries the tests alone where there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
DEVICE=${LNFREE_GPU_DEVICE:-cuda}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "scripts/test_gpu.sh: torch sees no CUDA GPU here; nothing was run" >&2
    exit 1
fi
LNFREE_GPU_DEVICE=$DEVICE "$PYTHON" -m pytest -m gpu -q tests/gpu
if [ "$DEVICE" = cuda ]; then
    timeout 240 "$PYTHON" -m training.cli benchmark entropy training-entropy step --sizes gpt2 --rounds 3 --compiled --json gpu.json
fi
