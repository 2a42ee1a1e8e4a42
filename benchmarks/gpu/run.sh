#!/usr/bin/env bash
# All of it, on the card of this machine or, with --tiny, in miniature: bash benchmarks/gpu/run.sh [OPTIONS of run.py]
# What carry.sh has left in .carry goes before the machine's own packages.  OUT is where gpu.csv is kept (build/gpu).
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if compgen -G '.carry/*.whl' >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .carry/*.whl
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
