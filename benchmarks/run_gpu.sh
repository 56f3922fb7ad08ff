#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One command for a machine with an NVIDIA GPU: builds, benchmarks the kernels, then runs the tests there.
# Leaves build.log, gpu.json, tests.log and tests.xml in the folder given (default: benchmarks/results/gpu).
#   bash benchmarks/run_gpu.sh [FOLDER]
set -uo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$repository/benchmarks/results/gpu}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
export BERDIFF_FAST_CUDA=1 BERDIFF_FAST_CUDA_ARCHS="${BERDIFF_FAST_CUDA_ARCHS:-90}"
python3 -m pip list 2>/dev/null | grep -iE "^(setuptools|pybind11|cmake|torch|triton|numpy) " >"$out/build.log"
python3 -m pip install --no-build-isolation --no-deps "$repository" >>"$out/build.log" 2>&1 || {
    tail -40 "$out/build.log"
    exit 1
}
# Elsewhere than the sources, so that the installed package is what runs.
cd "$out"
python3 -m berdiff_fast.info
python3 "$repository/benchmarks/kernels_gpu.py" --output "$out/gpu.json"
benchmarks=$?
if python3 -c "import accelerate" 2>/dev/null; then
    timeout 240 python3 "$repository/benchmarks/training_speed.py" --output "$out/training.json" || benchmarks=1
else
    echo "training_speed.py: accelerate is not installed here"
fi
tests() {
    timeout 210 python3 -m pytest "$@" -q -p no:cacheprovider --rootdir "$repository" -c "$repository/pyproject.toml" \
        --durations=10 2>&1 | tee -a "$out/tests.log"
}
: >"$out/tests.log"
tests "$repository/tests/test_gpu.py" "$repository/tests/test_equal_bits.py" --junitxml "$out/tests.xml"
gpu=$?
tests "$repository/tests" --ignore "$repository/tests/test_gpu.py" --ignore "$repository/tests/test_equal_bits.py"
others=$?
exit $((benchmarks || gpu || others))
