#!/usr/bin/env bash
# All that there is to do on a machine with an NVIDIA GPU, into one folder; docs/gpu.md says what comes out.
#
#   benchmarks/gpu_machine.sh results/h100                    build, info, tests, measure
#   benchmarks/gpu_machine.sh results/h100 tests measure      only these
#
# Nothing is installed: python3 (or PYTHON=...) needs PyTorch with CUDA, Triton, pytest, pybind11, cmake and ninja, and
# nvcc has to be on PATH or under CUDA_HOME. Every step has a limit of time (BUILD_S, TESTS_S, MEASURE_S) and goes on
# where the one before failed; at the end the logs are packed into logs.tar.gz.
set -uo pipefail
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 2; }
PATH=$(dirname "$python"):$PATH # cmake and ninja may be packages of the same environment
folder=${1:?folder for the results}
shift
mkdir -p "$folder/logs"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

# step NAME SECONDS COMMAND...: runs it, shows and keeps its output, and says how it ended
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$folder/logs/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed=1
  echo "== $name: status $status after $((SECONDS - start)) s" | tee -a "$folder/logs/steps.log"
}

# Without setup.py, whose metadata wants a recent setuptools.
build() {
  set -e
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DP2PFAST_CUDA="${P2PFAST_CUDA:-1}" \
    -DP2PFAST_WERROR=OFF -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build build/gpu --target _C
  cp build/gpu/_C.*.so p2pfast/
}
export -f build
export python

processes=$(($(nproc) > 2 ? $(nproc) - 2 : 1))
side_by_side=()
"$python" -c 'import xdist' 2>/dev/null && side_by_side=(-n "$processes" --dist worksteal)

for name in "${@:-all}"; do
  case $name in build | info | tests | measure | all) ;; *)
    echo "$name: choose build, info, tests, measure or all" >&2
    exit 2
    ;;
  esac
done
wanted() { [[ " ${*:2} " == *" $1 "* || " ${*:2} " == *" all "* ]]; }
wanted build "${@:-all}" && step build "${BUILD_S:-300}" bash -c build
wanted info "${@:-all}" && step info 60 "$python" -m p2pfast info
wanted tests "${@:-all}" &&
  step tests "${TESTS_S:-280}" "$python" -m pytest -q -m gpu "${side_by_side[@]}" -p no:cacheprovider tests
wanted measure "${@:-all}" && step measure "${MEASURE_S:-500}" "$python" benchmarks/gpu.py "$folder"
tar -C "$folder" -czf "$folder/logs.tar.gz" --exclude=logs.tar.gz --exclude=gpu.json --exclude=gpu.md .
cat "$folder/logs/steps.log"
exit "$failed"
