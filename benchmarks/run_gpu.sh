#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One command for a machine with an NVIDIA GPU: builds, runs the GPU's tests, measures, then runs the other tests.
#   bash benchmarks/run_gpu.sh [FOLDER]
# Leaves in the folder (default: benchmarks/results/gpu), what has to be known first before the rest, so that a run cut
# short keeps it:
#   build.log, tests.log, *.xml           what was built, what passed: graphs and the fused network first
#   network.json                          a step of each form of the network, whole calls, and the convolutions by themselves
#   kernels.json                          the kernels of draws and loss at 64 M pixels
#   training_lidc.json, training.json     training images per second: lidc's network, the published one
#   parallel_in_time.json                 many steps in one call of the network
#   bench.json                            what `berdiff-fast bench` says of kernels, loss and metrics
#   compiled.json                         the call against torch.compile's max-autotune, which compiles for minutes
# The README's table is made of it by: python benchmarks/network_gpu.py --from network.json --update README.md docs/performance.md
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$repository/benchmarks/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
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
tests 60 "$repository/tests/test_gpu.py" "$repository/tests/test_fused.py" -m gpu --junitxml "$out/tests.xml"
within 150 python3 "$repository/benchmarks/network_gpu.py" --output "$out/network.json"
BERDIFF_FAST_TEST_VARIANTS="cuda,triton,reference on the GPU" \
    tests 90 "$repository/tests/test_equal_bits.py" "$repository/tests/test_seed_rows.py" "${parallel[@]}" --junitxml "$out/tests_bits.xml"
within 40 python3 "$repository/benchmarks/kernels_gpu.py" --output "$out/kernels.json"
if python3 -c "import accelerate" 2>/dev/null; then
    within 60 python3 "$repository/benchmarks/training_speed.py" --device cuda --output "$out/training_lidc.json"
    within 100 python3 "$repository/benchmarks/training_speed.py" --published --output "$out/training.json"
else
    within 60 python3 -m berdiff_fast.cli bench --device cuda --output "$out/training" --only training --no-compile
fi
within 30 python3 "$repository/benchmarks/parallel_in_time.py" --device cuda --output "$out/parallel_in_time.json"
within 60 python3 -m berdiff_fast.cli bench --device cuda --output "$out" --only kernel loss metrics --no-compile
tests 120 "$repository/tests" "${by_file[@]}" --ignore "$repository/tests/test_gpu.py" --ignore "$repository/tests/test_fused.py" \
    --ignore "$repository/tests/test_equal_bits.py" -m "not slow"
within 240 python3 "$repository/benchmarks/network_gpu.py" --output "$out/compiled.json" --parts calls --compile max-autotune
# Tables and picture of the bench are made again from its JSON: berdiff-fast bench --from bench.json --update README.md
rm -f "$out"/bench.{md,png}
exit $failed
