#!/usr/bin/env bash
# At most ten minutes on one GPU, everything installed before (zephyr_jax[cuda] or [cuda13], torch, trl,
# and flash-attn if there is one): cuDNN attention against the reference, then SFT and DPO of a 1B model
# next to torch and TRL, with peak memory next to the plan's. `--toy` tries the script on a CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
toy=${1:-}
if [ "$toy" = --toy ]; then
  export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
  "$python" -m pytest -q -n 0 tests/models/test_attention_gpu.py -k float64
else
  PYTHONPATH=tests/models:tests "$python" -c \
    "import conftest, test_attention_gpu as t; t.compare_on_gpu(); print('cuDNN equals the reference')" ||
    echo "cuDNN attention FAILED"
fi
for kind in sft dpo; do
  for side in ours theirs; do
    timeout 130 "$python" benchmarks/gpu/step.py "$side" "$kind" $toy || echo "$side $kind FAILED"
  done
done
