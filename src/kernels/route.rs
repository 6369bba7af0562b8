//! Which experts a token is sent to: the part of routing that is the same on every device.

/// The tokens that one expert gets, ascending, and the share of its output that each takes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Picks {
    pub tokens: Vec<usize>,
    pub shares: Vec<f32>,
}

/// Sends each token to the `top` experts with its largest `shares`, `(tokens, experts)`; of equal ones, those with the lower numbers.
/// Where `renormalise` is set the shares of a token's experts are made to sum to 1. One entry for each expert.
pub(crate) fn pick(shares: &[f32], experts: usize, top: usize, renormalise: bool) -> Vec<Picks> {
    let mut picks = vec![Picks::default(); experts];
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for (token, shares) in shares.chunks(experts.max(1)).enumerate() {
        order.clear();
        order.extend(0..shares.len());
        order.sort_unstable_by(|&a, &b| shares[b].total_cmp(&shares[a]).then(a.cmp(&b)));
        order.truncate(top);
        let total = if renormalise { order.iter().map(|&expert| shares[expert]).sum() } else { 1.0 };
        for &expert in &order {
            picks[expert].tokens.push(token);
            picks[expert].shares.push(shares[expert] / total);
        }
    }
    picks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_goes_to_its_best_experts() {
        let shares = [0.25, 0.5, 0.125, 0.125, 0.25, 0.0, 0.25, 0.5];
        let of = |tokens: &[usize], shares: &[f32]| Picks { tokens: tokens.to_vec(), shares: shares.to_vec() };
        let plain = [of(&[0, 1], &[0.25, 0.25]), of(&[0], &[0.5]), of(&[], &[]), of(&[1], &[0.5])];
        assert_eq!(pick(&shares, 4, 2, false), plain);
        let whole = [of(&[0, 1], &[1.0 / 3.0, 1.0 / 3.0]), of(&[0], &[2.0 / 3.0]), of(&[], &[]), of(&[1], &[2.0 / 3.0])];
        assert_eq!(pick(&shares, 4, 2, true), whole);
    }
}
