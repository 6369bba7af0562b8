//! DoLa: what the last layer adds to an early one (<https://arxiv.org/abs/2309.03883>).

use super::softmax::Softmax;

/// Tokens below this part of the largest probability are left out.
const RELATIVE_TOP: f32 = 0.1;

/// Turns the logits of the last layer into what they add to the early layer that differs most from it. `early` holds the logits of
/// the candidate layers, layer after layer; at least one. Rows without a distribution are left for [`run`](super::run) to report.
// HF: one layer is chosen for the whole batch there, by the mean of its rows' divergences; here each row chooses its own, as it does
// there alone.
pub(crate) fn contrast(scores: &mut [f32], early: &[f32]) {
    let Some(mature) = Softmax::of(scores) else { return };
    let layers = early.chunks_exact(scores.len());
    let alone = layers.len() == 1;
    let mut best: Option<(f64, Softmax, &[f32])> = None;
    for (layer, premature) in layers.filter_map(|layer| Some((layer, Softmax::of(layer)?))) {
        let divergence = if alone { 0.0 } else { divergence((&mature, scores), (&premature, layer)) };
        if best.as_ref().is_none_or(|(most, ..)| divergence > *most) {
            best = Some((divergence, premature, layer));
        }
    }
    let Some((_, premature, layer)) = best else { return scores.fill(f32::NAN) };
    let floor = mature.log_probability(mature.max) + RELATIVE_TOP.ln();
    for (score, &early) in scores.iter_mut().zip(layer) {
        let log_probability = mature.log_probability(*score);
        *score = if log_probability < floor { f32::NEG_INFINITY } else { log_probability - premature.log_probability(early) };
    }
}

/// The Jensen-Shannon divergence of two distributions with their logits, times the size of the vocabulary.
// HF: its two halves are both taken from the mean distribution to the parts, the other way round than Jensen and Shannon have it.
fn divergence(one: (&Softmax, &[f32]), two: (&Softmax, &[f32])) -> f64 {
    let terms = one.1.iter().zip(two.1).map(|(&a, &b)| {
        let mean = 0.5 * (f64::from(one.0.probability(a)) + f64::from(two.0.probability(b)));
        if mean == 0.0 {
            return 0.0;
        }
        let log_probabilities = f64::from(one.0.log_probability(a)) + f64::from(two.0.log_probability(b));
        0.5 * mean * (2.0 * mean.ln() - log_probabilities)
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INF: f32 = f32::INFINITY;
    // transformers 4.55.4, `_dola_select_contrast`.
    const MATURE: [f32; 5] = [2.0, 1.0, -1.0, 1.5, -4.0];
    const EARLY: [[f32; 5]; 3] = [[1.5, 1.0, -0.5, 1.0, -3.0], [0.0, 2.0, 1.0, -1.0, 0.5], [0.5, -0.5, 0.0, 1.0, 0.0]];

    fn contrasted(early: &[[f32; 5]]) -> [f32; 5] {
        let mut scores = MATURE;
        contrast(&mut scores, early.as_flattened());
        scores
    }

    #[track_caller]
    fn same(found: [f32; 5], expected: [f32; 5]) {
        assert!(found.iter().zip(expected).all(|(a, b)| *a == b || (a - b).abs() < 1e-6), "{found:?} for {expected:?}");
    }

    #[test]
    fn one_layer_is_taken_as_it_is() {
        same(contrasted(&EARLY[..1]), [0.1520552, -0.3479449, -INF, 0.1520551, -INF]);
    }

    #[test]
    fn of_several_the_one_that_differs_most() {
        same(contrasted(&EARLY), [1.868_041, -1.131_959, -INF, 2.368_041, -INF]);
        same(contrasted(&[EARLY[0], EARLY[2]]), [0.7357251, 0.7357249, -INF, -0.264_275, -INF]);
    }

    #[test]
    fn rows_without_a_distribution() {
        let mut scores = [f32::NAN, 1.0];
        contrast(&mut scores, &[1.0, 2.0]);
        assert!(scores[0].is_nan() && scores[1] == 1.0);
        let mut scores = [0.0, 1.0];
        contrast(&mut scores, &[f32::NAN, 2.0]);
        assert!(scores.iter().all(|score| score.is_nan()));
    }
}
