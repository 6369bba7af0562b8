//! The phrases that a constrained beam search has to produce.

use super::Check;
use crate::config::Strategy;
use serde_json::json;

impl Check<'_> {
    /// The alternatives of every phrase, those of `force_words_ids` first.
    pub fn phrases(&mut self, eos: &[u32]) -> Vec<Vec<Vec<u32>>> {
        let Strategy::ConstrainedBeam { num_beams, force_words_ids, force_words } = self.strategy else { return Vec::new() };
        self.company(*num_beams);
        for set in force_words_ids {
            self.ids("force_words_ids", set.iter().flatten().map(|&id| id.into()));
            self.set("force_words_ids", set, eos);
        }
        let mut phrases = force_words_ids.clone();
        for words in force_words {
            let tokenised = self.words("force_words", words.as_slice());
            if tokenised.len() == words.as_slice().len() {
                let set = shortest(tokenised.concat());
                self.set("force_words", &set, eos);
                phrases.push(set);
            }
        }
        phrases
    }

    /// What stands beside phrases.
    fn company(&mut self, num_beams: usize) {
        let config = self.config;
        if let Some(constraints) = &config.constraints {
            self.refuse("constraints", constraints, "these are objects of transformers; accepted are force_words_ids and force_words");
        }
        for (field, empty) in [
            ("force_words_ids", config.force_words_ids.as_ref().is_some_and(Vec::is_empty)),
            ("force_words", config.force_words.as_ref().is_some_and(Vec::is_empty)),
        ] {
            if empty {
                self.refuse(field, "[]", "accepted is at least one phrase");
            }
        }
        if num_beams == 1 {
            self.refuse("num_beams", num_beams, "phrases are forced by a beam search; accepted is an integer from 2 up");
        }
        if config.do_sample == Some(true) {
            self.refuse("do_sample", true, "phrases are forced without drawing tokens; accepted is false");
        }
        if let Some(groups) = config.num_beam_groups.filter(|&groups| groups != 1) {
            self.refuse("num_beam_groups", groups, "phrases are forced in one group of beams; accepted is 1");
        }
    }

    fn set(&mut self, field: &str, set: &[Vec<u32>], eos: &[u32]) {
        let config = self.config;
        let begins = |(index, ids): (usize, &Vec<u32>)| set.iter().enumerate().any(|(other, head)| other != index && ids.starts_with(head));
        let suppressed = |ids: &Vec<u32>| config.suppress_tokens.iter().flatten().any(|id| ids.contains(id));
        let banned = |ids: &Vec<u32>| {
            let mut words = config.bad_words_ids.iter().flatten().filter(|word| !word.is_empty());
            words.any(|word| ids.windows(word.len()).any(|part| part == word))
        };
        let reason = if set.is_empty() || set.iter().any(Vec::is_empty) {
            "accepted are phrases of at least one token"
        } else if set.iter().enumerate().any(begins) {
            "accepted are alternatives none of which begins with another"
        // HF: rows go on behind an end token that a phrase forces.
        } else if set.iter().flatten().any(|id| eos.contains(id) || config.stop_token_ids.iter().flatten().any(|stop| stop == id)) {
            "accepted are phrases without an end token, which would end the row before the phrase"
        // HF: forces them through the ban, with a score of negative infinity.
        } else if set.iter().all(|ids| suppressed(ids) || banned(ids)) {
            "suppress_tokens or bad_words_ids forbid it; accepted are phrases that they leave possible"
        } else {
            return;
        };
        self.refuse(field, json!(set), reason);
    }
}

/// The alternatives that do not begin with another: who says the longer one has said the shorter.
fn shortest(set: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    let mut kept: Vec<Vec<u32>> = Vec::with_capacity(set.len());
    for ids in set {
        if !kept.iter().any(|head| ids.starts_with(head)) {
            kept.retain(|longer| !longer.starts_with(&ids));
            kept.push(ids);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use crate::{
        config::GenerationConfig,
        error::{Error, Result},
        model::ModelInfo,
        plan::Plan,
        text::Tokenizer,
    };
    use serde_json::{Value, json};

    fn storyteller() -> Tokenizer {
        Tokenizer::from_folder("examples/models/storyteller").unwrap().unwrap()
    }

    /// A plan of four beams for a model whose end token is 2.
    fn plan(fields: Value, tokenizer: Option<&Tokenizer>) -> Result<Plan> {
        let call = GenerationConfig::from_json(&fields).unwrap().or(&GenerationConfig::new().num_beams(4));
        Plan::new(&call, &GenerationConfig::new().eos_token_id(2), &ModelInfo::new("test", 2048), tokenizer)
    }

    #[test]
    fn ids_come_before_words() {
        let tokenizer = storyteller();
        let words = [tokenizer.variants("rain").unwrap(), tokenizer.variants("sun").unwrap(), tokenizer.variants("moon").unwrap()];
        assert_eq!(words.each_ref().map(Vec::len), [2, 2, 2], "with a leading space and without");
        let fields = json!({"force_words": ["rain", ["sun", "moon"]], "force_words_ids": [[5, 6], [[7], [8, 9]]]});
        let expected = [vec![vec![5, 6]], vec![vec![7], vec![8, 9]], words[0].clone(), words[1..].concat()];
        assert_eq!(plan(fields, Some(&tokenizer)).unwrap().phrases, expected);
    }

    #[test]
    fn of_words_that_begin_with_another_the_shorter_is_enough() {
        assert_eq!(super::shortest(vec![vec![1, 2], vec![3, 4, 5], vec![1], vec![3, 4, 5, 6], vec![1]]), [vec![3, 4, 5], vec![1]]);
    }

    #[test]
    fn what_cannot_be_forced_is_refused() {
        let tokenizer = storyteller();
        for (fields, refused, reason) in [
            (json!({"force_words_ids": []}), "force_words_ids", "at least one phrase"),
            (json!({"force_words": []}), "force_words", "at least one phrase"),
            (json!({"force_words_ids": [[]]}), "force_words_ids", "at least one token"),
            (json!({"force_words_ids": [[[5], []]]}), "force_words_ids", "at least one token"),
            (json!({"force_words": [[]]}), "force_words", "at least one token"),
            (json!({"force_words": ["rain", ""]}), "force_words", "at least one token"),
            (json!({"force_words_ids": [[5, 2048]]}), "force_words_ids", "below 2048"),
            (json!({"force_words_ids": [[[5], [5, 6]]]}), "force_words_ids", "begins with another"),
            (json!({"force_words_ids": [[[5], [5]]]}), "force_words_ids", "begins with another"),
            (json!({"force_words_ids": [[5, 2]]}), "force_words_ids", "end token"),
            (json!({"force_words_ids": [[5]], "stop_token_ids": [5]}), "force_words_ids", "end token"),
            (json!({"force_words_ids": [[[5, 6], [7]]], "suppress_tokens": [6, 7]}), "force_words_ids", "suppress_tokens"),
            (json!({"force_words_ids": [[5, 6, 7]], "bad_words_ids": [[9], [6, 7]]}), "force_words_ids", "bad_words_ids"),
            (json!({"constraints": {}}), "constraints", "force_words_ids"),
            (json!({"force_words_ids": [[5]], "num_beams": 1}), "num_beams", "from 2 up"),
            (json!({"force_words_ids": [[5]], "num_beams": 0}), "num_beams", "from 1 up"),
            (json!({"force_words_ids": [[5]], "do_sample": true}), "do_sample", "accepted is false"),
            (json!({"force_words_ids": [[5]], "num_beam_groups": 2}), "num_beam_groups", "accepted is 1"),
        ] {
            let Err(Error::Config(problems)) = plan(fields.clone(), Some(&tokenizer)) else { panic!("accepted {fields}") };
            let problem = problems.iter().find(|problem| problem.field == refused).unwrap_or_else(|| panic!("{fields}: {problems:?}"));
            assert!(problem.reason.contains(reason), "{fields}: {problem}");
        }
        let possible = json!({"force_words_ids": [[[5, 6], [7]]], "suppress_tokens": [6], "bad_words_ids": [[8]]});
        assert!(plan(possible, None).is_ok());
        let without = plan(json!({"force_words": ["rain"]}), None);
        assert!(without.is_err_and(|error| error.to_string().contains("tokenizer")));
    }
}
