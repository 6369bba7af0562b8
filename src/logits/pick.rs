//! Chooses tokens: the largest score, or a draw that depends on nothing but the row's seed and the step.

/// The index of the largest score; the first of equals. `None` if no score is above negative infinity.
pub fn argmax(scores: &[f32]) -> Option<u32> {
    let _ = scores;
    None
}

/// An index drawn with probability softmax(`scores`), by inverting the cumulative distribution at `u` in `[0, 1)`, in
/// index order. `None` if no score is above negative infinity.
pub fn sample(scores: &[f32], u: f64) -> Option<u32> {
    let _ = (scores, u);
    None
}

/// The draw of step `step` of a row, uniform in `[0, 1)`: ChaCha8 at a counted position, so forks carry no state.
pub fn uniform(seed: u64, step: u64) -> f64 {
    let _ = (seed, step);
    0.0
}

/// The seed of row `row` of a call: the call's own for row 0, a fixed hash of both for the others.
pub fn row_seed(seed: u64, row: u64) -> u64 {
    let _ = row;
    seed
}

/// The natural logarithm of the sum of exponentials, in f64.
pub fn log_sum_exp(scores: &[f32]) -> f64 {
    let _ = scores;
    0.0
}
