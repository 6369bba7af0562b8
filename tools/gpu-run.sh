#!/usr/bin/env bash
# Runs on a machine with a GPU what gpu-build.sh made: the suites that depend on the device, in each arithmetic.
#   ./run.sh [DTYPE ...]             f32 bf16 f16 unless given; LD_LIBRARY_PATH has to name CUDA's libraries
set -uo pipefail
cd "$(dirname "$0")"
export CANDLE_GENERATE_DEVICE=${CANDLE_GENERATE_DEVICE:-cuda:0}
failed=()
suite() { # dtype, binary, arguments
    local dtype=$1 binary=$2 start=$SECONDS
    shift 2
    echo "== $binary in $dtype on $CANDLE_GENERATE_DEVICE"
    CANDLE_GENERATE_DTYPE=$dtype "bin/$binary" "$@" 2>&1 || failed+=("$binary in $dtype")
    echo "-- $((SECONDS - start)) s"
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for dtype in "${@:-f32 bf16 f16}"; do
    for dtype in $dtype; do
        suite "$dtype" unit models::laws
        if [[ $dtype == f32 ]]; then
            suite f32 unit kernels::candle
            suite f32 search
        fi
        suite "$dtype" laws
        suite "$dtype" golden
        # One after another: one of them fills the device's memory.
        suite "$dtype" devices --test-threads=1 --nocapture
    done
done
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all suites passed"
