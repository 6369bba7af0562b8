//! Forced phrases, and how far a row has come with them (<https://arxiv.org/abs/1804.06609>).

use super::group::Candidate;
use crate::{
    config::Strategy,
    error::{Error, Result},
    plan::Plan,
    rows::Row,
};
use serde_json::json;

/// The phrases that beams have to produce, and how far each beam has come.
pub(super) struct Forced {
    phrases: Phrases,
    beams: Vec<Progress>,
}

/// What rows have to produce: of each set of phrases one alternative.
#[derive(Debug)]
struct Phrases {
    sets: Vec<Set>,
    /// The tokens of the longest alternative of all.
    longest: usize,
}

/// Alternatives, none of which is empty or begins with another.
#[derive(Debug)]
struct Set {
    alternatives: Vec<Vec<u32>>,
    longest: usize,
}

/// How far a row has come. What is neither waiting nor begun is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Progress {
    /// The sets that no token has begun, in the order in which they are tried.
    waiting: Vec<usize>,
    begun: Option<Begun>,
}

/// The set that the row's last tokens are about: they are the first `len` of an alternative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Begun {
    set: usize,
    alternative: usize,
    len: usize,
}

impl Forced {
    /// For a prompt's one beam; `None` where nothing is forced.
    pub fn new(plan: &Plan, prompt: &Row) -> Option<Self> {
        (!plan.phrases.is_empty()).then(|| {
            let phrases = Phrases::new(&plan.phrases);
            Self { beams: vec![phrases.after(&prompt.tokens)], phrases }
        })
    }

    /// How far a beam is with one more token.
    pub fn after(&self, beam: usize, token: u32) -> Progress {
        let mut progress = self.beams[beam].clone();
        self.phrases.read(&mut progress, token);
        progress
    }

    /// Whether a beam has all phrases.
    pub fn complete(&self, beam: usize) -> bool {
        self.beams[beam].complete()
    }

    /// The next beams.
    pub fn go_on(&mut self, beams: Vec<Progress>) {
        self.beams = beams;
    }

    /// Makes the candidates of a plain search those of a constrained one: beams that lack a phrase also offer the tokens that move
    /// it on, and those that are further take turns with those that are less far. Ends stay as they are.
    pub fn choose(&self, candidates: Vec<Candidate>, size: usize, plan: &Plan, score: impl Fn(usize, u32) -> f32) -> Vec<Candidate> {
        let ends = |next: &Candidate| plan.eos.contains(&next.token) || plan.stop_token_ids.contains(&next.token);
        let (mut chosen, mut best): (Vec<_>, Vec<_>) = candidates.into_iter().partition(ends);
        best.truncate(size);
        chosen.extend(self.steer(best, score).into_iter().enumerate().map(|(rank, next)| Candidate { rank, ..next }));
        chosen
    }

    fn steer(&self, best: Vec<Candidate>, score: impl Fn(usize, u32) -> f32) -> Vec<Candidate> {
        let bank = |next: &Candidate| self.phrases.bank(&self.after(next.beam, next.token));
        let mut offers: Vec<_> = best.iter().map(|next| (bank(next), *next)).collect();
        for (beam, progress) in self.beams.iter().enumerate() {
            for (token, bank) in self.phrases.advances(progress) {
                let next = Candidate { beam, token, score: score(beam, token), rank: 0 };
                let known = offers.iter().any(|(_, other)| (other.beam, other.token) == (beam, token));
                // HF: a token that a processor forbids is forced all the same there, with a score of negative infinity.
                if !known && next.score > f32::NEG_INFINITY {
                    offers.push((bank, next));
                }
            }
        }
        if offers.len() == best.len() {
            return best;
        }
        // HF: one sum of both, so that 100 of a score weigh as much as a bank; a turn is a place in a run of one bank.
        let rank = |(bank, next): &(usize, Candidate)| (bank * 100) as f32 + next.score;
        offers.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
        let turns = offers.chunk_by(|a, b| a.0 == b.0).flat_map(|run| run.iter().map(|(_, next)| *next).enumerate());
        let mut turns: Vec<_> = turns.collect();
        turns.sort_by_key(|(turn, _)| *turn);
        turns.into_iter().map(|(_, next)| next).take(best.len()).collect()
    }
}

/// Refuses a phrase that needs more tokens than a row that begins with `tokens` has room for.
pub(super) fn check_room(tokens: &[u32], plan: &Plan) -> Result<()> {
    let phrases = Phrases::new(&plan.phrases);
    let room = plan.length.max_length(tokens.len()).saturating_sub(tokens.len());
    let progress = phrases.after(tokens);
    let Some((set, missing)) = phrases.missing(&progress).find(|(_, missing)| *missing > room) else { return Ok(()) };
    let field = match &plan.strategy {
        Strategy::ConstrainedBeam { force_words_ids, .. } if set < force_words_ids.len() => "force_words_ids",
        _ => "force_words",
    };
    let reason = format!("{missing} more tokens make the phrase, and a prompt leaves room for {room}; accepted are phrases that fit");
    Err(Error::config(field, json!(plan.phrases.get(set)), reason))
}

impl Phrases {
    pub fn new(sets: &[Vec<Vec<u32>>]) -> Self {
        let longest = |alternatives: &[Vec<u32>]| alternatives.iter().map(Vec::len).max().unwrap_or(0);
        let sets: Vec<_> = sets.iter().map(|set| Set { longest: longest(set), alternatives: set.clone() }).collect();
        Self { longest: sets.iter().map(|set| set.longest).max().unwrap_or(0), sets }
    }

    /// The state after `tokens`.
    // HF: the prompt's tokens count, so that a phrase which the prompt holds is not forced.
    pub fn after(&self, tokens: &[u32]) -> Progress {
        let mut progress = Progress { waiting: (0..self.sets.len()).collect(), begun: None };
        tokens.iter().for_each(|&token| self.read(&mut progress, token));
        progress
    }

    /// Takes a row's next token. It moves one phrase on, or breaks off the one that was begun.
    // HF: a token that breaks a phrase off does not begin one, not even the same: `[5, 6]` is not found in `5 5 6`. What was broken
    // off is tried last.
    pub fn read(&self, progress: &mut Progress, token: u32) {
        let begun = match progress.begun.take() {
            Some(begun) => {
                let next = self.next(begun, token);
                if next.is_none() {
                    progress.waiting.push(begun.set);
                }
                next
            }
            None => {
                let first = |&set: &usize| self.next(Begun { set, alternative: 0, len: 0 }, token);
                let found = progress.waiting.iter().enumerate().find_map(|(index, set)| Some((index, first(set)?)));
                found.map(|(index, begun)| {
                    progress.waiting.remove(index);
                    begun
                })
            }
        };
        progress.begun = begun.filter(|&begun| !self.ends(begun));
    }

    /// How far a row is: whole phrases first, then tokens of the one that is begun.
    pub fn bank(&self, progress: &Progress) -> usize {
        self.done(progress) * self.longest + progress.begun.map_or(0, |begun| self.part(begun))
    }

    /// The tokens that move a phrase on, each with the bank that the row then is in; the same token may come twice.
    pub fn advances(&self, progress: &Progress) -> Vec<(u32, usize)> {
        let Some(begun) = progress.begun else {
            let firsts = progress.waiting.iter().flat_map(|&set| self.nexts(Begun { set, alternative: 0, len: 0 }));
            let bank = |token| {
                let mut then = progress.clone();
                self.read(&mut then, token);
                (token, self.bank(&then))
            };
            return firsts.map(bank).collect();
        };
        // HF: the states tried for the tokens share the list of the tokens so far, so each goes on from where the one before
        // it ended, and may seem to break the phrase off. It is a mistake there, and ranks the alternatives of a set.
        let done = self.done(progress) * self.longest;
        let mut shared = begun;
        let tried: Vec<_> = (self.nexts(begun).into_iter())
            .map(|token| {
                let next = self.next(shared, token);
                shared = next.unwrap_or(shared);
                (token, next)
            })
            .collect();
        let bank = |next: Option<Begun>| match next {
            Some(next) if self.ends(next) => done + self.longest,
            Some(_) => done + self.part(shared),
            None => done,
        };
        tried.into_iter().map(|(token, next)| (token, bank(next))).collect()
    }

    /// The sets that are not done, each with the least number of tokens that end it.
    pub fn missing<'a>(&'a self, progress: &'a Progress) -> impl Iterator<Item = (usize, usize)> + 'a {
        let begun = progress.begun.into_iter();
        let waiting = progress.waiting.iter().map(|&set| Begun { set, alternative: 0, len: 0 });
        begun.chain(waiting).map(|from| {
            let lengths = self.branches(from).map(|(_, ids)| ids.len() - from.len);
            (from.set, lengths.min().unwrap_or(0))
        })
    }

    fn done(&self, progress: &Progress) -> usize {
        self.sets.len() - progress.waiting.len() - usize::from(progress.begun.is_some())
    }

    // HF: counted back from the set's longest alternative, so that a short one seems less far than it is.
    fn part(&self, begun: Begun) -> usize {
        let longest = self.sets.get(begun.set).map_or(0, |set| set.longest);
        (self.longest + begun.len).saturating_sub(longest)
    }

    /// The alternatives that begin as `begun` does.
    fn branches(&self, begun: Begun) -> impl Iterator<Item = (usize, &[u32])> {
        let alternatives = self.sets.get(begun.set).map_or(&[][..], |set| &set.alternatives);
        let head = alternatives.get(begun.alternative).and_then(|ids| ids.get(..begun.len)).unwrap_or_default();
        alternatives.iter().enumerate().filter(move |(_, ids)| ids.starts_with(head)).map(|(index, ids)| (index, ids.as_slice()))
    }

    fn next(&self, begun: Begun, token: u32) -> Option<Begun> {
        let mut branches = self.branches(begun);
        let (alternative, _) = branches.find(|(_, ids)| ids.get(begun.len) == Some(&token))?;
        Some(Begun { alternative, len: begun.len + 1, ..begun })
    }

    /// Distinct tokens, in the order of the alternatives.
    fn nexts(&self, begun: Begun) -> Vec<u32> {
        let mut tokens = Vec::new();
        for token in self.branches(begun).filter_map(|(_, ids)| ids.get(begun.len)) {
            if !tokens.contains(token) {
                tokens.push(*token);
            }
        }
        tokens
    }

    fn ends(&self, begun: Begun) -> bool {
        self.branches(begun).all(|(_, ids)| ids.len() == begun.len)
    }
}

impl Progress {
    /// Whether every phrase is done.
    pub fn complete(&self) -> bool {
        self.waiting.is_empty() && self.begun.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After each of `tokens`: the bank and the advances that transformers 4.55.4 has.
    fn trace(sets: &[&[&[u32]]], tokens: &[u32]) -> Vec<(usize, Vec<(u32, usize)>)> {
        let sets: Vec<Vec<Vec<u32>>> = sets.iter().map(|set| set.iter().map(|ids| ids.to_vec()).collect()).collect();
        let phrases = Phrases::new(&sets);
        let state = |len| {
            let progress = phrases.after(&tokens[..len]);
            assert_eq!(progress.complete(), phrases.advances(&progress).is_empty());
            (phrases.bank(&progress), phrases.advances(&progress))
        };
        (0..=tokens.len()).map(state).collect()
    }

    #[test]
    fn a_phrase_is_begun_broken_off_and_found() {
        let states = trace(&[&[&[5, 6, 7]]], &[5, 6, 9, 5, 5, 6, 7, 5, 6, 7, 1]);
        let banks: Vec<_> = states.iter().map(|(bank, _)| *bank).collect();
        assert_eq!(banks, [0, 1, 2, 0, 1, 0, 0, 0, 1, 2, 3, 3]);
        let tokens: Vec<_> = states.iter().flat_map(|(_, advances)| advances).map(|(token, _)| *token).collect();
        assert_eq!(tokens, [5, 6, 7, 5, 6, 5, 5, 5, 6, 7]);
    }

    #[test]
    fn what_was_broken_off_is_tried_last() {
        let expected = [
            (0, vec![(5, 1), (5, 1), (9, 2)]),
            (1, vec![(6, 2)]),
            (0, vec![(5, 1), (9, 2), (5, 1)]),
            (1, vec![(8, 2)]),
            (2, vec![(9, 4), (5, 3)]),
            (4, vec![(5, 5)]),
            (5, vec![(6, 6)]),
            (6, vec![]),
        ];
        assert_eq!(trace(&[&[&[5, 6]], &[&[5, 8]], &[&[9]]], &[5, 8, 5, 8, 9, 5, 6]), expected);
    }

    #[test]
    fn one_alternative_of_a_set_is_enough() {
        let expected = [
            (0, vec![(1, 2), (3, 3), (4, 1)]),
            (1, vec![(5, 2)]),
            (0, vec![(1, 2), (3, 3), (4, 1)]),
            (2, vec![(2, 3)]),
            (3, vec![(4, 4)]),
            (4, vec![(5, 5)]),
            (5, vec![(6, 6)]),
            (6, vec![]),
            (6, vec![]),
        ];
        assert_eq!(trace(&[&[&[1, 2], &[3]], &[&[4, 5, 6]]], &[4, 3, 1, 2, 4, 5, 6, 3]), expected);
    }

    #[test]
    fn alternatives_that_share_a_head_are_ranked_as_the_reference_does() {
        let expected = [(0, vec![(1, 1)]), (1, vec![(2, 3), (4, 3)]), (2, vec![(3, 4), (4, 0)]), (3, vec![(5, 4)]), (4, vec![])];
        assert_eq!(trace(&[&[&[1, 2, 3], &[1, 4], &[1, 2, 4, 5]]], &[1, 2, 4, 5]), expected);
        let expected = [(0, vec![(1, 1), (1, 1)]), (1, vec![(2, 3), (3, 3)]), (2, vec![(3, 3)]), (3, vec![(1, 5)])];
        assert_eq!(trace(&[&[&[1, 2, 3], &[1, 3]], &[&[1, 2]]], &[1, 2, 3]), expected);
    }

    #[test]
    fn a_phrase_asked_for_twice_is_needed_twice() {
        let banks: Vec<_> = trace(&[&[&[7, 7]], &[&[7, 7]]], &[7, 7, 7, 7]).into_iter().map(|(bank, _)| bank).collect();
        assert_eq!(banks, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn the_rest_is_counted_from_where_a_row_is() {
        let phrases = Phrases::new(&[vec![vec![1, 2, 3], vec![1, 4]], vec![vec![5, 5, 5]]]);
        let missing = |tokens: &[u32]| phrases.missing(&phrases.after(tokens)).collect::<Vec<_>>();
        assert_eq!(missing(&[]), [(0, 2), (1, 3)]);
        assert_eq!(missing(&[5, 5]), [(1, 1), (0, 2)]);
        assert_eq!(missing(&[1, 2, 3, 5]), [(1, 2)]);
        assert_eq!(missing(&[1, 4, 5, 5, 5]), []);
    }

    /// What transformers 4.55.4 makes of three beams of which plain search would continue 0 with 0, 1 with 5 and 0 with 4.
    fn chosen(sets: &[&[&[u32]]]) -> Vec<(usize, u32, f32)> {
        let sets: Vec<Vec<Vec<u32>>> = sets.iter().map(|set| set.iter().map(|ids| ids.to_vec()).collect()).collect();
        let phrases = Phrases::new(&sets);
        let forced = Forced { beams: [[0, 0], [0, 1], [0, 4]].map(|tokens| phrases.after(&tokens)).into(), phrases };
        let scores = [
            [-1.0, -3.0, -4.5, -5.0, -2.0, -9.0],
            [-2.5, -3.5, -3.0, -7.0, -8.0, -1.5],
            [-6.0, -6.5, -120.0, -6.1, -7.0, f32::NEG_INFINITY],
        ];
        let best = [(0, 0, -1.0), (1, 5, -1.5), (0, 4, -2.0)].map(|(beam, token, score)| Candidate { beam, token, score, rank: 0 });
        let chosen = forced.steer(best.into(), |beam, token| scores[beam][token as usize]);
        chosen.into_iter().map(|Candidate { beam, token, score, .. }| (beam, token, score)).collect()
    }

    #[test]
    fn beams_of_all_banks_take_turns() {
        assert_eq!(chosen(&[&[&[1, 2]]]), [(1, 2, -3.0), (0, 1, -3.0), (0, 0, -1.0)]);
        assert_eq!(chosen(&[&[&[1, 2]], &[&[3]]]), [(1, 2, -3.0), (0, 1, -3.0), (0, 0, -1.0)]);
        assert_eq!(chosen(&[&[&[4]]]), [(0, 4, -2.0), (0, 0, -1.0), (1, 4, -8.0)]);
        assert_eq!(chosen(&[&[&[0]], &[&[1]], &[&[4]]]), [(2, 1, -6.5), (1, 5, -1.5), (0, 0, -1.0)]);
        assert_eq!(chosen(&[&[&[4, 2], &[4, 3]], &[&[1]]]), [(1, 4, -8.0), (1, 5, -1.5), (0, 4, -2.0)]);
    }

    #[test]
    fn a_score_can_outweigh_a_bank() {
        assert_eq!(chosen(&[&[&[4, 2]], &[&[5, 5, 5]]]), [(0, 4, -2.0), (2, 2, -120.0), (1, 5, -1.5)]);
    }

    #[test]
    fn what_is_forbidden_or_known_is_not_offered() {
        assert_eq!(chosen(&[&[&[0]]]), [(0, 0, -1.0), (1, 5, -1.5), (0, 4, -2.0)]);
        assert!(!chosen(&[&[&[4, 5]]]).iter().any(|next| next.0 == 2 && next.1 == 5));
    }
}
