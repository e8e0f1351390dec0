#!/usr/bin/env bash
# Set-up, then the paper's four GPT variants: trained, compared, exported and loaded back. Goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
for variant in SM+LN+G SM+LN+R SM+G SM+R; do
    .venv/bin/lnfree train training/recipes/quick.yaml "variant=$variant" "output_dir=runs/quick/$variant"
done
for variant in SM+LN+G SM+LN+R SM+G SM+R; do
    slug=$(echo "$variant" | tr '[:upper:]+' '[:lower:]-')
    .venv/bin/lnfree export "runs/quick/$variant" "runs/quick/exports/lnfree-gpt2-$slug-t128"
done
.venv/bin/lnfree compare runs/quick
