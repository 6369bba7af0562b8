//! A row of scores that remembers the largest of each block, so that what looks for few tokens reads few scores.

use super::{
    pick, rank,
    scan::{self, Peaks},
    softmax::Softmax,
};
use crate::kernels::BLOCK;

/// The scores of one row, with what is known of them: what [`LogitsProcessor::shape`](super::LogitsProcessor::shape) changes.
///
/// ```
/// use candle_generate::logits::Scores;
///
/// let mut row = [0.5, 2.0, 1.0];
/// Scores::over(&mut row, |scores| {
///     scores.set(1, f32::NEG_INFINITY);
///     assert_eq!(scores.argmax(), Some(2));
/// });
/// assert_eq!(row, [0.5, f32::NEG_INFINITY, 1.0]);
/// ```
#[derive(Debug)]
pub struct Scores<'a> {
    values: &'a mut [f32],
    peaks: Option<Peaks>,
    /// Whether blocks whose peak is negative infinity may hold anything: then that is what all of their scores are.
    hollow: bool,
}

impl<'a> Scores<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { values, peaks: None, hollow: false }
    }

    /// With the largest of each block as a model gives them; none if they are not known.
    pub(crate) fn known(values: &'a mut [f32], peaks: &[f32]) -> Self {
        let peaks = (peaks.len() == values.len().div_ceil(BLOCK)).then(|| Peaks::known(values, peaks.to_vec()));
        Self { values, peaks, hollow: false }
    }

    /// Has `work` done on `values`, `(vocab_size,)`.
    pub fn over<R>(values: &mut [f32], work: impl FnOnce(&mut Scores<'_>) -> R) -> R {
        let mut scores = Scores::new(values);
        let result = work(&mut scores);
        scores.fill();
        result
    }

    /// How many there are: the size of the vocabulary.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The score of a token; `None` beyond the vocabulary.
    pub fn get(&self, id: u32) -> Option<f32> {
        let score = *self.values.get(id as usize)?;
        let empty = self.hollow && self.peaks.as_ref().and_then(|peaks| peaks.around(id as usize)) == Some(f32::NEG_INFINITY);
        Some(if empty { f32::NEG_INFINITY } else { score })
    }

    /// Changes the score of a token; one beyond the vocabulary has none.
    pub fn set(&mut self, id: u32, score: f32) {
        let Some(old) = self.get(id) else { return };
        let id = id as usize;
        if score.is_nan() || old.is_nan() {
            self.values_mut()[id] = score;
            return;
        }
        let Self { values, peaks, hollow } = self;
        if let Some(peaks) = peaks {
            if *hollow && peaks.around(id) == Some(f32::NEG_INFINITY) {
                values[id / BLOCK * BLOCK..].iter_mut().take(BLOCK).for_each(|score| *score = f32::NEG_INFINITY);
            }
            values[id] = score;
            peaks.changed(values, id, old);
        } else {
            values[id] = score;
        }
    }

    /// All scores, `(vocab_size,)`.
    pub fn values(&mut self) -> &[f32] {
        self.fill();
        self.values
    }

    /// All scores, `(vocab_size,)`, to be changed in any way. What was known of them is forgotten.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.fill();
        self.peaks = None;
        self.values
    }

    /// The token with the largest score; the first of equals, and never NaN. `None` if no score is above negative infinity.
    pub fn argmax(&mut self) -> Option<u32> {
        let (values, peaks) = self.parts();
        pick::argmax_of(values, peaks)
    }

    /// A token drawn with probability softmax(`scores`), as [`pick::sample`] does.
    pub fn sample(&mut self, u: f64) -> Option<u32> {
        let (values, peaks) = self.parts();
        pick::sample_of(values, peaks, u)
    }

    /// The `n` tokens with the largest scores, as [`pick::top`] does.
    pub fn top(&mut self, n: usize) -> Vec<(u32, f32)> {
        let (values, peaks) = self.parts();
        rank::top(values, peaks, n)
    }

    /// Divides all scores.
    pub(super) fn divide(&mut self, by: f32) {
        // Another divisor turns their order round, or makes what is no number of them.
        if !(by > 0.0 && by.is_finite()) {
            return scan::divide(self.values_mut(), by);
        }
        scan::divide(self.values, by);
        if let Some(peaks) = &mut self.peaks {
            peaks.follow(|peak| peak / by);
        }
    }

    /// Makes scores below `least` negative infinity.
    pub(super) fn drop_below(&mut self, least: f32) {
        let Self { values, peaks, hollow } = self;
        let peaks = peaks.get_or_insert_with(|| Peaks::of(values));
        peaks.drop_below(values, least);
        *hollow |= !peaks.nan();
    }

    /// Makes scores log-probabilities. `false`, and nothing is changed, if the row has no distribution.
    pub(crate) fn log_softmax(&mut self) -> bool {
        self.fill();
        let (values, peaks) = self.parts();
        let Some(Softmax { max, sum }) = Softmax::within(values, peaks) else { return false };
        let shift = sum.ln() as f32;
        scan::lower(self.values, max, shift);
        if let Some(peaks) = &mut self.peaks {
            peaks.follow(|peak| (peak - max) - shift);
        }
        true
    }

    /// The scores and the largest of each block; where that is negative infinity, the block may hold anything.
    pub(super) fn parts(&mut self) -> (&[f32], &Peaks) {
        let Self { values, peaks, .. } = self;
        (values, peaks.get_or_insert_with(|| Peaks::of(values)))
    }

    /// Writes what is known of blocks that hold anything.
    fn fill(&mut self) {
        if std::mem::take(&mut self.hollow)
            && let Some(peaks) = &self.peaks
        {
            peaks.empty(self.values).for_each(|block| block.fill(f32::NEG_INFINITY));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const INF: f32 = f32::INFINITY;

    /// What scores can be, equals among them.
    fn score() -> impl Strategy<Value = f32> {
        prop_oneof![20 => (-40..40).prop_map(|x| x as f32 / 4.0), 2 => Just(-INF), 1 => Just(-0.0f32), 1 => Just(f32::MIN)]
    }

    /// One change.
    #[derive(Debug, Clone)]
    enum Change {
        Set(u32, f32),
        Divide(f32),
        DropBelow(f32),
        LogSoftmax,
        Negate,
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            6 => (0..400u32, prop_oneof![9 => score(), 1 => Just(f32::NAN)]).prop_map(|(id, score)| Change::Set(id, score)),
            1 => prop_oneof![9 => 0.25f32..3.0, 1 => Just(-2.0f32), 1 => Just(INF)].prop_map(Change::Divide),
            2 => score().prop_map(Change::DropBelow),
            1 => Just(Change::LogSoftmax),
            1 => Just(Change::Negate),
        ]
    }

    impl Change {
        fn to(&self, scores: &mut Scores<'_>) {
            match *self {
                Self::Set(id, score) => scores.set(id, score),
                Self::Divide(by) => scores.divide(by),
                Self::DropBelow(least) => scores.drop_below(least),
                Self::LogSoftmax => drop(scores.log_softmax()),
                Self::Negate => scores.values_mut().iter_mut().for_each(|score| *score = -*score),
            }
        }

        /// The same by what it means.
        fn plainly(&self, row: &mut [f32]) {
            match *self {
                Self::Set(id, score) => row.get_mut(id as usize).into_iter().for_each(|old| *old = score),
                Self::Divide(by) => row.iter_mut().for_each(|score| *score /= by),
                Self::DropBelow(least) => row.iter_mut().filter(|score| **score < least).for_each(|score| *score = -INF),
                Self::LogSoftmax => {
                    if let Some(Softmax { max, sum }) = Softmax::of(row) {
                        row.iter_mut().for_each(|score| *score = (*score - max) - sum.ln() as f32);
                    }
                }
                Self::Negate => row.iter_mut().for_each(|score| *score = -*score),
            }
        }
    }

    fn bits(row: &[f32]) -> Vec<u32> {
        row.iter().map(|score| if score.is_nan() { 1 } else { score.to_bits() }).collect()
    }

    proptest! {
        #[test]
        fn what_is_known_is_what_a_look_would_find(
            row in prop::collection::vec(score(), 0..300), changes in prop::collection::vec(change(), 0..12), told in any::<bool>(), u in 0.0..1.0f64,
        ) {
            let (mut plain, mut own) = (row.clone(), row.clone());
            let mut peaks = vec![0.0; if told { row.len().div_ceil(BLOCK) } else { 0 }];
            for (peak, block) in peaks.iter_mut().zip(row.chunks(BLOCK)) {
                *peak = block.iter().copied().fold(-INF, f32::max);
            }
            let mut scores = Scores::known(&mut own, &peaks);
            for change in &changes {
                change.to(&mut scores);
                change.plainly(&mut plain);
                prop_assert_eq!(scores.argmax(), pick::argmax(&plain));
                prop_assert_eq!(scores.top(3), pick::top(&plain, 3));
                prop_assert_eq!(scores.sample(u), pick::sample(&plain, u));
                let nan = plain.iter().any(|score| score.is_nan());
                prop_assert_eq!(scores.parts().1.nan(), nan);
                let found: Vec<f32> = (0..=row.len() as u32).map_while(|id| scores.get(id)).collect();
                prop_assert_eq!(bits(&found), bits(&plain));
            }
            prop_assert_eq!(bits(scores.values()), bits(&plain));
            prop_assert_eq!((scores.len(), scores.is_empty()), (row.len(), row.is_empty()));
            let mut over = row.clone();
            Scores::over(&mut over, |scores| changes.iter().for_each(|change| change.to(scores)));
            prop_assert_eq!(bits(&over), bits(&plain));
        }
    }

    #[test]
    fn peaks_that_a_model_tells_may_be_nan() {
        let mut row: Vec<f32> = (0..130).map(|id| id as f32).collect();
        row[3] = f32::NAN;
        let mut scores = Scores::known(&mut row, &[f32::NAN, 127.0, 129.0]);
        assert_eq!(scores.argmax(), Some(129));
        assert!(scores.parts().1.nan());
        scores.drop_below(100.0);
        assert!(scores.get(3).unwrap().is_nan() && scores.values()[3].is_nan());
        assert_eq!((scores.get(2), scores.get(100), scores.get(130)), (Some(-INF), Some(100.0), None));
    }
}
