#!/usr/bin/env bash
# What a machine with a GPU is for, in one command: bench/gpu.sh OUT [options]. Builds for that card, runs the tests that need
# one, compute-sanitizer on a small slice, and the benchmark; under nine minutes, and a table of the steps comes last. The
# machine may be bare: its own python3 with torch, nvcc, cmake, ninja, pybind11, pytest; no network. Peers (open_clip_torch,
# ftfy, wcwidth, memeff==0.3.1, siglip-kernel==0.1.2, inf-cl==1.2.1) come as wheels in the folder .whl of this checkout
# (pip download --no-deps -d .whl NAME), or are not measured.
#
#   --tune             measure Triton's block sizes, too, before the benchmark: OUT/tables.json, and used from then on
#   --configs          measure configurations of the sm_90a kernels (csrc/cuda/sm90/config.h), too: OUT/configs/N, each with
#                      the flags that it was built with; choose among them by the floor's share
#   --only A,B,…       of the steps these alone: versions peers build tests memcheck racecheck tune configs bench
#   --skip A,B,…       of the steps all but these
#   --bench "ARGS"     for python -m bench gpu: --only, --max-n, --backend, --bars
#   --tests "ARGS"     for pytest -m gpu
#   --env NAME=VALUE   in the environment of every step, as often as wanted: another configuration of a backend
#   --commit HASH      which commit this is, where there is no .git
#   --seconds S        for all of it (525)
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
total=525 only="" skip="tune,configs" bench_arguments="" test_arguments="" step=""

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$root/bench/gpu.sh"; }
[[ $# -ge 1 && $1 != -* ]] || { usage; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
arguments=("$out" "$@")
cd "$root" || exit 2
while [[ $# -gt 0 ]]; do
  [[ $1 == --tune || $1 == --configs || $# -ge 2 ]] || { echo "gpu.sh: $1 needs a value"; exit 2; }
  case $1 in
    --tune) skip=${skip/tune/} ;;
    --configs) skip=${skip/configs/} ;;
    --only) only=$2 skip="" ;;
    --skip) skip+=",$2" ;;
    --bench) bench_arguments=$2 ;;
    --tests) test_arguments=$2 ;;
    --env) export "${2?}" ;;
    --commit) export BENCH_COMMIT=$2 ;;
    --seconds) total=$2 ;;
    --step) step=$2 ;; # one step, in the process that is timed
    *) echo "gpu.sh: unknown option $1"; exit 2 ;;
  esac
  [[ $1 == --tune || $1 == --configs ]] || shift
  shift
done

export PYTHONPATH="$root:$root/build/peers${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=agg
command -v nvcc >/dev/null || PATH="/usr/local/cuda/bin:$PATH"

missing() {
  local found=0
  need() { "${@:2}" >/dev/null 2>&1 || { echo "gpu.sh: missing: $1"; found=1; }; }
  need "python3" python3 -c ""
  need "python packages torch, numpy, rich, psutil" python3 -c "import torch, numpy, rich, psutil"
  need "nvidia-smi, which comes with the driver of an NVIDIA GPU" nvidia-smi
  need "a GPU that torch sees" python3 -c "import torch; torch.zeros(1, device='cuda').item()"
  return $found
}

step_versions() {
  nvidia-smi
  nvidia-smi -q -d CLOCK,POWER,TEMPERATURE | head -60
  nvcc --version | tail -2
  python3 -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|cmake|ninja|pybind11|setuptools|hypothesis) ' || true
  python3 -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))"
}

step_peers() {
  compgen -G ".whl/*.whl" >/dev/null || { echo "no wheels in .whl: only what is installed is measured"; return 0; }
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target build/peers .whl/*.whl
}

step_build() {
  local archs='import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}-real" + ";90a-real" * ((a, b) == (9, 0)))'
  CUDA_ARCHS=${CUDA_ARCHS:-$(python3 -c "$archs")}
  export CUDA_ARCHS SMARTCLIP_BUILD=1 SMARTCLIP_CUDA=1
  echo "CUDA_ARCHS=$CUDA_ARCHS"
  # What setuptools makes of the metadata is not needed here: cmake alone does it, too.
  python3 setup.py build_ext --inplace ||
    { cmake -S . -B build/gpu -G Ninja -DCUDA_ARCHS="$CUDA_ARCHS" -DSMARTCLIP_CUDA=1 -DPython_EXECUTABLE="$(command -v python3)" \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/smartclip_kernels" && cmake --build build/gpu; } || return
  python3 -m smartclip_kernels.info --sizes 65536 65536 768 --dtype bfloat16
}

step_tests() {
  local files parallel=()
  mapfile -t files < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
  # Compiling Triton's kernels takes longer than running them.
  python3 -c "import xdist" 2>/dev/null && parallel=(-n 8)
  # shellcheck disable=SC2086
  python3 -m pytest -q -m gpu -p no:cacheprovider -o timeout=90 -o timeout_method=thread --durations=10 \
    ${parallel[@]+"${parallel[@]}"} $test_arguments "${files[@]}"
}

backends() { python3 -c "from bench.__main__ import gpu_backends as b; print(*b('cuda'))"; }

sanitize() { # TOOL
  command -v compute-sanitizer >/dev/null || { echo "missing: compute-sanitizer, of the CUDA toolkit"; return 1; }
  local names
  names=$(backends) && [[ -n $names ]] || { echo "no backend runs on this GPU"; return 1; }
  # Out-of-bounds accesses land in torch's own cache of memory unless there is none.
  # shellcheck disable=SC2086
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
    python3 -m bench.slice ${names%% *}
}
step_memcheck() { sanitize memcheck; }
step_racecheck() { sanitize racecheck; }

step_tune() {
  python3 -m bench tune --seconds "$((STEP_SECONDS > 60 ? STEP_SECONDS - 40 : STEP_SECONDS / 3))" && cp smartclip_kernels/backends/triton/tables.json "$out/"
}

# Built side by side, measured one after the other, the first as it is now. One that fails stops no other.
step_configs() {
  python3 -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability() != (9, 0))' ||
    { echo "the kernels of sm_90a run on compute capability 9.0 alone"; return 1; }
  local flags=("" -DSK_SM90_LAG=1 -DSK_SM90_LAG=3 -DSK_SM90_LAG=0 -DSK_SM90_GROUP=1024 -DSK_SM90_GROUP=4096 -DSK_SM90_WALK=8 -DSK_KEEPS_HALF=1) i bad=0
  for i in "${!flags[@]}"; do
    { cmake -S . -B "build/configs/$i" -G Ninja -DCUDA_ARCHS="90-real;90a-real" -DSMARTCLIP_CUDA=1 -DCMAKE_CUDA_FLAGS="${flags[i]}" \
        -DPython_EXECUTABLE="$(command -v python3)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/build/configs/$i/lib" &&
      cmake --build "build/configs/$i"; } >"$out/config-$i.txt" 2>&1 &
  done
  wait
  mkdir -p build/configs/before && cp smartclip_kernels/_C*.so build/configs/before/ || return
  for i in "${!flags[@]}"; do
    echo "configuration $i: ${flags[i]:-as it is}"
    cp "build/configs/$i/lib"/_C*.so smartclip_kernels/ || { tail -5 "$out/config-$i.txt"; bad=1; continue; }
    mkdir -p "$out/configs/$i" && echo "${flags[i]:-as it is}" >"$out/configs/$i/flags.txt"
    python3 -m bench gpu --alone --backend cuda --seconds $(((STEP_SECONDS - 80) / ${#flags[@]})) --out "$out/configs/$i" | tail -30 || bad=1
  done
  cp build/configs/before/_C*.so smartclip_kernels/ && return $bad
}

step_bench() {
  # shellcheck disable=SC2086
  python3 -m bench gpu --seconds "$((STEP_SECONDS > 90 ? STEP_SECONDS - 60 : STEP_SECONDS / 3))" --out "$out" $bench_arguments
}

if [[ -n $step ]]; then
  "step_$step"
  exit
fi

wanted() { [[ (-z $only || ",$only," == *",$1,"*) && ",$skip," != *",$1,"* ]]; }

failed=0 summary=""
say() { printf '%s\n' "$*" | tee -a "$out/log.txt"; }
run() { # STEP LIMIT: its output goes to OUT/current.txt, and from there, where it is not too long, to OUT/log.txt
  local name=$1 limit=$2 left=$((total - SECONDS)) start=$SECONDS code status
  wanted "$name" || return 0
  ((limit <= left)) || limit=$left
  say "=== $name, at most $limit s"
  if ((limit < 5)); then
    status="no time left" code=1
  else
    STEP_SECONDS=$limit timeout --kill-after=10 "$limit" bash bench/gpu.sh "${arguments[@]}" --step "$name" >"$out/current.txt" 2>&1
    code=$?
    status="ok"
    ((code == 0)) || status="exit status $code"
    ((code != 124 && code != 137)) || status="timed out"
    tail -c 1500000 "$out/current.txt" >>"$out/log.txt"
    tail -n "$([[ $name == bench || $code -ne 0 ]] && echo 75 || echo 4)" "$out/current.txt"
    rm -f "$out/current.txt"
  fi
  ((code == 0)) || failed=1
  summary+=$(printf '%-10s %-16s %5d' "$name" "$status" "$((SECONDS - start))")$'\n'
}

: >"$out/log.txt"
missing | tee -a "$out/log.txt"
((PIPESTATUS[0] == 0)) || exit 2
run versions 30
run peers 40
run build 200
run tests 130
run memcheck 50
run racecheck 50
if wanted tune; then run tune $(((total - SECONDS) / 2)); fi
if wanted configs; then run configs $(((total - SECONDS) * 2 / 3)); fi
run bench $((total - SECONDS))
{
  printf '%-10s %-16s %5s\n' step status seconds
  printf '%s' "$summary"
} | tee "$out/table.txt"
exit $failed
