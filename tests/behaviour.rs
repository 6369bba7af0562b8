//! What a user sees on a real model: stopping, text, records, processors of one's own, memory, progress.

use candle_generate::{
    FinishReason, GenerationConfig, Generator, History, LogitsProcessor, OnProgress, Result, Stage, candle_core::DType, config::Boost,
    logits::PenaltyScope,
};
use std::{
    ops::ControlFlow,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

const PROMPT: &str = "Once upon a time";

static STORYTELLER: LazyLock<Generator> = LazyLock::new(|| Generator::from_pretrained(folder()).unwrap());

fn folder() -> PathBuf {
    PathBuf::from("examples/models/storyteller")
}

fn greedy(tokens: usize) -> GenerationConfig {
    GenerationConfig::greedy().max_new_tokens(tokens)
}

fn text(config: &GenerationConfig) -> String {
    STORYTELLER.generate(PROMPT, config).unwrap().text().to_owned()
}

#[test]
fn text_continues_the_prompt() {
    let output = STORYTELLER.generate(PROMPT, &greedy(20)).unwrap();
    let sequence = &output.sequences[0];
    assert!(sequence.text.starts_with(" there lived a man"), "{:?}", sequence.text);
    assert_eq!(sequence.full_text, format!("{PROMPT}{}", sequence.text));
    assert_eq!((sequence.tokens.len(), sequence.prompt_len, sequence.finish), (20, 6, FinishReason::Length));
    assert_eq!((output.usage.prompt_tokens, output.usage.generated_tokens), (6, 20));
    assert!(output.timings.total >= output.timings.first_token && output.timings.forward > Duration::ZERO);
    assert_eq!(sequence.seed, None, "nothing was drawn");
}

#[test]
fn arithmetic_in_half_precision_is_asked_for() {
    assert_eq!(STORYTELLER.model().info().dtype, DType::F32, "though the file is bf16");
    let plain = STORYTELLER.generate(PROMPT, &greedy(12).output_logits(true)).unwrap();
    for (dtype, most) in [(DType::BF16, 0.3), (DType::F16, 0.05)] {
        let generator = Generator::builder(folder()).dtype(dtype).load().unwrap();
        assert_eq!(generator.model().info().dtype, dtype);
        let half = generator.generate(PROMPT, &greedy(12).output_logits(true)).unwrap();
        assert_eq!(half.tokens(), plain.tokens());
        let [half, plain] = [&half, &plain].map(|output| output.sequences[0].logits.as_ref().unwrap().concat());
        let off = half.iter().zip(plain).map(|(half, plain)| (half - plain).abs()).fold(0.0, f32::max);
        assert!(off > 0.0 && off < most, "{dtype:?} is {off} off");
    }
}

#[test]
fn stop_strings_end_rows_across_token_borders() {
    let whole = text(&greedy(40));
    let stop = "three sons, and";
    let cut = whole.find(stop).unwrap();
    let output = STORYTELLER.generate(PROMPT, &greedy(40).stop_strings([stop, "never to be seen"])).unwrap();
    let sequence = &output.sequences[0];
    assert_eq!((sequence.text.as_str(), sequence.finish), (&whole[..cut], FinishReason::StopString));
    assert_eq!(sequence.stop_string.as_deref(), Some(stop));
    let decoded = STORYTELLER.tokenizer().unwrap().decode(&sequence.tokens, true).unwrap();
    assert!(decoded.contains(stop), "ids are left as generated: {decoded:?}");
    let kept = text(&greedy(40).stop_strings([stop]).include_stop_string(true));
    assert_eq!(kept, whole[..cut + stop.len()]);
}

#[test]
fn a_prompt_contributes_the_head_of_a_stop_string() {
    let output = STORYTELLER.generate(PROMPT, &greedy(10).stop_strings(["a time there"])).unwrap();
    assert_eq!((output.text(), output.sequences[0].finish), ("", FinishReason::StopString));
    assert_eq!(output.tokens().len(), 1);
}

#[test]
fn stop_tokens_are_left_out_of_the_text() {
    let whole = STORYTELLER.generate(PROMPT, &greedy(10)).unwrap();
    let stop = whole.tokens()[4];
    let output = STORYTELLER.generate(PROMPT, &greedy(10).stop_token_ids(vec![stop])).unwrap();
    let sequence = &output.sequences[0];
    assert_eq!(sequence.finish, FinishReason::StopToken);
    assert_eq!(sequence.tokens, whole.tokens()[..5]);
    let expected = text(&greedy(4));
    assert_eq!(sequence.text, expected);
    let eos = STORYTELLER.generate(PROMPT, &greedy(10).eos_token_id(vec![stop, 2])).unwrap();
    assert_eq!((eos.sequences[0].finish, eos.tokens()), (FinishReason::Eos, &whole.tokens()[..5]));
}

#[test]
fn time_and_criteria_end_rows() {
    let output = STORYTELLER.generate(PROMPT, &greedy(900).max_time(1e-9)).unwrap();
    assert_eq!((output.sequences[0].finish, output.tokens().len()), (FinishReason::Time, 1));
    let third = |history: &History<'_>| (history.generated().len() == 3).then_some(FinishReason::Criteria);
    let output = STORYTELLER.generate(PROMPT, &greedy(20).stopping_criteria(third)).unwrap();
    assert_eq!((output.sequences[0].finish, output.tokens().len()), (FinishReason::Criteria, 3));
}

#[test]
fn log_probs_are_the_models_own_unless_asked() {
    let config = greedy(8).temperature(0.5).repetition_penalty(1.5).log_probs(3).output_logits(true).output_scores(true);
    let output = STORYTELLER.generate(PROMPT, &config).unwrap();
    let sequence = &output.sequences[0];
    let (log_probs, logits) = (sequence.log_probs.as_ref().unwrap(), sequence.logits.as_ref().unwrap());
    let reference = |scores: &[f32], id: u32| {
        let sum: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
        f64::from(scores[id as usize]) - sum.ln()
    };
    for (step, entry) in log_probs.iter().enumerate() {
        assert_eq!(entry.id, sequence.tokens[step]);
        assert!((f64::from(entry.log_prob) - reference(&logits[step], entry.id)).abs() < 1e-5);
        assert_eq!(entry.top.len(), 3);
        assert!(entry.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
    }
    let scores = sequence.scores.as_ref().unwrap();
    assert!(scores != logits, "the penalty shows in the scores");
    let processed = STORYTELLER.generate(PROMPT, &config.processed_log_probs(true)).unwrap();
    let entry = &processed.sequences[0].log_probs.as_ref().unwrap()[7];
    assert!((f64::from(entry.log_prob) - reference(&scores[7], entry.id)).abs() < 1e-5);
}

#[test]
fn bad_words_as_strings_cover_both_spellings() {
    let plain = text(&greedy(60));
    assert!(plain.contains("sons"), "{plain:?}");
    let banned = text(&greedy(60).bad_words(["sons", "eldest"]));
    assert!(!banned.contains(" sons") && !banned.contains(" eldest"), "{banned:?}");
}

#[test]
fn keywords_are_raised_until_produced() {
    let config = greedy(40).keyword_boost(Boost { bias: 12.0, ..Boost::new(["dragon", "river"]) });
    let output = STORYTELLER.generate(PROMPT, &config).unwrap();
    let sequence = &output.sequences[0];
    assert_eq!(sequence.keywords.len(), 2);
    for (word, produced) in &sequence.keywords {
        assert_eq!(*produced, sequence.text.contains(word.as_str()), "{word} in {:?}", sequence.text);
    }
    assert!(sequence.keywords.iter().any(|(_, produced)| *produced), "{:?}", sequence.text);
    assert!(!text(&greedy(40)).contains("dragon"));
}

#[test]
fn penalties_have_a_scope() {
    let strong = greedy(30).repetition_penalty(3.0);
    let all = text(&strong);
    let generated = text(&strong.clone().penalty_scope(PenaltyScope::Generated));
    let last = text(&strong.clone().penalty_scope(PenaltyScope::Last(0)));
    assert_ne!(all, generated);
    assert_eq!(last, text(&greedy(30)), "an empty scope penalises nothing");
    let every: Vec<u32> = (0..2048).collect();
    assert_eq!(text(&strong.penalty_exempt_ids(every)), text(&greedy(30)));
}

/// Allows one token only.
#[derive(Debug)]
struct Only(u32);

impl LogitsProcessor for Only {
    fn name(&self) -> &str {
        "only"
    }

    fn process(&self, _: &History<'_>, scores: &mut [f32]) -> Result<()> {
        scores.iter_mut().enumerate().filter(|(id, _)| *id != self.0 as usize).for_each(|(_, score)| *score = f32::NEG_INFINITY);
        Ok(())
    }
}

#[test]
fn processors_and_prefix_functions_of_ones_own() {
    let output = STORYTELLER.generate(PROMPT, &greedy(3).logits_processor(Only(600))).unwrap();
    assert_eq!(output.tokens(), [600, 600, 600]);
    let alternate = |_: usize, ids: &[u32]| if ids.len().is_multiple_of(2) { vec![500] } else { vec![501] };
    let output = STORYTELLER.generate(PROMPT, &greedy(4).prefix_allowed_tokens_fn(alternate)).unwrap();
    assert_eq!(output.tokens(), [500, 501, 500, 501]);
    let by_prompt = |prompt: usize, _: &[u32]| vec![700 + prompt as u32];
    let output = STORYTELLER.generate_batch(["a", "b"], &greedy(1).prefix_allowed_tokens_fn(by_prompt)).unwrap();
    assert_eq!(output.sequences.iter().map(|row| row.tokens[0]).collect::<Vec<_>>(), [700, 701]);
}

/// Pearson's statistic of first tokens against the softmax of the processed scores, below its 99.9% quantile (Wilson and Hilferty's
/// approximation).
#[test]
fn draws_follow_the_processed_distribution() {
    let recipes = [
        GenerationConfig::sampling().top_k(12),
        GenerationConfig::sampling().temperature(2.0).top_k(8),
        GenerationConfig::sampling().temperature(3.0).top_k(0).top_p(0.8).typical_p(0.7),
    ];
    for config in recipes {
        let config = config.max_new_tokens(1).seed(5);
        let first = STORYTELLER.generate(PROMPT, &config.clone().output_scores(true)).unwrap();
        let scores = &first.sequences[0].scores.as_ref().unwrap()[0];
        let total: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
        let draws = 4000;
        let output = STORYTELLER.generate(PROMPT, &config.num_return_sequences(draws)).unwrap();
        let mut counts = vec![0usize; scores.len()];
        output.sequences.iter().for_each(|sequence| counts[sequence.tokens[0] as usize] += 1);
        let (mut statistic, mut cells) = (0.0, 0);
        for (score, count) in scores.iter().zip(counts) {
            let expected = f64::from(*score).exp() / total * draws as f64;
            assert!(expected > 0.0 || count == 0, "a forbidden token was drawn");
            if expected > 0.0 {
                statistic += (count as f64 - expected).powi(2) / expected;
                cells += 1;
            }
        }
        let freedom = f64::from(cells - 1);
        let spread = 2.0 / (9.0 * freedom);
        let bound = freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3);
        assert!(cells > 3 && statistic < bound, "{statistic} with {cells} cells, at most {bound}");
    }
}

#[test]
fn explain_shows_the_mode_the_order_and_the_origins() {
    let config = GenerationConfig::sampling().temperature(0.7).repetition_penalty(1.2);
    let explanation = STORYTELLER.explain(&config).unwrap();
    assert_eq!(explanation.processors, ["repetition_penalty", "temperature", "top_k"]);
    let text = explanation.to_string();
    for part in ["sample", "temperature", "0.7", "top_k", "50", "default", "max_new_tokens", "256", "model", "memory"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn long_prompts_report_progress_and_can_be_cancelled() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let generator = Generator::builder(folder())
        .progress(OnProgress::new(move |progress| {
            log.lock().unwrap().push(progress);
            if progress.stage == Stage::Prefill && progress.done >= 400 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }))
        .load()
        .unwrap();
    let loading = std::mem::take(&mut *seen.lock().unwrap());
    assert!(loading.iter().all(|progress| progress.stage == Stage::Load) && loading.last().unwrap().done == loading.last().unwrap().total);
    let prompt: Vec<u32> = (0..700).map(|at| 10 + at % 500).collect();
    let error = generator.generate(prompt.clone(), &greedy(2).prefill_chunk_size(100)).unwrap_err();
    assert_eq!(error.kind(), "cancelled");
    assert_eq!(seen.lock().unwrap().iter().map(|progress| progress.done).collect::<Vec<_>>(), [100, 200, 300, 400]);
    assert_eq!(generator.generate(prompt[..300].to_vec(), &greedy(2)).unwrap().tokens().len(), 2);
}

#[test]
fn memory_counts_weights_pages_and_rows() {
    let info = STORYTELLER.model().info();
    let one = STORYTELLER.memory(&greedy(100), 1, 100).unwrap();
    assert_eq!(one.weights, info.weight_bytes);
    let positions = 200usize.div_ceil(info.page) * info.page;
    assert_eq!(one.cache, positions as u64 * info.position_bytes);
    assert_eq!(STORYTELLER.memory(&greedy(100), 3, 100).unwrap().cache, 3 * one.cache);
    let samples = GenerationConfig::sampling().max_new_tokens(100).num_return_sequences(8);
    let eight = STORYTELLER.memory(&samples, 1, 100).unwrap().cache;
    assert!(eight > one.cache && eight < 8 * one.cache, "the prompt is held once");
}

#[cfg(feature = "chat")]
#[test]
fn messages_are_prompts() {
    let output = STORYTELLER.generate(vec![candle_generate::Message::user("Hello!")], &greedy(40)).unwrap();
    assert_eq!(output.text(), "Good day! Shall I tell you a story?");
    assert_eq!(output.sequences[0].finish, FinishReason::Eos);
    let ids = STORYTELLER.encode(vec![candle_generate::Message::user("Hello!")]).unwrap();
    assert_eq!((ids[0], ids[1], *ids.last().unwrap()), (1, 4, 5));
}

/// XTC's coin and mirostat's memory are the row's own.
#[test]
fn draws_with_a_memory_do_not_depend_on_company() {
    let generator = &STORYTELLER;
    let base = || GenerationConfig::sampling().max_new_tokens(24);
    let configs = [
        base().mirostat_tau(0.5).mirostat_eta(0.3),
        base().xtc_probability(0.5).xtc_threshold(0.05),
        base().dry_multiplier(2.0).frequency_penalty(1.5).presence_penalty(2.0).top_n_sigma(2.0).logit_bias([(5, -3.0)]),
    ];
    let plain = generator.generate("Once upon a time", &base().seed(1)).unwrap();
    for config in configs {
        let prompts = ["The king", "Once upon a time", "It was"];
        let together = generator.generate_batch(prompts, &config.clone().num_return_sequences(2).seed(1)).unwrap();
        for row in &together.sequences {
            let alone = generator.generate(prompts[row.prompt], &config.clone().seed(row.seed.unwrap())).unwrap();
            assert_eq!(alone.tokens(), row.tokens);
        }
        assert_ne!(generator.generate("Once upon a time", &config.seed(1)).unwrap().tokens(), plain.tokens());
    }
}

#[test]
fn dry_ends_a_loop() {
    let generator = &STORYTELLER;
    let config = GenerationConfig::greedy().max_new_tokens(120).eos_token_id(-1);
    let repeated = |config: &GenerationConfig| {
        let output = generator.generate("the wolf and the wolf and the wolf and the", config).unwrap();
        let windows: Vec<_> = output.tokens().windows(8).map(<[u32]>::to_vec).collect();
        windows.len() - windows.iter().collect::<std::collections::HashSet<_>>().len()
    };
    assert!(repeated(&config) > 0, "without it the storyteller repeats itself");
    assert_eq!(repeated(&config.clone().dry_multiplier(5.0)), 0);
}
