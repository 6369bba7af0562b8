# just --list

# All tests, as the README has them
test:
    cargo test --release

# Formatting, lints and documentation
lint:
    cargo fmt --check
    cargo clippy --release --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# Speed, beside candle-transformers on the same weights
bench *args:
    cargo bench --bench generate --bench logits -- {{args}}

# Makes the golden folders anew; needs Python with the versions that the scripts pin, search.py one after another
golden:
    python tests/golden/make.py
    python tests/golden/search.py

# All that CI does
ci:
    .ci/run

# A folder of test and bench binaries with the feature cuda, and a run.sh for a machine with a GPU
gpu-build folder="target/gpu":
    tools/gpu-build.sh {{folder}}
