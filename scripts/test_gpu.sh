#!/usr/bin/env bash
# On a machine with a GPU, in nine minutes: what it computes, what that takes, and the paper's GPT-2 in four variants at
# once. No set-up and no network: PYTHON has torch and transformers. Writes gpu.json and entropy.png into OUT (default:
# runs/gpu). `bash scripts/test_gpu.sh --tiny` tries all of it on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
if [ "${1:-}" != --tiny ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "scripts/test_gpu.sh: torch sees no CUDA GPU here; nothing was run" >&2
    exit 1
fi
# what is made on the way: corpus, tokens, models, compiled code
HF_HOME=$(mktemp -d)
trap 'rm -rf "$HF_HOME"' EXIT
export HF_HOME HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
export TORCHINDUCTOR_CACHE_DIR=$HF_HOME/compiled PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" scripts/test_gpu.py --output "${OUT:-runs/gpu}" "$@"
