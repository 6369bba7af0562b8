use super::*;
use crate::{
    config::Drafts,
    error::Error,
    logits::{History, LogitsProcessor},
    model::Context,
};
use serde_json::{Value, json};

const STORYTELLER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/models/storyteller");

fn config(json: Value) -> GenerationConfig {
    GenerationConfig::from_json(&json).unwrap()
}

fn info() -> ModelInfo {
    ModelInfo::new("test", 2048)
}

/// A plan for a model whose file says only that 2 is the end token.
fn plan(json: Value) -> Result<Plan> {
    Plan::new(&config(json), &config(json!({"eos_token_id": 2})), &info(), None)
}

fn setting<'a>(plan: &'a Plan, field: &str) -> Option<&'a Setting> {
    plan.explanation.settings.iter().find(|setting| setting.field == field)
}

fn refused(result: Result<Plan>) -> Vec<String> {
    match result {
        Err(Error::Config(problems)) => problems.into_iter().map(|problem| problem.field).collect(),
        other => panic!("not refused: {other:?}"),
    }
}

/// The names of the processors' types.
fn types(plan: &Plan) -> Vec<String> {
    let name = |processor: &Arc<dyn LogitsProcessor>| format!("{processor:?}").split([' ', '{', '(']).next().unwrap().to_owned();
    plan.processors.iter().map(name).collect()
}

/// A config that turns every processor on, `min_new_tokens` excepted.
fn everything() -> GenerationConfig {
    let json = json!({
        "eos_token_id": [2, 3], "sequence_bias": [[[5], 1.0]], "encoder_repetition_penalty": 1.5, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 4, "bad_words_ids": [[7]], "min_length": 4, "forced_bos_token_id": 1,
        "forced_eos_token_id": 2, "remove_invalid_values": true, "exponential_decay_length_penalty": [2, 1.5], "suppress_tokens": [8],
        "begin_suppress_tokens": [9], "do_sample": true, "temperature": 0.5, "top_h": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1,
        "typical_p": 0.5, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "renormalize_logits": true, "watermarking_config": {"hashing_key": 9},
    });
    config(json).prefix_allowed_tokens_fn(|_, _| vec![1])
}

fn planned(call: &GenerationConfig) -> Plan {
    Plan::new(call, &GenerationConfig::new(), &info(), None).unwrap()
}

#[derive(Debug)]
struct Own(String);

impl LogitsProcessor for Own {
    fn name(&self) -> &str {
        &self.0
    }

    fn process(&self, _: &History<'_>, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
}

/// The order that transformers 5.23.0 builds for the same config.
#[test]
fn processors_run_in_the_order_of_the_reference() {
    let mut order = vec![
        "SequenceBias",
        "EncoderRepetitionPenalty",
        "RepetitionPenalty",
        "NoRepeatNgram",
        "EncoderNoRepeatNgram",
        "BadWords",
        "MinLength",
        "PrefixAllowed",
        "ForcedBos",
        "ForcedEos",
        "RemoveInvalid",
        "ExponentialDecay",
        "Suppress",
        "SuppressAtBegin",
        "Temperature",
        "TopH",
        "TopK",
        "TopP",
        "MinP",
        "Typical",
        "EpsilonCutoff",
        "EtaCutoff",
        "Watermark",
        "Renormalize",
    ];
    assert_eq!(types(&planned(&everything())), order);
    order[6] = "MinNewTokens";
    assert_eq!(types(&planned(&everything().min_new_tokens(4))), order);
    assert_eq!(types(&planned(&config(json!({"do_sample": true})))), ["TopK"]);
    assert!(planned(&GenerationConfig::new()).processors.is_empty());
}

#[test]
fn samplers_of_ours_have_their_places() {
    let ours = json!({
        "do_sample": true, "sequence_bias": [[[5], 1.0]], "logit_bias": {"6": 1.5}, "encoder_repetition_penalty": 1.5,
        "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.25, "dry_multiplier": 0.8,
        "no_repeat_ngram_size": 3, "temperature": 0.5, "top_n_sigma": 1.0, "top_p": 0.9, "xtc_probability": 0.5,
    });
    let order = ["SequenceBias", "LogitBias", "EncoderRepetitionPenalty", "RepetitionPenalty", "CountPenalty", "Dry", "NoRepeatNgram"];
    let found = plan(ours.clone()).unwrap();
    assert_eq!(types(&found), [&order[..], &["Temperature", "TopNSigma", "TopK", "TopP"]].concat());
    assert_eq!(found.draw, Draw::Xtc { probability: 0.5, threshold: 0.1 });

    let mut surprised = ours;
    surprised["mirostat_tau"] = json!(4);
    let found = plan(surprised).unwrap();
    assert_eq!(types(&found), [&order[..], &["Temperature"]].concat());
    assert_eq!(found.draw, Draw::Mirostat { tau: 4.0, eta: 0.1 });
    for field in ["top_p", "top_n_sigma", "xtc_probability"] {
        assert_eq!(setting(&found, field).unwrap().unused.as_deref(), Some("mirostat_tau stands in its place"), "{field}");
    }
    let greedy = plan(json!({"mirostat_tau": 4, "xtc_probability": 0.5, "dry_base": 2})).unwrap();
    assert_eq!(greedy.draw, Draw::Plain);
    assert_eq!(setting(&greedy, "mirostat_tau").unwrap().unused.as_deref(), Some("not used by greedy"));
    assert_eq!(setting(&greedy, "dry_base").unwrap().unused.as_deref(), Some("dry_multiplier is off"));
    assert!(types(&plan(json!({"dry_multiplier": 0, "frequency_penalty": 0, "xtc_probability": 0})).unwrap()).is_empty());
}

#[test]
fn samplers_of_ours_refuse_what_they_cannot_do() {
    let wrong = json!({
        "do_sample": true, "logit_bias": {"5000": 1.0}, "presence_penalty": 1e300, "dry_multiplier": -1, "dry_base": 0.5,
        "dry_allowed_length": 0, "top_n_sigma": 0, "xtc_probability": 1.5, "xtc_threshold": -1, "mirostat_tau": 0, "mirostat_eta": 0,
    });
    let mut fields: Vec<_> = wrong.as_object().unwrap().keys().filter(|key| *key != "do_sample").cloned().collect();
    let mut found = refused(plan(wrong));
    // Mirostat takes the place of what it replaces even where its own number is wrong.
    fields.retain(|field| field != "top_n_sigma");
    fields.sort();
    found.sort();
    assert_eq!(found, fields);
    assert_eq!(refused(plan(json!({"do_sample": true, "top_n_sigma": 0}))), ["top_n_sigma"]);
    assert_eq!(refused(plan(json!({"dry_multiplier": 1, "dry_sequence_breakers": ["x"]}))), ["dry_sequence_breakers"]);
    let tokenizer = Tokenizer::from_folder(STORYTELLER).unwrap().unwrap();
    let with = |json| Plan::new(&config(json), &GenerationConfig::new(), &info(), Some(&tokenizer));
    assert_eq!(refused(with(json!({"dry_multiplier": 1, "dry_sequence_breakers": ["x", ""]}))), ["dry_sequence_breakers"]);
    let found = format!("{:?}", with(json!({"dry_multiplier": 1, "dry_sequence_breakers": [",", "once upon"]})).unwrap().processors);
    let comma = tokenizer.encode(",", false).unwrap();
    assert!(comma.iter().all(|id| found.contains(&id.to_string())) && found.contains("sequences: [["), "{found}");
}

#[test]
fn own_processors_run_before_sampling_or_in_place_of_a_namesake() {
    let penalty = planned(&config(json!({"repetition_penalty": 2.0}))).processors[0].name().to_owned();
    let call = everything().logits_processor(Own("mine".into())).logits_processor(Own(penalty));
    let types = types(&planned(&call));
    assert_eq!(types[2], "Own");
    assert_eq!(types[13..16], ["SuppressAtBegin", "Own", "Temperature"]);
    assert_eq!(types.len(), 25);
}

#[test]
fn values_reach_the_processors() {
    let debug = |json| format!("{:?}", plan(json).unwrap().processors);
    assert!(
        debug(json!({"repetition_penalty": 2, "penalty_scope": {"last": 8}, "penalty_exempt_ids": [4]}))
            .contains("2.0, scope: Last(8), exempt: [4]")
    );
    assert!(debug(json!({"min_length": 3, "eos_token_id": [5, -1, 6, 5]})).contains("eos: [5, 6]"));
    assert!(debug(json!({"begin_suppress_tokens": [4], "forced_bos_token_id": 1})).contains("after_forced_bos: true"));
    assert!(debug(json!({"sequence_bias": [[[5], 1.0], [[6], 2.0], [[5], 3.0]]})).contains("[([6], 2.0), ([5], 3.0)]"));
    assert!(debug(json!({"bad_words_ids": [[2], [2, 3]]})).contains("words: [[2, 3]]"));
    assert_eq!(debug(json!({"bad_words_ids": [[2]]})), "[]");
    assert_eq!(debug(json!({"min_length": 3, "min_new_tokens": 0, "eos_token_id": -1})), "[]");
    assert_eq!(debug(json!({"min_new_tokens": 3, "eos_token_id": []})), "[]");
    assert_eq!(debug(json!({"do_sample": true, "top_k": 0, "temperature": 1.0, "top_p": 1.0, "typical_p": 1, "eta_cutoff": 0.0})), "[]");
    assert!(debug(json!({"do_sample": true, "top_k": 0, "top_p": 0.0})).contains("top_p: 0.0, min_tokens_to_keep: 1"));
    assert!(debug(json!({"do_sample": true, "top_k": 5000})).contains("top_k: 5000"));
}

#[test]
fn the_call_stands_above_the_model_and_the_defaults() {
    let model = config(
        json!({"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "vendor": 1, "transformers_version": "4"}),
    );
    let plan = Plan::new(&config(json!({"temperature": 0.8, "temprature": 1})), &model, &info(), None).unwrap();
    assert_eq!(plan.strategy, Strategy::Sample);
    let seen = |field| setting(&plan, field).map(|setting| (setting.value.as_str(), setting.origin, setting.unused.is_none()));
    assert_eq!(seen("temperature"), Some(("0.8", Origin::Call, true)));
    assert_eq!(seen("top_p"), Some(("0.9", Origin::Model, true)));
    assert_eq!(seen("do_sample"), Some(("true", Origin::Model, true)));
    assert_eq!(seen("top_k"), Some(("50", Origin::Default, true)));
    assert_eq!(seen("num_beams"), Some(("1", Origin::Default, true)));
    assert_eq!(seen("length_penalty"), None);
    assert_eq!(plan.eos, [2, 3]);
    assert!(plan.explanation.notes.contains(&"keys without a meaning here: temprature, vendor".to_owned()));

    let greedy = Plan::new(&config(json!({"do_sample": false})), &model, &info(), None).unwrap();
    assert_eq!(greedy.strategy, Strategy::Greedy);
    assert_eq!(setting(&greedy, "top_p").unwrap().unused.as_deref(), Some("not used by greedy"));
    assert!(greedy.processors.is_empty());
}

#[test]
fn a_typed_strategy_is_the_mode_whatever_the_file_says() {
    for file in [
        json!({"do_sample": true, "top_p": 0.5}),
        json!({"num_beams": 4, "num_beam_groups": 2}),
        json!({"penalty_alpha": 0.6, "top_k": 4}),
        json!({"prompt_lookup_num_tokens": 3, "dola_layers": "low"}),
        json!({"force_words_ids": [[1]], "use_mtp": true, "assistant_early_exit": 1}),
        GenerationConfig::beam(3).to_json(),
    ] {
        let model = config(file.clone()).repetition_penalty(1.5);
        for (call, mode) in [(GenerationConfig::greedy(), Strategy::Greedy), (GenerationConfig::sampling(), Strategy::Sample)] {
            let plan = Plan::new(&call, &model, &info(), None).unwrap();
            assert_eq!(plan.strategy, mode, "{file}");
            assert_eq!(types(&plan)[0], "RepetitionPenalty");
        }
    }
    let model = config(json!({"num_beams": 4, "dola_layers": "low", "do_sample": false}));
    let plan = Plan::new(&GenerationConfig::greedy(), &model, &info(), None).unwrap();
    assert!(
        plan.explanation
            .notes
            .contains(&"the call's strategy sets aside what the model's file says about num_beams, dola_layers".to_owned())
    );
    assert_eq!(setting(&plan, "num_beams").unwrap().origin, Origin::Call);
}

#[test]
fn one_beam_is_greedy_search() {
    assert_eq!(planned(&GenerationConfig::beam(1)).strategy, Strategy::Greedy);
}

#[test]
fn a_strategy_may_not_contradict_the_flags_beside_it() {
    assert_eq!(refused(Plan::new(&GenerationConfig::greedy().num_beams(4), &GenerationConfig::new(), &info(), None)), ["strategy"]);
    assert_eq!(refused(Plan::new(&GenerationConfig::greedy().do_sample(true), &GenerationConfig::new(), &info(), None)), ["strategy"]);
    assert!(Plan::new(&GenerationConfig::greedy().num_beams(1).top_k(3), &GenerationConfig::new(), &info(), None).is_ok());
    let lookup = planned(&GenerationConfig::sampling().prompt_lookup_num_tokens(4));
    assert_eq!(lookup.strategy, Strategy::PromptLookup { prompt_lookup_num_tokens: 4, max_matching_ngram_size: 2, do_sample: true });
    assert!(matches!(lookup.draft, Some(Draft::Lookup { num_tokens: 4, ngram: 2 })));
    let alone = GenerationConfig::new().strategy(Strategy::Assisted { drafts: Drafts::Assistant, do_sample: false });
    assert_eq!(refused(Plan::new(&alone, &GenerationConfig::new(), &info(), None)), ["strategy"]);
}

#[test]
fn what_cannot_be_honoured_is_refused() {
    let sample = |field: &str, value: Value| json!({"do_sample": true, field: value});
    for (field, json) in [
        ("max_new_tokens", json!({"max_new_tokens": 0})),
        ("max_length", json!({"max_length": 0})),
        ("min_length", json!({"min_length": -1})),
        ("min_new_tokens", json!({"min_new_tokens": -1})),
        ("max_time", json!({"max_time": -0.5})),
        ("max_time", json!({"max_time": 1e300})),
        ("stop_strings", json!({"stop_strings": "x"})),
        ("stop_token_ids", json!({"stop_token_ids": [2048]})),
        ("num_beams", json!({"num_beams": 0})),
        ("num_beams", json!({"num_beams": -3})),
        ("assistant_ensemble_weight", json!({"assistant_ensemble_weight": 1.0})),
        ("temperature", sample("temperature", json!(0))),
        ("temperature", sample("temperature", json!(-1.0))),
        ("temperature", sample("temperature", json!(1e-60))),
        ("temperature", sample("temperature", json!(1e60))),
        ("top_k", sample("top_k", json!(-1))),
        ("top_p", sample("top_p", json!(1.5))),
        ("top_p", sample("top_p", json!(-0.1))),
        ("min_p", sample("min_p", json!(1.1))),
        ("top_h", sample("top_h", json!(0))),
        ("typical_p", sample("typical_p", json!(0))),
        ("typical_p", sample("typical_p", json!(1.5))),
        ("epsilon_cutoff", sample("epsilon_cutoff", json!(1))),
        ("eta_cutoff", sample("eta_cutoff", json!(-0.1))),
        ("seeds", sample("seeds", json!([]))),
        ("repetition_penalty", json!({"repetition_penalty": 0})),
        ("repetition_penalty", json!({"repetition_penalty": -1.0})),
        ("encoder_repetition_penalty", json!({"encoder_repetition_penalty": 0.0})),
        ("penalty_exempt_ids", json!({"penalty_exempt_ids": [2048]})),
        ("no_repeat_ngram_size", json!({"no_repeat_ngram_size": -1})),
        ("encoder_no_repeat_ngram_size", json!({"encoder_no_repeat_ngram_size": -1})),
        ("bad_words_ids", json!({"bad_words_ids": []})),
        ("bad_words_ids", json!({"bad_words_ids": [[]]})),
        ("bad_words_ids", json!({"bad_words_ids": [[1, 2048]]})),
        ("bad_words", json!({"bad_words": ["x"]})),
        ("keyword_boost", json!({"keyword_boost": {"words": ["x"]}})),
        ("sequence_bias", json!({"sequence_bias": []})),
        ("sequence_bias", json!({"sequence_bias": [[[], 1.0]]})),
        ("sequence_bias", json!({"sequence_bias": [[[2048], 1.0]]})),
        ("suppress_tokens", json!({"suppress_tokens": [2048]})),
        ("begin_suppress_tokens", json!({"begin_suppress_tokens": [2048]})),
        ("forced_bos_token_id", json!({"forced_bos_token_id": -1})),
        ("forced_bos_token_id", json!({"forced_bos_token_id": 4, "suppress_tokens": [4]})),
        ("forced_eos_token_id", json!({"forced_eos_token_id": [2048]})),
        ("forced_eos_token_id", json!({"forced_eos_token_id": []})),
        ("forced_eos_token_id", json!({"forced_eos_token_id": [4, 5], "suppress_tokens": [4, 5, 6]})),
        ("exponential_decay_length_penalty", json!({"exponential_decay_length_penalty": [-1, 1.5]})),
        ("exponential_decay_length_penalty", json!({"exponential_decay_length_penalty": [1, 1.5], "eos_token_id": -1})),
        ("num_return_sequences", json!({"num_return_sequences": 2})),
        ("num_return_sequences", json!({"num_return_sequences": 0})),
        ("num_return_sequences", json!({"num_return_sequences": 5, "num_beams": 4})),
        ("watermarking_config.bias", json!({"watermarking_config": {"bias": 1e300}})),
        ("token_healing", json!({"token_healing": true})),
        ("prompt_lookup_num_tokens", json!({"prompt_lookup_num_tokens": 0})),
        ("max_matching_ngram_size", json!({"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 0})),
        ("use_cache", json!({"prompt_lookup_num_tokens": 2, "use_cache": false})),
        ("log_probs", json!({"log_probs": -1})),
        ("cache_implementation", json!({"cache_implementation": "statik"})),
        ("max_cache_len", json!({"max_cache_len": 0})),
        ("prefill_chunk_size", json!({"prefill_chunk_size": 0})),
        ("prefill_chunk_size", json!({"prefill_chunk_size": 4, "use_cache": false})),
    ] {
        assert_eq!(refused(plan(json.clone())), [field], "{json}");
    }
    let nan = GenerationConfig::sampling().temperature(f64::NAN).top_p(f64::NAN).min_p(f64::NAN);
    assert_eq!(refused(Plan::new(&nan, &GenerationConfig::new(), &info(), None)), ["temperature", "top_p", "min_p"]);
}

#[test]
fn all_that_is_wrong_is_reported_at_once() {
    let json = json!({
        "do_sample": true, "temperature": -1.0, "top_p": 2.0, "num_beams": 0, "max_new_tokens": -5, "no_repeat_ngram_size": -1,
        "bad_words_ids": [[9999], [-0]], "cache_implementation": "fast", "stop_strings": ["x"],
    });
    let mut fields = refused(plan(json));
    fields.sort();
    let expected = [
        "bad_words_ids",
        "cache_implementation",
        "max_new_tokens",
        "no_repeat_ngram_size",
        "num_beams",
        "stop_strings",
        "temperature",
        "top_p",
    ];
    assert_eq!(fields, expected);
    let error = plan(json!({"do_sample": true, "top_p": 1.5})).unwrap_err();
    assert_eq!(error.to_string(), "invalid generation config: top_p = 1.5: accepted is a number from 0 to 1");
}

#[test]
fn what_the_reference_accepts_is_accepted_and_shown() {
    for (field, json) in [
        ("temperature", json!({"temperature": -1.0})),
        ("top_k", json!({"top_k": -1})),
        ("top_p", json!({"top_p": 7.5})),
        ("min_p", json!({"min_p": 7.5})),
        ("top_h", json!({"top_h": 7.5})),
        ("typical_p", json!({"typical_p": -7.5})),
        ("epsilon_cutoff", json!({"epsilon_cutoff": 7.5})),
        ("eta_cutoff", json!({"eta_cutoff": 7.5})),
        ("length_penalty", json!({"length_penalty": -2.0})),
        ("early_stopping", json!({"early_stopping": true})),
        ("num_beam_groups", json!({"num_beam_groups": 3})),
        ("diversity_penalty", json!({"diversity_penalty": 0.5})),
        ("penalty_alpha", json!({"penalty_alpha": 0.6, "top_k": 1})),
        ("max_length", json!({"max_length": -5, "max_new_tokens": 3})),
        ("min_length", json!({"min_length": 3, "min_new_tokens": 2})),
        ("max_matching_ngram_size", json!({"max_matching_ngram_size": 3})),
        ("num_assistant_tokens", json!({"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.4})),
        ("decoder_start_token_id", json!({"decoder_start_token_id": 5000})),
        ("pad_token_id", json!({"pad_token_id": -1})),
        ("compile_config", json!({"compile_config": {"mode": "default"}})),
        ("disable_compile", json!({"disable_compile": true})),
        ("low_memory", json!({"low_memory": true})),
        ("return_dict_in_generate", json!({"return_dict_in_generate": true})),
        ("cache_config", json!({"cache_config": {"backend": "quanto"}})),
        ("cache_implementation", json!({"cache_implementation": "static", "use_cache": false})),
    ] {
        let plan = plan(json.clone()).unwrap();
        assert!(setting(&plan, field).unwrap().unused.is_some(), "{json}");
        assert_eq!(plan.strategy, Strategy::Greedy);
        assert!(plan.processors.iter().all(|processor| processor.name() != field), "{json}");
    }
    for json in [
        json!({"eos_token_id": 5000, "bos_token_id": -1}),
        json!({"stop_strings": [], "suppress_tokens": [], "begin_suppress_tokens": []}),
        json!({"max_time": 0}),
        json!({"guidance_scale": 1.0, "token_healing": false, "use_mtp": false, "output_attentions": false}),
        json!({"do_sample": true, "top_k": 1_000_000, "log_probs": 1_000_000_000}),
        json!({"max_new_tokens": 1_000_000_000_000i64}),
    ] {
        assert!(plan(json.clone()).is_ok(), "{json}");
    }
    let short = plan(json!({"min_length": 50, "max_length": 10})).unwrap();
    assert!(short.explanation.notes.iter().any(|note| note.contains("smallest length is above")));
}

#[test]
fn what_is_not_built_yet_is_unsupported_and_named() {
    for (name, json) in [
        ("assisted", json!({"assistant_early_exit": 2})),
        ("tells no layers", json!({"dola_layers": "high"})),
        ("guidance_scale with contrastive", json!({"guidance_scale": 1.5, "penalty_alpha": 0.5})),
        ("guidance_scale with prompt_lookup", json!({"guidance_scale": 1.5, "prompt_lookup_num_tokens": 2})),
        ("watermarking_config", json!({"watermarking_config": {"ngram_len": 5, "keys": [1, 2]}})),
        ("is_assistant", json!({"is_assistant": true})),
        ("use_mtp", json!({"use_mtp": true, "num_beams": 2})),
        ("output_attentions", json!({"output_attentions": true})),
        ("output_hidden_states", json!({"output_hidden_states": true})),
        ("offloaded", json!({"cache_implementation": "offloaded"})),
        ("quantized", json!({"cache_implementation": "quantized"})),
    ] {
        let error = plan(json.clone()).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(what) if what.contains(name)), "{json}: {error}");
    }
    for recipe in
        [GenerationConfig::creative_writing(), GenerationConfig::factual(), GenerationConfig::diverse(), GenerationConfig::long_form()]
    {
        planned(&recipe);
    }
    let expected = Beams { length_penalty: 1.0, early_stopping: EarlyStopping::When(true), pad: None };
    assert_eq!(planned(&GenerationConfig::translation()).beams, expected);
}

#[test]
fn beams_are_planned() {
    let groups = |field: &str, value: Value| {
        let mut json = json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5});
        json[field] = value;
        plan(json)
    };
    let diverse = groups("pad_token_id", json!(7)).unwrap();
    assert_eq!(diverse.beams, Beams { length_penalty: 1.0, early_stopping: EarlyStopping::When(false), pad: Some(7) });
    assert_eq!(setting(&diverse, "pad_token_id").unwrap().unused, None);
    assert_eq!(groups("pad_token_id", json!(-1)).unwrap().beams.pad, Some(2), "the end token pads unless another does");
    for (field, value) in [
        ("num_beam_groups", json!(3)),
        ("num_beam_groups", json!(8)),
        ("diversity_penalty", json!(0.0)),
        ("diversity_penalty", json!(-1.0)),
        ("do_sample", json!(true)),
        ("length_penalty", json!(1e300)),
    ] {
        assert_eq!(refused(groups(field, value.clone())), [field], "{value}");
    }
    let bias = groups("sequence_bias", json!([[[5], 1.0]])).unwrap();
    assert_eq!(types(&bias), ["SequenceBias", "DiversityPenalty"]);
    assert_eq!(types(&groups("repetition_penalty", json!(1.5)).unwrap()), ["DiversityPenalty", "RepetitionPenalty"]);
    assert!(plan(json!({"length_penalty": 1e300})).is_ok(), "not used by greedy");
}

#[test]
fn lengths_follow_the_reference() {
    let length = |json| plan(json).unwrap().length;
    assert_eq!(length(json!({"max_length": 20})).max_length(3), 20);
    assert_eq!(length(json!({"max_length": 20, "max_new_tokens": 5})).max_length(3), 8);
    assert_eq!(length(json!({})).max_length(3), 23);
    assert_eq!(length(json!({"max_new_tokens": i64::MAX})).max_length(usize::MAX), usize::MAX);
    for context in [Context::Soft(16), Context::Hard(16)] {
        let info = ModelInfo { context, ..info() };
        let plan = Plan::new(&GenerationConfig::new(), &GenerationConfig::new(), &info, None).unwrap();
        assert_eq!(plan.length.max_length(3), 16);
        assert!(plan.explanation.notes[0].contains("16 positions"));
    }
    let model = config(json!({"max_new_tokens": 7}));
    assert_eq!(Plan::new(&config(json!({"max_length": 20})), &model, &info(), None).unwrap().length, Length::New(7));
}

#[test]
fn encoder_decoder_models_need_a_first_token() {
    let info = ModelInfo { is_encoder_decoder: true, ..info() };
    let start = |json| Plan::new(&config(json), &GenerationConfig::new(), &info, None).map(|plan| plan.decoder_start);
    assert_eq!(start(json!({"decoder_start_token_id": 3, "bos_token_id": 4})).unwrap(), [3]);
    assert_eq!(start(json!({"decoder_start_token_id": [3, 5]})).unwrap(), [3, 5]);
    assert_eq!(start(json!({"bos_token_id": 4})).unwrap(), [4]);
    for json in [json!({}), json!({"decoder_start_token_id": []}), json!({"decoder_start_token_id": 9999})] {
        assert!(matches!(start(json), Err(Error::Config(_))));
    }
}

#[test]
fn rows_of_encoder_decoder_models_begin_as_they_are_told() {
    let info = ModelInfo { is_encoder_decoder: true, ..info() };
    let begin = |json| {
        Plan::new(&config(json), &config(json!({"decoder_start_token_id": 3})), &info, None).map(|plan| [0, 1].map(|row| plan.begin(row)))
    };
    assert_eq!(begin(json!({})).unwrap(), [Some(vec![3]), Some(vec![3])]);
    assert_eq!(begin(json!({"decoder_input_ids": [[7, 8]]})).unwrap(), [Some(vec![3, 7, 8]), Some(vec![3, 7, 8])]);
    assert_eq!(begin(json!({"decoder_input_ids": [[3, 8], [7]]})).unwrap(), [Some(vec![3, 8]), Some(vec![3, 7])]);
    let both = json!({"decoder_input_ids": [[3, 8], [7]], "decoder_start_token_id": [4, 7]});
    assert_eq!(begin(both).unwrap(), [Some(vec![4, 3, 8]), Some(vec![7])]);
    for wrong in [json!([]), json!([[]]), json!([[1], []]), json!([[9999]])] {
        let found = Plan::new(&config(json!({"decoder_input_ids": wrong, "decoder_start_token_id": 3})), &config(json!({})), &info, None);
        assert_eq!(refused(found), ["decoder_input_ids"], "{wrong}");
    }
    assert_eq!(refused(plan(json!({"decoder_input_ids": [[1]]}))), ["decoder_input_ids"]);
    assert_eq!(plan(json!({})).unwrap().begin(0), None);
}

#[test]
fn caches_grow_unless_room_is_asked_for() {
    let room = |json| plan(json).unwrap().capacity.room(10);
    assert_eq!(room(json!({})), Room::Grow);
    for name in ["dynamic", "hybrid", "hybrid_chunked", "sliding_window"] {
        assert_eq!(room(json!({"cache_implementation": name, "max_cache_len": 7})), Room::Grow);
    }
    assert_eq!(room(json!({"cache_implementation": "static"})), Room::Reserve(9));
    assert_eq!(room(json!({"cache_implementation": "static", "max_cache_len": 7})), Room::Reserve(7));
    assert_eq!(room(json!({"max_cache_len": 7})), Room::Reserve(7));
    assert_eq!(room(json!({"max_cache_len": 7, "use_cache": false})), Room::Grow);
}

#[test]
fn seeds_are_the_calls_or_fresh() {
    let seeds = |json| plan(json).unwrap().seeds;
    assert_eq!(seeds(json!({"do_sample": true, "seed": 5})), Seeds::One(5));
    assert_eq!(seeds(json!({"do_sample": true, "seed": 5, "seeds": [1, 2]})), Seeds::Each(vec![1, 2]));
    assert_ne!(seeds(json!({"do_sample": true})), seeds(json!({"do_sample": true})));
}

#[test]
fn results_carry_what_was_asked_for() {
    let json = json!({"log_probs": 1_000_000, "processed_log_probs": true, "output_scores": true});
    let expected = Record { log_probs: Some(2048), processed_log_probs: true, scores: true, logits: false, trace: false };
    assert_eq!(plan(json).unwrap().record, expected);
    assert_eq!(plan(json!({})).unwrap().record, Record::default());
}

#[test]
fn words_are_tokenised_in_both_variants() {
    let tokenizer = Tokenizer::from_folder(STORYTELLER).unwrap().unwrap();
    let call = config(json!({
        "bad_words": ["the", "house"], "keyword_boost": {"words": ["rain", "sun"], "bias": 3}, "stop_strings": ["end", "fin"],
        "bad_words_ids": [[7]], "sequence_bias": [[[5], 1.0]],
    }));
    let plan = Plan::new(&call, &GenerationConfig::new(), &info(), Some(&tokenizer)).unwrap();
    assert_eq!(types(&plan), ["SequenceBias", "KeywordBoost", "BadWords"]);
    let keywords = plan.keywords.unwrap();
    assert_eq!(keywords.words, ["rain", "sun"]);
    assert_eq!(keywords.boost.keywords[0], tokenizer.variants("rain").unwrap());
    assert_eq!((keywords.boost.bias, keywords.boost.stop), (3.0, 10));
    let words: Vec<_> = [vec![vec![7]], tokenizer.variants("the").unwrap(), tokenizer.variants("house").unwrap()].concat();
    assert!(format!("{:?}", plan.processors[2]).contains(&format!("{words:?}")));
    assert_eq!(["the end", "fin."].map(|text| plan.stops.watch("").push(text).stop.unwrap()), ["end", "fin"]);
    let wrong = config(json!({"bad_words": [""], "keyword_boost": {"words": []}, "stop_strings": [""]}));
    let mut fields = refused(Plan::new(&wrong, &GenerationConfig::new(), &info(), Some(&tokenizer)));
    fields.sort();
    assert_eq!(fields, ["bad_words", "keyword_boost", "stop_strings"]);
    let small = ModelInfo { vocab_size: 8, ..info() };
    assert_eq!(
        refused(Plan::new(&config(json!({"bad_words": "house"})), &GenerationConfig::new(), &small, Some(&tokenizer))),
        ["bad_words"]
    );
}

#[test]
fn an_explanation_prints_as_a_table() {
    let model = config(json!({"eos_token_id": 2, "length_penalty": 2.0}));
    let call = config(json!({"do_sample": true, "temperature": 0.5, "max_new_tokens": 8, "top_k": 0, "vendor": 1}));
    let text = Plan::new(&call, &model, &info(), None).unwrap().explanation.to_string();
    let expected = "\
mode: sample
processors: @
  max_new_tokens                8     call     used
  min_length                    0     default  used
  do_sample                     true  call     used
";
    let name = planned(&config(json!({"do_sample": true, "temperature": 0.5, "top_k": 0}))).processors[0].name().to_owned();
    assert!(text.starts_with(&expected.replace('@', &name)), "{text}");
    assert!(text.contains("\n  length_penalty                2.0   model    not used by sample\n"), "{text}");
    assert!(text.ends_with("\nnote: keys without a meaning here: vendor\n"), "{text}");
}
