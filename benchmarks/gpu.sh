#!/usr/bin/env bash
# Every pass on one machine with a GPU: `benchmarks/gpu.sh [OUT]`; `benchmarks/gpu.sh --cpu [OUT]` tries the script
# without one. Needs torch, transformers, numpy and pyarrow, and this repository; installs nothing.
# Writes OUT/results/gpu.md: seconds, achieved TFLOP/s and the share of the card's measured matrix rate, at 3, 10 and
# 100 million tracked parameters: models in float32 and in bfloat16, statistics in float32 and in TF32.
set -euo pipefail
cd "$(dirname "$0")/.."
DEVICE=cuda; SIZE=(--tokens 512 --sequences 64 --batch-tokens 16384)
if [ "${1:-}" = --cpu ]; then DEVICE=cpu; SIZE=(--quick --sequences 16); shift; fi
OUT="${1:-runs/gpu}"
mkdir -p "$OUT"
for DTYPE in float32 bfloat16; do
  for TF32 in "" --tf32; do
    NAME="$DTYPE$TF32"
    "${PYTHON:-python3}" -m benchmarks.floor --device "$DEVICE" --dtype "$DTYPE" $TF32 --out "$OUT/$NAME" "${SIZE[@]}" \
      > "$OUT/$NAME.log" 2>&1 || { tail -n 20 "$OUT/$NAME.log" >&2; exit 1; }
  done
done
"${PYTHON:-python3}" -m benchmarks.gpu_report "$OUT" --device "$DEVICE"
