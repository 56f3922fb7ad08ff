#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One command for a machine with an NVIDIA GPU: builds, runs the GPU's tests, measures, then runs the other tests.
#   bash benchmarks/run_gpu.sh [FOLDER]
# Leaves in the folder (default: benchmarks/results/gpu), most important first, so that a run cut short keeps it:
#   build.log, tests.log, tests.xml       what was built, what passed
#   bench.json                            the whole call and the kernels against PyTorch; per contender the launches and
#                                         waits of the host and the kernels that took the time (the profile's summary)
#   kernels.json                          kernels at 64 M pixels
#   training_lidc.json, training.json     training images per second: lidc's network, the published one
#   compiled/                             the call against torch.compile, which compiles for minutes
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$repository/benchmarks/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
# A machine is lent for ten minutes at a time.
deadline=$((SECONDS + ${BERDIFF_FAST_BENCH_SECONDS:-570}))
export BERDIFF_FAST_CUDA=1 BERDIFF_FAST_CUDA_ARCHS="${BERDIFF_FAST_CUDA_ARCHS:-90}"
python3 -m pip list 2>/dev/null | grep -iE "^(setuptools|pybind11|cmake|torch|triton|numpy|monai|accelerate) " >"$out/build.log"
python3 -m pip install --no-build-isolation --no-deps "$repository" >>"$out/build.log" 2>&1 || {
    tail -40 "$out/build.log"
    exit 1
}
# Elsewhere than the sources, so that the installed package is what runs.
cd "$out"
python3 -m berdiff_fast.info
failed=0

# within SECONDS COMMAND...: for so long at the most, and no longer than to the deadline
within() {
    local seconds=$1 left=$((deadline - SECONDS))
    shift
    if [ "$left" -lt 10 ]; then
        echo "no time left for: $*"
        failed=1
        return
    fi
    echo "== at ${SECONDS} s: $*"
    # As Ctrl-C: pytest then reports. The trainer saves and goes on to the next of its runs, which is killed.
    timeout --signal INT --kill-after 10 "$((seconds < left ? seconds : left))" "$@" || {
        echo "status $?: $*"
        failed=1
    }
}
tests() {
    within "$1" python3 -m pytest "${@:2}" -q -p no:cacheprovider --rootdir "$repository" \
        -c "$repository/pyproject.toml" --durations=10 2>&1 | tee -a "$out/tests.log"
    grep -qE "^status|^no time" "$out/tests.log" && failed=1
}

: >"$out/tests.log"
parallel=() by_file=()
python3 -c "import xdist" 2>/dev/null && parallel=(-n 8) by_file=(-n 8 --dist loadfile)
tests 90 "$repository/tests/test_gpu.py" --junitxml "$out/tests.xml"
BERDIFF_FAST_TEST_VARIANTS="cuda,triton,reference on the GPU" \
    tests 90 "$repository/tests/test_equal_bits.py" "${parallel[@]}" --junitxml "$out/tests_bits.xml"
within 130 python3 -m berdiff_fast.cli bench --device cuda --output "$out" --only "steps=10), 128 x 128, published" --no-compile
within 60 python3 -m berdiff_fast.cli bench --device cuda --output "$out" --append --only kernel loss metrics --no-compile
within 60 python3 "$repository/benchmarks/kernels_gpu.py" --output "$out/kernels.json"
if python3 -c "import accelerate" 2>/dev/null; then
    within 60 python3 "$repository/benchmarks/training_speed.py" --device cuda --output "$out/training_lidc.json"
    within 100 python3 "$repository/benchmarks/training_speed.py" --published --output "$out/training.json"
else
    within 60 python3 -m berdiff_fast.cli bench --device cuda --output "$out/training" --only training --no-compile
fi
within 150 python3 -m berdiff_fast.cli bench --device cuda --output "$out/compiled" \
    --only "steps=10), 128 x 128, published" --contenders compile "ours, bfloat16"
tests 200 "$repository/tests" "${by_file[@]}" \
    --ignore "$repository/tests/test_gpu.py" --ignore "$repository/tests/test_equal_bits.py"
# Tables and picture are made again from the JSON: berdiff-fast bench --from bench.json --update README.md
rm -f "$out"/{,compiled/}bench.{md,png}
exit $failed
