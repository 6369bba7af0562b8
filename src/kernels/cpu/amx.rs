//! Tiles of bf16.

pub(super) fn detected() -> bool {
    false
}
