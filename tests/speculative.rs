//! Drafts change how fast tokens come, never which: in greedy search to the bit, in sampling in distribution.

use candle_generate::{
    Assistant, Cache, Error, Feed, FinishReason, Forward, GenerationConfig, Generator, History, Model, ModelInfo, Output, Result, Start,
    Tokenizer, Values, Want, model::downcast,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

static LLAMA: LazyLock<Generator> = LazyLock::new(|| Generator::from_pretrained(folder("llama")).unwrap());
static STORYTELLER: LazyLock<Generator> = LazyLock::new(|| Generator::from_pretrained(Path::new("examples/models/storyteller")).unwrap());

fn folder(family: &str) -> PathBuf {
    Path::new("tests/golden").join(family)
}

/// Prompts of unequal lengths that repeat themselves.
fn prompts() -> Vec<Vec<u32>> {
    [3, 17, 1, 30].map(|len| (0..len).map(|at| 5 + (at * at % 11) as u32).collect()).into()
}

#[track_caller]
fn same(left: &Output, right: &Output) {
    assert_eq!(left.sequences.len(), right.sequences.len());
    for (left, right) in left.sequences.iter().zip(&right.sequences) {
        assert_eq!((&left.tokens, left.finish, &left.text), (&right.tokens, right.finish, &right.text), "row {}", left.row);
        assert_eq!((&left.stop_string, &left.log_probs), (&right.stop_string, &right.log_probs), "row {}", left.row);
        let bits = |steps: &Option<Vec<Vec<f32>>>| -> Vec<u32> { steps.iter().flatten().flatten().map(|x| x.to_bits()).collect() };
        assert_eq!(bits(&left.scores), bits(&right.scores), "scores of row {}", left.row);
        assert_eq!(bits(&left.logits), bits(&right.logits), "logits of row {}", left.row);
    }
}

/// Configs whose processors and ends look back, and the tokens of rows that they may end within.
fn greedy() -> Vec<GenerationConfig> {
    let base = || GenerationConfig::greedy().max_new_tokens(24).output_logits(true).output_scores(true).log_probs(2);
    let free = LLAMA.generate_batch(prompts(), &base().eos_token_id(-1)).unwrap();
    let ends: Vec<u32> = free.sequences.iter().map(|row| row.tokens[7]).collect();
    let third = |history: &History<'_>| (history.generated().len() >= 9).then_some(FinishReason::Criteria);
    vec![
        base(),
        base().eos_token_id(ends.clone()),
        base().stop_token_ids(ends),
        base().repetition_penalty(1.4).eos_token_id(-1),
        base().no_repeat_ngram_size(2).eos_token_id(-1),
        base().stopping_criteria(third).eos_token_id(-1),
        GenerationConfig::greedy().max_length(33).cache_implementation("static").output_logits(true),
    ]
}

#[test]
fn prompt_lookup_is_greedy_search() {
    for (place, config) in greedy().into_iter().enumerate() {
        let plain = LLAMA.generate_batch(prompts(), &config).unwrap();
        for (num_tokens, size) in [(1, 1), (4, 2), (50, 3)] {
            let config = config.clone().prompt_lookup_num_tokens(num_tokens).max_matching_ngram_size(size);
            let drafted = LLAMA.generate_batch(prompts(), &config).unwrap();
            same(&drafted, &plain);
            assert!(drafted.usage.drafted_tokens > 0 || place > 0);
        }
    }
}

#[test]
fn any_draft_model_gives_greedy_search() {
    let other = Generator::from_pretrained(folder("llama")).unwrap();
    let wrong = Toy::new(112, |ids| (0..112).map(|id| if id == (ids.len() * 7) % 112 { 9.0 } else { 0.0 }).collect());
    let broken = Toy::new(112, |_| vec![f32::NAN; 112]);
    for (place, config) in greedy().into_iter().enumerate() {
        let plain = LLAMA.generate_batch(prompts(), &config).unwrap();
        for assistant in [Assistant::from(&other), wrong.assistant(), broken.assistant()] {
            for schedule in ["constant", "heuristic"] {
                let config =
                    config.clone().assistant_model(assistant.clone()).num_assistant_tokens(5).num_assistant_tokens_schedule(schedule);
                let drafted = LLAMA.generate_batch(prompts(), &config).unwrap();
                same(&drafted, &plain);
                if assistant.model.info().name == "llama" && place == 0 {
                    assert_eq!(drafted.usage.acceptance(), Some(1.0), "its own draft is kept");
                }
            }
        }
    }
}

#[test]
fn real_text_is_greedy_search_too() {
    let texts = ["Once upon a time", "The king said: the king is dead, long live the", "A"];
    for config in [
        GenerationConfig::greedy().max_new_tokens(60),
        GenerationConfig::greedy().max_new_tokens(60).stop_strings(["three sons", "."]),
        GenerationConfig::greedy().max_new_tokens(40).repetition_penalty(1.2).no_repeat_ngram_size(3),
    ] {
        let plain = STORYTELLER.generate_batch(texts, &config).unwrap();
        let lookup = config.clone().prompt_lookup_num_tokens(8);
        same(&STORYTELLER.generate_batch(texts, &lookup).unwrap(), &plain);
        let own = config.clone().assistant_model(&*STORYTELLER).assistant_confidence_threshold(0.2);
        let drafted = STORYTELLER.generate_batch(texts, &own).unwrap();
        same(&drafted, &plain);
        let mut stream = STORYTELLER.stream_batch(texts, &own).unwrap();
        let (mut joined, mut most) = (vec![String::new(); texts.len()], 0);
        for piece in &mut stream {
            let piece = piece.unwrap();
            joined[piece.row] += &piece.text;
            most = most.max(piece.tokens.len());
        }
        assert!(most > 1, "pieces of several tokens");
        assert!(joined.iter().zip(&plain.sequences).all(|(text, row)| *text == row.text));
    }
}

#[test]
fn a_drawn_row_does_not_depend_on_its_company() {
    let assistant = Assistant::from(&Generator::from_pretrained(folder("llama")).unwrap());
    let config = GenerationConfig::sampling().temperature(1.5).top_k(30).max_new_tokens(20).eos_token_id(-1).seed(5);
    let plain = LLAMA.generate_batch(prompts(), &config).unwrap();
    same(&LLAMA.generate_batch(prompts(), &config.clone().prompt_lookup_num_tokens(4)).unwrap(), &plain);
    let config =
        config.assistant_model(assistant).num_assistant_tokens(3).num_return_sequences(3).num_assistant_tokens_schedule("heuristic");
    let batch = LLAMA.generate_batch(prompts(), &config).unwrap();
    assert_eq!(batch.sequences.len(), 12);
    for row in &batch.sequences {
        let alone = config.clone().num_return_sequences(1).seed(row.seed.unwrap());
        let alone = LLAMA.generate(prompts()[row.prompt].clone(), &alone).unwrap();
        assert_eq!((alone.tokens(), alone.sequences[0].drafted), (row.tokens.as_slice(), row.drafted));
    }
    assert!(batch.usage.acceptance().unwrap() > 0.9, "its own drafts, drawn from the same distribution");
}

/// Pearson's statistic of what rows drew at the first three places, against the model's own distribution of three tokens.
#[test]
fn sampling_keeps_the_distribution() {
    const IDS: usize = 4;
    // A function of the last two ids, so that what was drawn matters for what comes.
    let target = |ids: &[u32]| -> Vec<f32> {
        let (last, before) = (ids[ids.len() - 1] as f32, ids.len().checked_sub(2).map_or(0.0, |at| ids[at] as f32));
        (0..IDS).map(|id| ((id as f32 + 1.0) * (last + 1.7 * before + 0.6)).sin() * 1.5).collect()
    };
    let contrary = move |ids: &[u32]| target(ids).into_iter().map(|score| -score).collect();
    let narrow = |ids: &[u32]| (0..IDS).map(|id| if id == ids.len() % IDS { 4.0 } else { -2.0 }).collect::<Vec<f32>>();
    let generator = Toy::new(IDS, target).generator();
    let draws = 20_000;
    for (name, draft) in [("itself", Toy::new(IDS, target)), ("contrary", Toy::new(IDS, contrary)), ("narrow", Toy::new(IDS, narrow))] {
        for shaped in [false, true] {
            let mut config = GenerationConfig::sampling().top_k(0).max_new_tokens(3).num_return_sequences(draws).seed(11);
            if shaped {
                config = config.temperature(0.7).repetition_penalty(1.5).top_k(3);
            }
            let mut expected = vec![0.0; IDS.pow(3)];
            for (cell, part) in expected.iter_mut().enumerate() {
                let path = [cell / IDS / IDS, cell / IDS % IDS, cell % IDS].map(|id| id as u32);
                *part = (0..3).fold(1.0, |part, place| {
                    let seen: Vec<u32> = [&[1], &path[..place]].concat();
                    part * probability(&target(&seen), &seen, path[place] as usize, shaped)
                });
            }
            let config = config.assistant_model(draft.assistant()).num_assistant_tokens(2).assistant_confidence_threshold(0.3);
            let output = generator.generate(vec![1], &config).unwrap();
            let mut counts = vec![0.0; expected.len()];
            for row in &output.sequences {
                let cell = row.tokens.iter().fold(0, |cell, &id| cell * IDS + id as usize);
                counts[cell] += 1.0;
            }
            // Cells that hardly ever come count as one.
            let (mut statistic, mut freedom, mut rare) = (0.0, -1.0, (0.0, 0.0));
            let term = |part: f64, count: f64| (count - part * draws as f64).powi(2) / (part * draws as f64);
            for (part, count) in expected.iter().zip(counts) {
                assert!(*part > 0.0 || count == 0.0, "{name}: a forbidden token was drawn");
                if part * draws as f64 >= 5.0 {
                    statistic += term(*part, count);
                    freedom += 1.0;
                } else {
                    rare = (rare.0 + part, rare.1 + count);
                }
            }
            if rare.0 > 0.0 {
                statistic += term(rare.0, rare.1);
                freedom += 1.0;
            }
            let spread = 2.0 / (9.0 * freedom);
            let bound = freedom * (1.0f64 - spread + 3.09 * f64::sqrt(spread)).powi(3);
            assert!(statistic < bound, "{name}: {statistic} with {freedom} degrees of freedom, at most {bound}");
            let acceptance = output.usage.acceptance().unwrap();
            assert_eq!(acceptance > 0.999, name == "itself", "{name}: {acceptance}");
        }
    }
}

/// What the toy's scores give an id, after the processors of the test above.
fn probability(scores: &[f32], seen: &[u32], id: usize, shaped: bool) -> f64 {
    let mut scores: Vec<f64> = scores.iter().map(|&score| score.into()).collect();
    if shaped {
        for (_, score) in scores.iter_mut().enumerate().filter(|(id, _)| seen.contains(&(*id as u32))) {
            *score = if *score < 0.0 { *score * 1.5 } else { *score / 1.5 };
        }
        let mut sorted = scores.clone();
        sorted.sort_by(f64::total_cmp);
        scores.iter_mut().for_each(|score| *score = if *score < sorted[1] { f64::NEG_INFINITY } else { *score / 0.7 });
    }
    scores[id].exp() / scores.iter().map(|score| score.exp()).sum::<f64>()
}

#[test]
fn tables_may_be_padded_to_different_sizes() {
    let plain = STORYTELLER.generate("Once upon a time", &GenerationConfig::greedy().max_new_tokens(9)).unwrap();
    for size in [2048 - 64, 2048 + 64] {
        let toy = Toy::new(size, move |ids| (0..size).map(|id| (id + ids.len()) as f32 / 900.0).collect());
        let config = GenerationConfig::greedy().max_new_tokens(9).assistant_confidence_threshold(0.0);
        let unknown = STORYTELLER.generate("A", &config.clone().assistant_model(toy.assistant())).unwrap_err();
        assert!(unknown.to_string().contains("assistant_model") && unknown.to_string().contains("2048"), "{unknown}");
        let known = Assistant { tokenizer: STORYTELLER.tokenizer().cloned(), ..toy.assistant() };
        let drafted = STORYTELLER.generate("Once upon a time", &config.assistant_model(known)).unwrap();
        assert_eq!(drafted.tokens(), plain.tokens());
        assert!(drafted.usage.drafted_tokens > 0);
    }
}

#[test]
fn what_cannot_be_drafted_with_is_refused() {
    let refused = |config: GenerationConfig, field: &str| {
        let error = STORYTELLER.generate("A", &config).unwrap_err();
        assert!(matches!(&error, Error::Config(problems) if problems.iter().any(|problem| problem.field == field)), "{error}");
    };
    let assisted = || GenerationConfig::greedy().assistant_model(&*STORYTELLER);
    refused(assisted().num_assistant_tokens(0), "num_assistant_tokens");
    refused(assisted().num_assistant_tokens_schedule("sometimes"), "num_assistant_tokens_schedule");
    refused(assisted().assistant_confidence_threshold(1.5), "assistant_confidence_threshold");
    refused(assisted().use_cache(false), "use_cache");
    let dates = Tokenizer::from_folder(Path::new("examples/models/date-normaliser")).unwrap();
    refused(
        GenerationConfig::greedy().assistant_model(Assistant { tokenizer: dates, ..Assistant::from(&*STORYTELLER) }),
        "assistant_model",
    );
    let error = STORYTELLER.generate("A", &assisted().assistant_ensemble_weight(0.5)).unwrap_err();
    assert_eq!(error.kind(), "unsupported");
}

#[test]
fn a_cache_that_cannot_forget_is_an_error() {
    let flat = |ids: &[u32]| (0..8).map(|id| if id == ids.len() % 8 { 1.0 } else { 0.0 }).collect::<Vec<f32>>();
    let generator = Toy { forgets: false, ..Toy::new(8, flat) }.generator();
    let config = GenerationConfig::greedy().max_new_tokens(20);
    assert_eq!(generator.generate(vec![1, 1, 1, 1], &config).unwrap().tokens().len(), 20);
    let error = generator.generate(vec![1, 1, 1, 1], &config.prompt_lookup_num_tokens(3)).unwrap_err();
    assert_eq!(error.kind(), "unsupported");
}

#[test]
fn memory_counts_the_draft_model() {
    let plain = STORYTELLER.memory(&GenerationConfig::greedy().max_new_tokens(50), 1, 10).unwrap();
    let config = GenerationConfig::greedy().max_new_tokens(50).assistant_model(&*STORYTELLER);
    let both = STORYTELLER.memory(&config, 1, 10).unwrap();
    assert_eq!((both.weights, both.cache), (2 * plain.weights, 2 * plain.cache));
}

type Scores = Arc<dyn Fn(&[u32]) -> Vec<f32> + Send + Sync>;

/// A model whose logits are a function of the ids.
struct Toy {
    info: ModelInfo,
    scores: Scores,
    forgets: bool,
}

struct Ids {
    ids: Vec<u32>,
    forgets: bool,
}

impl Toy {
    fn new(vocab_size: usize, scores: impl Fn(&[u32]) -> Vec<f32> + Send + Sync + 'static) -> Self {
        Self { info: ModelInfo::new("toy", vocab_size), scores: Arc::new(scores), forgets: true }
    }

    fn generator(self) -> Generator {
        Generator::new(self, None)
    }

    fn assistant(&self) -> Assistant {
        let toy = Self { info: self.info.clone(), scores: self.scores.clone(), forgets: self.forgets };
        (Arc::new(toy) as Arc<dyn Model>).into()
    }
}

impl Model for Toy {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        Ok(rows.iter().map(|_| Box::new(Ids { ids: Vec::new(), forgets: self.forgets }) as Box<dyn Cache>).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward> {
        let mut logits = Vec::new();
        for (index, row) in rows.iter_mut().enumerate() {
            let cache = downcast::<Ids>(row.cache)?;
            let count = match want {
                Want::Nothing => 0,
                Want::Each(counts) => counts[index],
                _ => 1,
            };
            for (place, &id) in row.tokens.iter().enumerate() {
                cache.ids.push(id);
                if place + count >= row.tokens.len() {
                    logits.extend((self.scores)(&cache.ids));
                }
            }
        }
        Ok(Values::Host(logits).into())
    }
}

impl Cache for Ids {
    fn len(&self) -> usize {
        self.ids.len()
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(Self { ids: self.ids.clone(), forgets: self.forgets })
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if !self.forgets {
            return Err(Error::Unsupported("this cache cannot forget".into()));
        }
        self.ids.truncate(len);
        Ok(())
    }
}
