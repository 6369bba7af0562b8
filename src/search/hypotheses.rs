//! The finished sequences of a beam search, as many of the best as there are beams.

use crate::rows::{Row, Unfed};

/// Finished rows, best first, each with its score.
#[derive(Default)]
pub(super) struct Hypotheses {
    rows: Vec<Row>,
}

impl Hypotheses {
    /// Keeps `row` if it is among the `most` best. It stands behind those of the same score. Its cache goes.
    pub fn add(&mut self, mut row: Row, score: f32, most: usize) {
        row.score = Some(score);
        row.cache = Box::new(Unfed);
        let place = self.rows.partition_point(|kept| kept.score >= row.score);
        if place < most {
            self.rows.insert(place, row);
            self.rows.truncate(most);
        }
    }

    /// The score to beat, once there are `most`.
    pub fn worst(&self, most: usize) -> Option<f32> {
        self.rows.get(most.checked_sub(1)?)?.score
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub fn into_rows(self) -> Vec<Row> {
        self.rows
    }
}

/// The score of a hypothesis: the sum of its log-probabilities over a power of the number of its generated tokens.
// HF: the end token counts, the prompt does not.
pub(super) fn penalised(sum: f32, generated: usize, length_penalty: f64) -> f32 {
    sum / (generated.max(1) as f64).powf(length_penalty) as f32
}
