#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, the most valuable first; results are written as they come.
#
#   bash benchmarks/gpu_acceptance.sh OUT_DIR
#
# For a bare machine without network: torch >= 2.11, triton >= 3.6, Python 3.10 to 3.12, pytest. Missing wheels
# (pytest, hypothesis, liger-kernel, ...) are installed from the folder $WHEELS, if it is set. PYTHON names the
# interpreter. OUT_DIR gets log.txt (all output), rows.jsonl (raw rows) and summary.txt (which part ended how). Exit
# status: 0 if every part passed, else 1.
set -u
[ $# -eq 1 ] || { echo "usage: bash benchmarks/gpu_acceptance.sh OUT_DIR" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
ROWS=$OUT/rows.jsonl LOG=$OUT/log.txt SUMMARY=$OUT/summary.txt
START=$SECONDS STATUS=0

part() {  # part NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$LOG"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || STATUS=1
  printf '%-12s exit %3d after %3d s of %3d\n' "$name" "$code" $((SECONDS - begin)) "$limit" | tee -a "$SUMMARY"
}

if [ -n "${WHEELS:-}" ]; then
  part wheels 60 "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
part machine 20 "$PYTHON" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
[ $STATUS -eq 0 ] || { echo "error: $PYTHON needs torch, triton and a GPU that torch can see; see $LOG." >&2; exit 2; }
part parity 100 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/sgpo_kernels
part sgpo 75 "$PYTHON" -m benchmarks.run --device cuda --op sgpo --shape qwen2.5-7b --mix sgpo --states calibrated --rounds 5 --out "$ROWS"
part memory 40 "$PYTHON" -m benchmarks.memory_at_scale --out "$ROWS"
part ceilings 25 "$PYTHON" -m benchmarks.ceilings --out "$ROWS" --seconds 0.5
part blocks 45 "$PYTHON" -m benchmarks.tune_blocks --out "$ROWS"
"$PYTHON" -c 'import deepspeed, transformers, pydantic' >> "$LOG" 2>&1
if [ $? -eq 0 ]; then
  part train_step 150 "$PYTHON" -m benchmarks.train_step --device cuda --seconds 135 --out "$ROWS"
else
  echo 'train_step   not run: deepspeed, transformers or pydantic cannot be imported' | tee -a "$SUMMARY"
fi
part policy 35 "$PYTHON" -m benchmarks.run --device cuda --op policy --shape qwen2.5-7b --mix policy --states calibrated --rounds 5 --out "$ROWS"
part divergence 45 "$PYTHON" -m benchmarks.run --device cuda --op divergence --shape qwen2.5-7b --mix distill --states calibrated,spread:0.1 --rounds 3 --out "$ROWS"
# The last ones take what is left of nine minutes; vLLM alone starts for a minute.
last() {  # last NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 left=$((530 - SECONDS + START))
  shift 2
  if [ $IMPORTED -ne 0 ]; then
    printf '%-12s not run: vllm cannot be imported\n' "$name" | tee -a "$SUMMARY"
  elif [ $left -lt 90 ]; then
    printf '%-12s not run: %d s are left\n' "$name" $left | tee -a "$SUMMARY"
  else
    part "$name" $((left < limit ? left : limit)) "$@"
  fi
}
"$PYTHON" -c 'import vllm' >> "$LOG" 2>&1
IMPORTED=$?
last colocated 150 "$PYTHON" -m benchmarks.colocated --out "$ROWS"
last rollouts 180 "$PYTHON" -m benchmarks.rollouts --device cuda --eager --problems 32 --max-new-tokens 128 --rounds 8 --placements inprocess --out "$ROWS"
printf 'all          %d s\n' $((SECONDS - START)) | tee -a "$SUMMARY"
exit $STATUS
