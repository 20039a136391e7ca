#!/usr/bin/env bash
# Everything that needs a GPU, in two calls: quick (under 300 s), then full (under 500 s); the most valuable first.
#
#   [PROFILE=full] [PARTS="machine parity"] [WHEELS=FOLDER] [CACHE=FOLDER] [DRY=1] bash benchmarks/gpu_acceptance.sh OUT_DIR
#
# For a bare machine without network: torch >= 2.11, triton >= 3.6, Python 3.10 to 3.12, pytest, pytest-xdist. What it
# lacks comes from the wheels in $WHEELS (benchmarks/gpu_wheels.sh), put in a folder of their own; kernels in $CACHE
# (benchmarks/triton_cache.py) need no compilation, they are copied into TRITON_CACHE_DIR. PYTHON names the
# interpreter, SGPO_COMMIT the commit where the copy has no git, BUDGET the seconds of all parts together. PARTS names
# parts of either profile, in their order. DRY=1 runs the same commands on a CPU: small shapes, GPU tests only collected.
# Parts run one after the other, so that none disturbs the times of another; each has a limit of its own and is told to
# stop by SIGINT, 5 seconds before it is killed. OUT_DIR gets log.txt (all output), rows.jsonl (raw rows, as soon as they
# are known) and summary.txt (which part ended how). TERM and INT stop the running part and end the script.
# Exit status: 0 if every part that ran passed, 1 if not, 2 for errors of usage.
set -um  # -m: children in the background keep SIGINT
[ $# -eq 1 ] || { echo "usage: bash benchmarks/gpu_acceptance.sh OUT_DIR" >&2; exit 2; }
QUICK="machine parity-real parity sgpo stages ceilings memory"
FULL="machine tuning policy divergence train-3b train-7b peers-compile peers-ours peers-liger peers-cut peers-fla colocated rollouts"
PATIENCE=${DRY:+20}  # how much longer a dry run may take: a busy CPU says nothing about a GPU's times
: "${PATIENCE:=1}"
case ${PROFILE:=quick} in
  quick) : "${PARTS:=$QUICK}" "${BUDGET:=$((290 * PATIENCE))}" ;;
  full) : "${PARTS:=$FULL}" "${BUDGET:=$((490 * PATIENCE))}" ;;
  *) echo "error: PROFILE is quick or full, not $PROFILE." >&2; exit 2 ;;
esac
for name in $PARTS; do
  [[ " $QUICK $FULL " == *" $name "* ]] || { echo "error: no part $name; there are $QUICK $FULL." >&2; exit 2; }
done
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) SITE=$(mktemp -d)
WHEELS=${WHEELS:+$(cd "$WHEELS" && pwd)} CACHE=${CACHE:+$(cd "$CACHE" && pwd)}
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/kernels:$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
# Lines that the log keeps and the terminal does not need.
DULL='^$|^USDT:|PASSED|^tests/[^ ]*( <- [^ ]*)? *$|interpreter.py:|output = op'
ROWS=$OUT/rows.jsonl LOG=$OUT/log.txt SUMMARY=$OUT/summary.txt
START=$SECONDS STATUS=0 CHILD=
declare -A IMPORTS
touch "$ROWS" "$LOG" "$SUMMARY"

# What a dry run puts in the place of a GPU and of real shapes.
DEVICE=cuda SHAPE=qwen2.5-7b SMALL=() TESTS=() MEMORY=() TUNING=() STAGES=() STEP3=(--shape qwen2.5-3b) STEP7=() BESIDE=()
ROLLOUTS=(--eager --problems 32 --max-new-tokens 128 --rounds 8) SECOND=0.5 TUNE=70
if [ -n "${DRY:-}" ]; then
  export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
  DEVICE=cpu SHAPE=tiny SMALL=(--rows 64 --summary-rows 64) TESTS=(--collect-only -qq) MEMORY=(--rows 64,128)
  TUNING=(--rows 8) STAGES=(--rows 16) STEP3=(--tiny --tokens 64) STEP7=(--tiny --tokens 64)
  BESIDE=(--tiny --state cpu_offload --rollouts 4) ROLLOUTS=(--quick) SECOND=0.05 TUNE=1
fi

say() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }

left() { echo $((BUDGET - SECONDS + START)); }

enough() {  # enough NAME LIMIT_S: whether a third of the limit is left; if not, the part is only noted
  [ "$(left)" -lt $(($2 / 3)) ] || return 0
  say "$(printf '%-14s not run: %d s are left' "$1" "$(left)")"
  return 1
}

part() {  # part NAME LIMIT_S COMMAND...: @SECONDS in the command is what the program itself may take
  enough "$1" "$2" || return
  local name=$1 limit=$(($2 * PATIENCE < $(left) ? $2 * PATIENCE : $(left))) begin=$SECONDS from code
  shift 2
  set -- "${@//@SECONDS/$((limit > 20 ? limit - 12 : limit))}"
  printf '\n=== %s\n' "$name" | tee -a "$LOG"
  printf '%s\n' "$*" >> "$LOG"
  from=$(stat -c %s "$LOG")
  timeout -s INT --kill-after=5 "$limit" "$@" >> "$LOG" 2>&1 &
  CHILD=$!
  wait "$CHILD"
  code=$?
  CHILD=
  [ $code -eq 0 ] || STATUS=1
  tail -c +$((from + 1)) "$LOG" | grep -vE "$DULL" | cut -c1-180 | tail -n 32 | tail -c 3600
  say "$(printf '%-14s exit %3d after %3d s of %3d; %d rows' "$name" $code $((SECONDS - begin)) "$limit" "$(wc -l < "$ROWS")")"
  return $code
}

finish() {
  trap '' TERM INT
  [ -z "$CHILD" ] || { kill -INT "$CHILD"; wait "$CHILD"; STATUS=1; say "stopped by a signal while a part ran"; }
  say "$(printf '%-14s exit %d after %d s of %d; %d rows' all $STATUS $((SECONDS - START)) "$BUDGET" "$(wc -l < "$ROWS")")"
  rm -rf "$SITE"
}
trap finish EXIT
trap 'exit 1' TERM INT

module() { part "$1" "$2" "$PYTHON" -m "benchmarks.$3" --out "$ROWS" "${@:4}"; }

tests() {  # tests NAME LIMIT_S WORKERS EXPRESSION
  part "$1" "$2" "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider --tb=short -rfE --durations=6 -n "$3" --dist worksteal \
    -k "$4" "${TESTS[@]}" tests/sgpo_kernels/test_cuda.py
}

run() {  # run NAME LIMIT_S OP MIX PEERS [OPTIONS]
  module "$1" "$2" run --device $DEVICE --op "$3" --shape $SHAPE --mix "$4" --states calibrated --peers "$5" \
    "${SMALL[@]}" --rounds 5 --seconds 15 "${@:6}"
}

importing() {  # importing MODULE NAME LIMIT_S COMMAND...: the part where the module can be imported, else a note
  enough "$2" "$3" || return
  : "${IMPORTS[$1]:=$(timeout --kill-after=5 60 "$PYTHON" -c "import $1" >> "$LOG" 2>&1 && echo yes || echo no)}"
  [ "${IMPORTS[$1]}" = no ] || { module "${@:2}"; return; }
  say "$(printf '%-14s not run: %s cannot be imported' "$2" "$1")"
  return 1
}

one() {  # one NAME
  case $1 in
    machine) part "$1" 40 "$PYTHON" -c '
import os, torch, triton
cuda = torch.cuda.is_available()
print("torch", torch.__version__, "triton", triton.__version__, "cores", os.cpu_count())
print(*(line.strip() for line in open("/proc/meminfo").readlines()[:3]))
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info()) if cuda else print("no GPU")
assert cuda or os.environ.get("DRY")' ;;
    parity-real) tests "$1" 90 2 "real_shapes or offsets" ;;
    parity) OMP_NUM_THREADS=1 tests "$1" 90 14 "not real_shapes and not offsets" ;;
    sgpo) run "$1" 75 sgpo sgpo ours-triton,ours-triton-live,ours-triton-nologits,naive,liger-fused ;;
    stages) module "$1" 45 stages --device $DEVICE --shape $SHAPE "${STAGES[@]}" ;;
    ceilings) module "$1" 30 ceilings --device $DEVICE --seconds $SECOND ;;
    memory) module "$1" 40 memory_at_scale --device $DEVICE --shape $SHAPE "${MEMORY[@]}" ;;
    tuning) module "$1" 90 tune_blocks --device $DEVICE --shape $SHAPE --seconds $TUNE "${TUNING[@]}" ;;
    policy) run "$1" 45 policy policy ours-triton,ours-triton-live,ours-triton-nologits,naive,liger-fused ;;
    divergence) run "$1" 60 divergence distill ours-triton,ours-triton-live,naive,liger-fused --states calibrated,spread:0.1 ;;
    train-3b)
      importing benchmarks.train_step "$1" 130 train_step --device $DEVICE "${STEP3[@]}" --states full,8bit,cpu_offload --seconds @SECONDS ;;
    train-7b)
      importing benchmarks.train_step "$1" 90 train_step --device $DEVICE "${STEP7[@]}" --states 8bit --seconds @SECONDS ;;
    peers-compile) TORCHDYNAMO_DISABLE=${DRY:+1} run "$1" 60 sgpo sgpo compile ;;
    peers-ours) run "$1" 45 sgpo sgpo ours-torch,ours-torch-live,ours-triton-live-fine ;;
    peers-liger) run "$1" 60 sgpo sgpo liger ;;
    peers-cut) run "$1" 40 policy policy cut-cross-entropy ;;
    peers-fla) run "$1" 40 divergence distill fla ;;
    colocated) importing vllm "$1" 150 colocated "${BESIDE[@]}" ;;
    rollouts)
      importing vllm "$1" 180 rollouts --device $DEVICE --placements inprocess --seconds @SECONDS "${ROLLOUTS[@]}" ;;
  esac
}

install() { "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$@"; }

if [ -n "$WHEELS" ]; then
  # All at once is quicker; a wheel that pip refuses would keep the others out.
  install "$WHEELS"/*.whl >> "$LOG" 2>&1 || for wheel in "$WHEELS"/*.whl; do
    install "$wheel" >> "$LOG" 2>&1 || say "refused: ${wheel##*/}"
  done
  say "$(printf '%-14s %d packages after %d s' wheels "$(find "$SITE" -maxdepth 1 -name '*.dist-info' | wc -l)" $((SECONDS - START)))"
fi
if [ -n "$CACHE" ]; then
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/triton}
  say "$("$PYTHON" -m benchmarks.triton_cache "$CACHE" --place "$TRITON_CACHE_DIR" 2>> "$LOG" || echo "cache: not placed, see $LOG")"
fi
for name in $PARTS; do
  one "$name"
  [ "$name" != machine ] || [ $STATUS -eq 0 ] || { echo "error: $PYTHON needs torch, triton and a GPU that torch can see; see $LOG." >&2; exit 2; }
done
exit $STATUS
