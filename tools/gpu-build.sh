#!/usr/bin/env bash
# Builds what a machine with a GPU runs, on one that need not have any: stripped test and bench binaries with their data and run.sh.
#   tools/gpu-build.sh [FOLDER]      target/gpu unless given; needs CUDA's toolkit (nvcc), and CUDA_COMPUTE_CAP where no GPU tells it
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu}
rm -rf "$out"
mkdir -p "$out/bin" "$out/examples"

# Lines of JSON name each binary and what it was made from.
binaries() {
    cargo "$@" --features cuda --no-run --message-format=json |
        sed -nE 's/.*"target":\{"kind":\["([a-z-]+)"\].*"name":"([^"]+)".*"executable":"([^"]+)".*/\1 \2 \3/p'
}
install() { # kind name path
    local name=$2
    case $1 in lib) name=unit ;; bench) name=bench-$2 ;; esac
    strip -o "$out/bin/$name" "$3"
}
binaries test --release --lib --test golden --test laws --test search --test seq2seq --test devices | while read -r line; do install $line; done
binaries bench --benches | while read -r kind name path; do install bench "$name" "$path"; done
cargo build --release --features cuda --example generate --message-format=json |
    sed -nE 's/.*"kind":\["example"\].*"executable":"([^"]+)".*/\1/p' | xargs -I{} strip -o "$out/bin/generate" {}

cp tools/gpu-run.sh "$out/run.sh"
cp -r tests "$out/"
cp -r examples/models "$out/examples/"
du -sh "$out"
