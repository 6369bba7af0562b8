//! The processors of a config, in transformers' order.

use super::{Check, Keywords};
use crate::{
    config::{OneOrMany, Strategy},
    logits::*,
};
use serde_json::json;
use std::{collections::HashSet, sync::Arc};

/// What runs over the scores of every step.
pub(super) struct Chain {
    pub processors: Vec<Arc<dyn LogitsProcessor>>,
    /// So many of them, the first, are not about the draw.
    pub shaping: usize,
    pub keywords: Option<Keywords>,
    /// Whether rows need a second context.
    pub guided: bool,
}

impl Chain {
    pub fn new(check: &mut Check<'_>, eos: &[u32]) -> Self {
        let keywords = keywords(check);
        let guidance = check.guidance();
        let mut list: Vec<Arc<dyn LogitsProcessor>> = Vec::new();
        if let Some(guidance_scale) = guidance {
            list.push(Arc::new(Guidance { guidance_scale }));
        }
        list.extend(shape(check, eos, keywords.as_ref()));
        let mut processors = merge(list, &check.config.logits_processors);
        let shaping = processors.len();
        if check.strategy.samples() {
            processors.extend(warp(check, eos));
        }
        processors.extend(watermark(check));
        if check.config.renormalize_logits == Some(true) {
            processors.push(Arc::new(Renormalize));
        }
        Self { processors, shaping, keywords, guided: guidance.is_some() }
    }
}

/// The processors of every mode.
fn shape(check: &mut Check<'_>, eos: &[u32], keywords: Option<&Keywords>) -> Vec<Arc<dyn LogitsProcessor>> {
    let config = check.config;
    let mut list: Vec<Arc<dyn LogitsProcessor>> = Vec::new();
    if let Some(biases) = biases(check) {
        list.push(Arc::new(SequenceBias { biases }));
    }
    if let Some(biases) = logit_bias(check) {
        list.push(Arc::new(LogitBias { biases }));
    }
    if let Some(keywords) = keywords {
        list.push(Arc::new(keywords.boost.clone()));
    }
    if let Strategy::DiverseBeam { diversity_penalty, .. } = check.strategy {
        list.push(Arc::new(DiversityPenalty { penalty: *diversity_penalty as f32 }));
    }
    let positive = |x: f32| x > 0.0 && x.is_finite();
    let penalty = check.number("encoder_repetition_penalty", config.encoder_repetition_penalty, "a number above 0", positive);
    if let Some(penalty) = penalty.filter(|&penalty| penalty != 1.0) {
        list.push(Arc::new(EncoderRepetitionPenalty { penalty }));
    }
    let exempt = check.ids("penalty_exempt_ids", config.penalty_exempt_ids.iter().flatten().map(|&id| id.into()));
    let penalty = check.number("repetition_penalty", config.repetition_penalty, "a number above 0", positive);
    if let Some(penalty) = penalty.filter(|&penalty| penalty != 1.0) {
        list.push(Arc::new(RepetitionPenalty { penalty, scope: config.penalty_scope.unwrap_or_default(), exempt: exempt.clone() }));
    }
    let mut penalty = |field, value| check.number(field, value, "a finite number", f32::is_finite).unwrap_or(0.0);
    let frequency = penalty("frequency_penalty", config.frequency_penalty);
    let presence = penalty("presence_penalty", config.presence_penalty);
    if frequency != 0.0 || presence != 0.0 {
        list.push(Arc::new(CountPenalty { frequency, presence, exempt }));
    }
    if let Some(dry) = dry(check) {
        list.push(Arc::new(dry));
    }
    if let Some(size @ 1..) = check.whole("no_repeat_ngram_size", config.no_repeat_ngram_size, 0) {
        list.push(Arc::new(NoRepeatNgram { size }));
    }
    if let Some(size @ 1..) = check.whole("encoder_no_repeat_ngram_size", config.encoder_no_repeat_ngram_size, 0) {
        list.push(Arc::new(EncoderNoRepeatNgram { size }));
    }
    let words = bad_words(check, eos);
    if !words.is_empty() {
        list.push(Arc::new(BadWords { words }));
    }
    // HF: min_new_tokens replaces min_length there too, by one more processor that does the same.
    let min_length = check.whole("min_length", config.min_length.filter(|_| config.min_new_tokens.is_none()), 0);
    if let (Some(min_length @ 1..), false) = (min_length, eos.is_empty()) {
        list.push(Arc::new(MinLength { min_length, eos: eos.to_vec() }));
    }
    let min_new_tokens = check.whole("min_new_tokens", config.min_new_tokens, 0);
    if let (Some(min_new_tokens @ 1..), false) = (min_new_tokens, eos.is_empty()) {
        list.push(Arc::new(MinNewTokens { min_new_tokens, eos: eos.to_vec() }));
    }
    if let Some(function) = &config.prefix_allowed_tokens_fn {
        list.push(Arc::new(PrefixAllowed { function: function.clone() }));
    }
    let suppress = check.ids("suppress_tokens", config.suppress_tokens.iter().flatten().map(|&id| id.into()));
    let forced_bos = match check.target() {
        Some(id) => forced(check, "tgt_lang", Some(OneOrMany::One(id.into())), &suppress),
        None => forced(check, "forced_bos_token_id", config.forced_bos_token_id.map(OneOrMany::One), &suppress),
    };
    if let Some(&id) = forced_bos.first() {
        list.push(Arc::new(ForcedBos { id }));
    }
    let forced_eos = forced(check, "forced_eos_token_id", config.forced_eos_token_id.clone(), &suppress);
    if !forced_eos.is_empty() {
        list.push(Arc::new(ForcedEos { ids: forced_eos }));
    }
    if config.remove_invalid_values == Some(true) {
        list.push(Arc::new(RemoveInvalid));
    }
    if let Some((start, factor)) = config.exponential_decay_length_penalty {
        let field = "exponential_decay_length_penalty";
        if eos.is_empty() {
            check.refuse(field, json!([start, factor]), "it acts on the end token, and eos_token_id names none");
        }
        let start = check.whole(field, Some(start), 0);
        let factor = check.number(field, Some(factor), "a finite factor", f32::is_finite);
        if let (Some(start), Some(factor)) = (start, factor) {
            list.push(Arc::new(ExponentialDecay { start, factor, eos: eos.to_vec() }));
        }
    }
    if !suppress.is_empty() {
        list.push(Arc::new(Suppress { ids: suppress }));
    }
    let ids = check.ids("begin_suppress_tokens", config.begin_suppress_tokens.iter().flatten().map(|&id| id.into()));
    if !ids.is_empty() {
        list.push(Arc::new(SuppressAtBegin { ids, after_forced_bos: !forced_bos.is_empty() }));
    }
    list
}

/// The processors of a draw.
fn warp(check: &mut Check<'_>, eos: &[u32]) -> Vec<Arc<dyn LogitsProcessor>> {
    let config = check.config;
    let mut list: Vec<Arc<dyn LogitsProcessor>> = Vec::new();
    // With beams one token besides the ends has to stay possible, so that a beam can go on.
    let min_tokens_to_keep = match check.strategy.num_beams() {
        1 => 1,
        _ => eos.len().max(1) + 1,
    };
    let accepted = "a number above 0; for no randomness at all set do_sample = false";
    let temperature = check.number("temperature", config.temperature, accepted, |x| x > 0.0 && x.is_finite());
    if let Some(temperature) = temperature.filter(|&temperature| temperature != 1.0) {
        list.push(Arc::new(Temperature { temperature }));
    }
    if check.draws_by_surprise() {
        return list;
    }
    if let Some(top_h) = check.number("top_h", config.top_h, "a number above 0, at most 1", |x| x > 0.0 && x <= 1.0) {
        list.push(Arc::new(TopH { top_h }));
    }
    if let Some(top_n_sigma) = check.number("top_n_sigma", config.top_n_sigma, "a number above 0", |x| x > 0.0 && x.is_finite()) {
        list.push(Arc::new(TopNSigma { top_n_sigma }));
    }
    if let Some(top_k @ 1..) = check.whole("top_k", config.top_k, 0) {
        list.push(Arc::new(TopK { top_k, min_tokens_to_keep }));
    }
    // HF: 0 keeps the most likely token; above 1 does nothing there and is an error here.
    let top_p = check.number("top_p", config.top_p, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x));
    if let Some(top_p) = top_p.filter(|&top_p| top_p < 1.0) {
        list.push(Arc::new(TopP { top_p, min_tokens_to_keep }));
    }
    if let Some(min_p) = check.number("min_p", config.min_p, "a number from 0 to 1", |x| (0.0..=1.0).contains(&x)) {
        list.push(Arc::new(MinP { min_p, min_tokens_to_keep }));
    }
    // HF: above 1 does nothing there and is an error here, as are cutoffs outside their range.
    let typical_p = check.number("typical_p", config.typical_p, "a number above 0, at most 1", |x| x > 0.0 && x <= 1.0);
    if let Some(typical_p) = typical_p.filter(|&typical_p| typical_p < 1.0) {
        list.push(Arc::new(Typical { typical_p, min_tokens_to_keep }));
    }
    let cutoff = |x: f32| (0.0..1.0).contains(&x);
    let epsilon = check.number("epsilon_cutoff", config.epsilon_cutoff, "a number from 0, below 1", cutoff);
    if let Some(epsilon_cutoff) = epsilon.filter(|&epsilon| epsilon > 0.0) {
        list.push(Arc::new(EpsilonCutoff { epsilon_cutoff, min_tokens_to_keep }));
    }
    let eta = check.number("eta_cutoff", config.eta_cutoff, "a number from 0, below 1", cutoff);
    if let Some(eta_cutoff) = eta.filter(|&eta| eta > 0.0) {
        list.push(Arc::new(EtaCutoff { eta_cutoff, min_tokens_to_keep }));
    }
    list
}

/// The watermark, after all that shapes the scores.
fn watermark(check: &mut Check<'_>) -> Option<Arc<dyn LogitsProcessor>> {
    match check.config.watermarking_config.as_ref()? {
        Watermarking::Greenlist(config) => {
            let problems = config.problems();
            if problems.is_empty() {
                return Watermark::new(config).ok().map(|watermark| Arc::new(watermark) as _);
            }
            problems.into_iter().for_each(|problem| check.refuse(&problem.field, problem.value, problem.reason));
        }
        Watermarking::SynthId { .. } => {
            check.lacks("watermarking_config with SynthID is not built; accepted are the fields of a green list")
        }
    }
    None
}

/// The user's processors after the built-in ones, or in place of the one of the same name.
// HF: the same class there, and only processors that are not about sampling can be replaced.
fn merge(built_in: Vec<Arc<dyn LogitsProcessor>>, own: &[Arc<dyn LogitsProcessor>]) -> Vec<Arc<dyn LogitsProcessor>> {
    let replaced =
        |processor: Arc<dyn LogitsProcessor>| own.iter().find(|own| own.name() == processor.name()).cloned().unwrap_or(processor);
    let list: Vec<_> = built_in.into_iter().map(replaced).collect();
    let rest = own.iter().filter(|own| !list.iter().any(|processor| Arc::ptr_eq(processor, own)));
    list.iter().chain(rest).cloned().collect()
}

fn keywords(check: &mut Check<'_>) -> Option<Keywords> {
    let boost = check.config.keyword_boost.as_ref()?;
    let keywords = check.words("keyword_boost", &boost.words);
    if boost.words.is_empty() {
        check.refuse("keyword_boost", json!(boost), "accepted is at least one word");
    }
    let bias = check.number("keyword_boost", Some(boost.bias), "a finite bias", f32::is_finite)?;
    Some(Keywords { words: boost.words.clone(), boost: KeywordBoost { keywords, bias, stop: boost.stop } })
}

fn biases(check: &mut Check<'_>) -> Option<Vec<(Vec<u32>, f32)>> {
    let field = "sequence_bias";
    let entries = check.config.sequence_bias.as_ref()?;
    if entries.is_empty() || entries.iter().any(|(ids, bias)| ids.is_empty() || bias.is_nan()) {
        check.refuse(field, json!(entries), "accepted is at least one pair of a sequence that is not empty and a number");
    }
    check.ids(field, entries.iter().flat_map(|(ids, _)| ids).map(|&id| id.into()));
    // HF: the list becomes a dict, in which the last bias of a sequence wins.
    let mut seen = HashSet::new();
    let last = entries.iter().rev().filter(|(ids, _)| seen.insert(ids)).map(|(ids, bias)| (ids.clone(), *bias as f32));
    let mut biases: Vec<_> = last.collect();
    biases.reverse();
    Some(biases)
}

fn logit_bias(check: &mut Check<'_>) -> Option<Vec<(u32, f32)>> {
    let biases = check.config.logit_bias.as_ref()?;
    if biases.values().any(|bias| bias.is_nan()) {
        check.refuse("logit_bias", json!(biases), "accepted are numbers");
    }
    check.ids("logit_bias", biases.keys().map(|&id| id.into()));
    Some(biases.iter().map(|(&id, &bias)| (id, bias as f32)).collect())
}

fn dry(check: &mut Check<'_>) -> Option<Dry> {
    let config = check.config;
    let multiplier = check.number("dry_multiplier", config.dry_multiplier, "a number from 0 up", |x| x >= 0.0 && x.is_finite());
    let base = check.number("dry_base", config.dry_base.or(Some(1.75)), "a number from 1 up", |x| x >= 1.0 && x.is_finite());
    let allowed_length = check.whole("dry_allowed_length", config.dry_allowed_length.or(Some(2)), 1);
    let multiplier = multiplier.filter(|&multiplier| multiplier > 0.0)?;
    Some(Dry { multiplier, base: base?, allowed_length: allowed_length?, breakers: check.breakers() })
}

fn bad_words(check: &mut Check<'_>, eos: &[u32]) -> Vec<Vec<u32>> {
    let config = check.config;
    let mut words = config.bad_words_ids.clone().unwrap_or_default();
    if config.bad_words_ids.is_some() && (words.is_empty() || words.iter().any(Vec::is_empty)) {
        check.refuse("bad_words_ids", json!(words), "accepted is at least one sequence, and none of them empty");
    }
    check.ids("bad_words_ids", words.iter().flatten().map(|&id| id.into()));
    if let Some(strings) = &config.bad_words {
        words.extend(check.words("bad_words", strings.as_slice()).into_iter().flatten());
    }
    // HF: the end token alone is never banned this way.
    words.retain(|word| !matches!(word.as_slice(), [id] if eos.contains(id)));
    words
}

/// The forced ids, not all of which may be suppressed.
fn forced(check: &mut Check<'_>, field: &str, ids: Option<OneOrMany<i64>>, suppress: &[u32]) -> Vec<u32> {
    let Some(ids) = ids else { return Vec::new() };
    let forced = check.ids(field, ids.as_slice().iter().copied());
    if ids.as_slice().is_empty() {
        check.refuse(field, "[]", "accepted is a token id or a list with at least one");
    } else if !forced.is_empty() && forced.iter().all(|id| suppress.contains(id)) {
        check.refuse(field, json!(ids), "every forced token is also in suppress_tokens, which leaves none to choose");
    }
    forced
}
