//! A model of candle-transformers, wrapped: its tokens are those of the crate's own decoder over the same checkpoint.
#![allow(clippy::unwrap_used)]

use candle_generate::{
    Error, FinishReason, Foreign, GenerationConfig, Generator, Model, ModelInfo, Result, Strategy, Tokenizer,
    candle_core::{DType, Device},
    config::{Assistant, DolaLayers},
};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

const TINY: &str = "tests/golden/llama-4x";
const STORYTELLER: &str = "examples/models/storyteller";

fn path(folder: &str) -> PathBuf {
    PathBuf::from(folder)
}

/// The llama of candle-transformers, whose cache is beside it.
fn wrapped(folder: &str) -> impl Model + 'static {
    counted(folder, Arc::default())
}

/// The same; `resets` counts how often its cache was emptied.
fn counted(folder: &str, resets: Arc<AtomicUsize>) -> impl Model + 'static {
    let file = |name| fs::read(path(folder).join(name)).unwrap();
    let config = serde_json::from_slice::<LlamaConfig>(&file("config.json")).unwrap().into_config(false);
    let weights = VarBuilder::from_buffered_safetensors(file("model.safetensors"), DType::F32, &Device::Cpu).unwrap();
    let llama = Llama::load(weights, &config).unwrap();
    let info = ModelInfo::new("candle's llama", config.vocab_size);
    let fresh = move || Cache::new(true, DType::F32, &config, &Device::Cpu);
    Foreign::new(
        info,
        (llama, fresh().unwrap()),
        |(llama, cache), ids, position| llama.forward(ids, position, cache),
        move |(_, cache)| {
            resets.fetch_add(1, Relaxed);
            *cache = fresh()?;
            Ok(())
        },
    )
}

/// The same checkpoint under both decoders.
fn both(folder: &str) -> [Generator; 2] {
    let own = Generator::from_pretrained(path(folder)).unwrap();
    let tokenizer = Tokenizer::from_folder(path(folder)).unwrap();
    let other = Generator::new(wrapped(folder), tokenizer).with_config(own.config().clone());
    [own, other]
}

fn prompts() -> Vec<Vec<u32>> {
    (1..7u32).map(|len| (0..len * len).map(|place| 4 + (place * 37 + len * 11) % 100).collect()).collect()
}

#[test]
fn greedy_tokens_are_those_of_the_own_decoder() {
    let [own, other] = both(TINY);
    let config = GenerationConfig::greedy().max_new_tokens(24);
    let expected = own.generate_batch(prompts(), &config).unwrap();
    let found = other.generate_batch(prompts(), &config).unwrap();
    assert_eq!(expected.sequences.len(), 6);
    assert!(expected.sequences.iter().map(|row| row.tokens.len()).sum::<usize>() > 60);
    for (found, expected) in found.sequences.iter().zip(&expected.sequences) {
        assert_eq!((found.prompt, &found.tokens, found.finish), (expected.prompt, &expected.tokens, expected.finish));
    }
    // A prompt in parts, and without a cache.
    for config in [config.clone().prefill_chunk_size(3), config.use_cache(false)] {
        assert_eq!(other.generate(prompts()[5].as_slice(), &config).unwrap().tokens(), expected.sequences[5].tokens);
    }
}

#[test]
fn a_batch_runs_prompt_after_prompt() {
    let resets = Arc::default();
    let generator = Generator::new(counted(TINY, Arc::clone(&resets)), None);
    let output = generator.generate_batch(prompts(), &GenerationConfig::greedy().max_new_tokens(8)).unwrap();
    assert_eq!((output.sequences.len(), resets.load(Relaxed)), (6, 6));
}

#[test]
fn sampled_tokens_are_those_of_the_own_decoder() {
    let [own, other] = both(TINY);
    let config = GenerationConfig::sampling().temperature(1.3).top_k(20).repetition_penalty(1.2).max_new_tokens(16).seed(7);
    let [own, other] = [own, other].map(|generator| generator.generate_batch(prompts(), &config).unwrap());
    for (other, own) in other.sequences.iter().zip(&own.sequences) {
        assert_eq!((&other.tokens, other.seed), (&own.tokens, own.seed));
    }
}

#[test]
fn text_streams_and_stops() {
    let [own, other] = both(STORYTELLER);
    let config = GenerationConfig::greedy().max_new_tokens(24).stop_strings([" three"]);
    let expected = own.generate("Once upon a time", &config).unwrap();
    assert_eq!((expected.text(), expected.sequences[0].finish), (" there lived a man who had", FinishReason::StopString));
    let pieces: Vec<_> = other.stream("Once upon a time", &config).unwrap().map(Result::unwrap).collect();
    assert!(pieces.len() > 4);
    assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<String>(), expected.text());
    assert_eq!(pieces.last().unwrap().finish, Some(FinishReason::StopString));
}

#[test]
fn calls_that_take_turns_do_not_disturb_each_other() {
    let [own, other] = both(TINY);
    let config = GenerationConfig::greedy().max_new_tokens(12);
    let expected: Vec<_> = prompts().into_iter().map(|prompt| own.generate(prompt, &config).unwrap().tokens().to_vec()).collect();
    let mut streams: Vec<_> = prompts().into_iter().map(|prompt| other.stream(prompt, &config).unwrap()).collect();
    while streams.iter_mut().filter_map(|stream| stream.next().transpose().unwrap()).count() > 0 {}
    let found: Vec<_> = streams.into_iter().map(|stream| stream.into_output().unwrap().tokens().to_vec()).collect();
    assert_eq!(found, expected);
    std::thread::scope(|scope| {
        for (prompt, expected) in prompts().into_iter().zip(&expected) {
            let (other, config) = (&other, &config);
            scope.spawn(move || assert_eq!(other.generate(prompt, config).unwrap().tokens(), expected));
        }
    });
}

#[test]
fn it_writes_drafts_for_another_model() {
    let [own, _] = both(TINY);
    let config = GenerationConfig::greedy().max_new_tokens(20);
    // A draft model that agrees, but not where the other ends: its rows are truncated again and again.
    let assistant = Assistant::from(Arc::new(wrapped(TINY)) as Arc<dyn Model>);
    let drafted = config.clone().assistant_model(assistant).num_assistant_tokens(3).repetition_penalty(1.5);
    let expected = own.generate_batch(prompts(), &config.repetition_penalty(1.5)).unwrap();
    let found = own.generate_batch(prompts(), &drafted).unwrap();
    assert!(found.usage.accepted_tokens > 0);
    for (found, expected) in found.sequences.iter().zip(&expected.sequences) {
        assert_eq!(found.tokens, expected.tokens);
    }
}

#[test]
fn what_needs_more_is_refused_before_it_begins() {
    let [_, other] = both(TINY);
    let refusal = |config: GenerationConfig| match other.generate(vec![5u32, 6], &config) {
        Err(Error::Unsupported(reason)) => reason,
        other => panic!("{other:?}"),
    };
    let reason = "candle's llama runs one row at a time: beam; accepted are greedy search and sampling, or implement Model and Cache";
    assert_eq!(refusal(GenerationConfig::beam(3)), reason);
    let dola = Strategy::Dola { dola_layers: DolaLayers::Layers(vec![0]), do_sample: false };
    for (mode, strategy) in [
        ("beam_sample", Strategy::BeamSample { num_beams: 2 }),
        ("diverse_beam", Strategy::DiverseBeam { num_beams: 2, num_beam_groups: 2, diversity_penalty: 1.0 }),
        ("contrastive", Strategy::Contrastive { penalty_alpha: 0.5, top_k: 4 }),
        ("dola", dola),
        ("prompt_lookup", Strategy::PromptLookup { prompt_lookup_num_tokens: 3, max_matching_ngram_size: 2, do_sample: false }),
    ] {
        let reason = refusal(GenerationConfig::new().strategy(strategy));
        assert!(reason.contains(&format!("candle's llama runs one row at a time: {mode}; accepted are")), "{reason}");
    }
    let reason = "candle's llama runs one row at a time: num_return_sequences = 2; accepted is 1: generate once for each seed";
    assert_eq!(refusal(GenerationConfig::sampling().num_return_sequences(2)), reason);
    let reason = "candle's llama runs one row at a time: guidance_scale, which needs two contexts; accepted is 1";
    assert_eq!(refusal(GenerationConfig::greedy().guidance_scale(1.5)), reason);
    let reason = "candle's llama tells the logits after a row's last token alone; for hidden states and earlier logits implement Model";
    match other.score(vec![5u32, 6], [vec![7u32, 8]]) {
        Err(Error::Unsupported(found)) => assert_eq!(found, reason),
        other => panic!("{other:?}"),
    }
    // Nothing is left behind.
    let min = GenerationConfig::greedy().min_new_tokens(3).max_new_tokens(3);
    assert_eq!(other.generate(vec![5u32, 6], &min).unwrap().tokens().len(), 3);
}
