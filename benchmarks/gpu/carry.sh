#!/usr/bin/env bash
# What a machine without a network needs to run run.sh, into .carry, which git ignores: bash benchmarks/gpu/carry.sh
# It is for x86-64 with Python 3.12 and torch; set WHEELS to other packages, PYTHON_VERSION to another Python.
# model.gguf is the first four layers of SmolLM2-135M-Instruct in few bits: all of it would be too large to carry.
set -euo pipefail
cd "$(dirname "$0")/../.."
LIMIT=60000000 # bytes, what such a machine takes in one go
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-transformers gguf pydantic pydantic-core annotated-types typing-inspection platformdirs}
mkdir -p .carry
rm -f .carry/*.whl
for name in $WHEELS; do
  version=$("$PYTHON" -m pip show "$name" | sed -n 's/^Version: //p')
  "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d .carry "$name==$version"
done
if [ ! -e .carry/model.gguf ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$PYTHON" -m billhook prune demo --method layerchop --drop 4-29 --no-look -o "$scratch/first"
  "$PYTHON" -m billhook export "$scratch/first" --quantize Q4_0 -o .carry/model.gguf
fi
size=$(du -sb .carry | cut -f1)
echo ".carry has $size bytes"
[ "$size" -le "$LIMIT" ] || { echo "that is more than $LIMIT: leave something out (WHEELS)"; exit 1; }
