#!/usr/bin/env bash
# Environments of their own for the peers, under runs/peers: `benchmarks/peers/install.sh [kronfluence] [bergson]`.
# torch, transformers and numpy have the versions of constraints.txt, so that only the library differs.
# torchvision and torchaudio, which both peers require and neither uses here, are left out: PyPI's CUDA builds
# beside a CPU build of torch break every import of a transformers model.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"

environment() {  # NAME PACKAGE REQUIREMENT...
  local name="$1" package="$2"; shift 2
  local folder="runs/peers/$name"
  [ -f "$folder/.ok" ] && return
  "$PYTHON" -m venv "$folder"
  "$folder/bin/pip" install -q -c constraints.txt torch transformers numpy safetensors datasets "$@"
  "$folder/bin/pip" install -q --no-deps "$package"
  touch "$folder/.ok"
}

[ $# -gt 0 ] || set -- kronfluence bergson
for peer in "$@"; do
  case "$peer" in
    kronfluence) environment kronfluence kronfluence==1.0.1 accelerate einops einconv opt-einsum tqdm ;;
    bergson) environment bergson bergson==2.5.1 accelerate jinja2 jaxtyping ml_dtypes natsort scipy peft petname \
      pyarrow pyyaml simple-parsing torchopt bitsandbytes ;;
    *) echo "unknown peer: $peer" >&2; exit 2 ;;
  esac
done
