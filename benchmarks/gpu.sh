#!/usr/bin/env bash
# Every pass on one machine with a GPU: `benchmarks/gpu.sh [OUT]`; `benchmarks/gpu.sh --cpu [OUT]` tries the script
# without one. Needs torch, transformers, numpy and pyarrow, and this repository; installs nothing.
# Writes OUT/results/gpu.md: fit and scores beside the plain loop of one backward a sequence (10 million tracked parameters,
# float32), then seconds, achieved TFLOP/s and the share of the card's measured matrix rate at 3, 10 and 100 million: models in
# float32 and in bfloat16, statistics in float32 and in TF32. What fails is told, and the rest still runs.
set -euo pipefail
cd "$(dirname "$0")/.."
DEVICE=cuda; SIZE=(--tokens 512 --sequences 64 --batch-tokens 16384); PEERS=(--size "10 M" --tokens 512 --train 64)
if [ "${1:-}" = --cpu ]; then DEVICE=cpu; SIZE=(--quick --sequences 16); PEERS=(--quick); shift; fi
OUT="${1:-runs/gpu}"
FAILED=0
mkdir -p "$OUT"

run() {  # NAME MODULE OPTION...
  local name="$1" module="$2"; shift 2
  "${PYTHON:-python3}" -m "$module" --device "$DEVICE" --out "$OUT/$name" "$@" > "$OUT/$name.log" 2>&1 ||
    { FAILED=1; echo "$name failed:" >&2; tail -n 20 "$OUT/$name.log" >&2; }
}

run peers benchmarks.peers "${PEERS[@]}"
for DTYPE in bfloat16 float32; do
  for TF32 in --tf32 ""; do
    run "$DTYPE$TF32" benchmarks.floor --dtype "$DTYPE" $TF32 "${SIZE[@]}"
  done
done
"${PYTHON:-python3}" -m benchmarks.gpu_report "$OUT" --device "$DEVICE"
exit "$FAILED"
