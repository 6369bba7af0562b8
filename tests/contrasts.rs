//! Searches that contrast: contrastive search with earlier states, DoLa with earlier layers, guidance with a second context. On the
//! CPU in f32 their laws hold bit for bit.

use candle_generate::{Feed, GenerationConfig, Generator, Output, Prompt, Start, Strategy, Want, config::DolaLayers};
use serde::Deserialize;
use std::{collections::HashMap, path::Path};

const FAMILIES: [&str; 4] = ["gpt2", "llama", "qwen2", "gemma2"];

/// Lengths of a ragged batch, one of them longer than a page of a cache.
const LENGTHS: [usize; 4] = [5, 21, 1, 9];

fn generator(family: &str) -> Generator {
    Generator::from_pretrained(Path::new("tests/golden").join(family)).unwrap()
}

fn generators() -> impl Iterator<Item = (&'static str, Generator)> {
    FAMILIES.into_iter().map(|family| (family, generator(family)))
}

fn prompts() -> Vec<Vec<u32>> {
    LENGTHS.iter().enumerate().map(|(row, &len)| (0..len).map(|at| 4 + (37 * row + 13 * at + at * at) as u32 % 90).collect()).collect()
}

fn contrastive(penalty_alpha: f64, top_k: usize) -> GenerationConfig {
    GenerationConfig::new().strategy(Strategy::Contrastive { penalty_alpha, top_k }).max_new_tokens(14)
}

fn dola(layers: &[usize], do_sample: bool) -> GenerationConfig {
    let dola_layers = DolaLayers::Layers(layers.into());
    GenerationConfig::new().strategy(Strategy::Dola { dola_layers, do_sample }).max_new_tokens(14).repetition_penalty(1.2).seed(5)
}

fn guided(config: GenerationConfig, scale: f64) -> GenerationConfig {
    config.guidance_scale(scale).max_new_tokens(14).seed(5)
}

/// Tokens and the bits of the logits and scores of each row.
fn bits(output: &Output) -> Vec<(Vec<u32>, Vec<u32>)> {
    let bits = |steps: &Option<Vec<Vec<f32>>>| steps.iter().flatten().flatten().map(|score| score.to_bits()).collect::<Vec<_>>();
    output.sequences.iter().map(|row| (row.tokens.clone(), [bits(&row.logits), bits(&row.scores)].concat())).collect()
}

#[test]
fn a_row_does_not_depend_on_how_it_was_computed() {
    let negatives = || prompts().into_iter().rev();
    for (family, generator) in generators() {
        for (name, config) in [
            ("contrastive", contrastive(0.6, 4)),
            ("dola", dola(&[1, 0], false)),
            ("dola, drawn", dola(&[0, 1], true)),
            ("guided", guided(GenerationConfig::greedy(), 1.7)),
            ("guided away", guided(GenerationConfig::greedy(), 1.7).negative_prompts(negatives())),
            ("guided beams", guided(GenerationConfig::beam(3), 1.7).negative_prompts(negatives())),
            ("guided away, drawn", guided(GenerationConfig::sampling(), 1.7).negative_prompts(negatives())),
        ] {
            let what = format!("{family}, {name}");
            let config = config.output_logits(true).output_scores(true);
            let run = |config: &GenerationConfig| generator.generate_batch(prompts(), config).unwrap();
            let batch = run(&config);
            let whole = bits(&batch);
            assert!(whole.iter().all(|(tokens, bits)| !tokens.is_empty() && !bits.is_empty()), "{what}");
            assert!(bits(&run(&config.clone().prefill_chunk_size(3))) == whole, "{what}: chunked = whole");
            assert!(bits(&run(&config.clone().cache_implementation("static"))) == whole, "{what}: static = dynamic");
            if name != "contrastive" {
                assert!(bits(&run(&config.clone().use_cache(false))) == whole, "{what}: cached = uncached");
            }
            for (row, prompt) in prompts().into_iter().enumerate() {
                let mut config = config.clone();
                config.negative_prompts = config.negative_prompts.get(row).cloned().into_iter().collect();
                config.seed = batch.sequences[row].seed.or(config.seed);
                assert!(bits(&generator.generate(prompt, &config).unwrap())[0] == whole[row], "{what}: batched = alone");
            }
            let mut tokens = vec![Vec::new(); LENGTHS.len()];
            for piece in generator.stream_batch(prompts(), &config).unwrap() {
                let piece = piece.unwrap();
                tokens[piece.row].extend(piece.tokens);
            }
            assert!(tokens.iter().eq(whole.iter().map(|(tokens, _)| tokens)), "{what}: streamed = collected");
        }
    }
}

/// Contrastive search that keeps nothing from step to step.
fn twin(generator: &Generator, prompt: &[u32], alpha: f64, top_k: usize, steps: usize) -> Vec<u32> {
    let model = generator.model();
    let run = |tokens: &[u32]| {
        let mut cache = model.start(&[Start::default()]).unwrap().remove(0);
        let forward = model.forward(&mut [Feed { tokens, cache: cache.as_mut() }], Want::Hidden).unwrap();
        let hidden = forward.hidden.into_host().unwrap();
        let width = hidden.len() / tokens.len();
        (forward.logits.into_host().unwrap(), hidden.chunks(width).map(<[f32]>::to_vec).collect::<Vec<_>>())
    };
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let mut tokens = prompt.to_vec();
    for _ in 0..steps {
        let (logits, context) = run(&tokens);
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        let score = |id: u32| {
            let state = run(&[&tokens[..], &[id]].concat()).1.pop().unwrap();
            let nearest = context.iter().map(|past| cosine(past, &state)).fold(f64::NEG_INFINITY, f64::max);
            (1.0 - alpha) * f64::from(logits[id as usize]).exp() / total - alpha * nearest
        };
        let best = ids[..top_k].iter().map(|&id| (score(id), id)).max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        tokens.push(best.1);
        if generator.config().eos_token_id.as_ref().unwrap().as_slice().contains(&i64::from(best.1)) {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

#[test]
fn contrastive_search_is_its_uncached_twin() {
    for (family, generator) in generators() {
        for (alpha, top_k) in [(0.6, 4), (0.25, 9), (1.0, 2)] {
            let output = generator.generate_batch(prompts(), &contrastive(alpha, top_k)).unwrap();
            for (sequence, prompt) in output.sequences.iter().zip(prompts()) {
                assert_eq!(sequence.tokens, twin(&generator, &prompt, alpha, top_k, 14), "{family}, {alpha}, {top_k}");
            }
        }
    }
}

#[test]
fn without_a_penalty_or_a_choice_contrastive_search_is_greedy() {
    let generator = generator("llama");
    let greedy = generator.generate_batch(prompts(), &GenerationConfig::greedy().max_new_tokens(14)).unwrap();
    for config in [contrastive(0.0, 4), contrastive(0.6, 1), contrastive(1e-9, 4)] {
        let found = generator.generate_batch(prompts(), &config).unwrap();
        assert!(found.sequences.iter().zip(&greedy.sequences).all(|(one, other)| one.tokens == other.tokens), "{config:?}");
    }
}

#[test]
fn contrastive_search_chooses_no_forbidden_token() {
    let generator = generator("qwen2");
    let config = contrastive(0.9, 5).prefix_allowed_tokens_fn(|_, tokens| if tokens.len() % 2 == 0 { vec![17] } else { vec![30, 31] });
    for sequence in generator.generate_batch(prompts(), &config).unwrap().sequences {
        for (at, token) in (sequence.prompt_len..).zip(sequence.tokens) {
            assert!(if at % 2 == 0 { token == 17 } else { token == 30 || token == 31 }, "{token} at {at}");
        }
    }
}

#[test]
fn prompts_that_wait_get_the_same_states() {
    let folder = Path::new("tests/golden/gpt2");
    let (all, parts) = (generator("gpt2"), Generator::builder(folder).batch_tokens(30).load().unwrap());
    for config in [contrastive(0.6, 3), guided(GenerationConfig::greedy(), 2.0).negative_prompt([7, 8, 9])] {
        let config = config.output_logits(true);
        let run = |generator: &Generator| bits(&generator.generate_batch(prompts(), &config).unwrap());
        assert!(run(&all) == run(&parts));
    }
}

/// The second context continued by the row's own tokens is a row of its own.
#[test]
fn a_guidance_of_0_is_the_second_context_and_of_1_the_first() {
    for (family, generator) in generators() {
        let greedy = GenerationConfig::greedy().max_new_tokens(14);
        let negative = vec![9, 40, 22, 31, 8];
        let plain = |prompts: Vec<Vec<u32>>| generator.generate_batch(prompts, &greedy).unwrap().sequences;
        let (own, other) = (plain(prompts()), plain(vec![negative.clone()]).remove(0));
        let with = |scale| {
            let config = guided(greedy.clone(), scale).negative_prompt(negative.clone());
            generator.generate_batch(prompts(), &config).unwrap().sequences
        };
        assert!(with(0.0).iter().all(|sequence| sequence.tokens == other.tokens), "{family}");
        assert!(with(1.0).iter().zip(&own).all(|(one, own)| one.tokens == own.tokens), "{family}");
        let beams = GenerationConfig::beam(3).max_new_tokens(9).num_return_sequences(3);
        let (guided_beams, other) = (
            generator.generate(prompts().remove(1), &beams.clone().guidance_scale(0.0).negative_prompt(negative.clone())).unwrap(),
            generator.generate(negative.clone(), &beams).unwrap(),
        );
        for (one, other) in guided_beams.sequences.iter().zip(&other.sequences) {
            assert_eq!(one.tokens, other.tokens, "{family}, beams");
            assert!((one.score.unwrap() - other.score.unwrap()).abs() < 1e-5, "{family}, beams");
        }
        assert!(with(3.0).iter().zip(&own).any(|(one, own)| one.tokens != own.tokens), "{family}");
    }
}

#[test]
fn guided_forks_are_fresh_rows() {
    let generator = generator("llama");
    let config = guided(GenerationConfig::sampling(), 2.0).negative_prompt([5; 20]).output_logits(true);
    let forks = generator.generate_batch(prompts(), &config.clone().num_return_sequences(3)).unwrap();
    assert_eq!(forks.sequences.len(), 12);
    for (fork, bits_of_fork) in forks.sequences.iter().zip(bits(&forks)) {
        let fresh = generator.generate(prompts()[fork.prompt].clone(), &config.clone().seed(fork.seed.unwrap())).unwrap();
        assert!(bits(&fresh)[0] == bits_of_fork);
    }
}

#[test]
fn text_leads_away_as_its_ids_do() {
    let folder = Path::new("examples/models/storyteller");
    let generator = Generator::from_pretrained(folder).unwrap();
    let config = guided(GenerationConfig::greedy(), 2.0);
    let run = |negative: Prompt| generator.generate("Once upon a time", &config.clone().negative_prompt(negative)).unwrap();
    let text = run("There was a king".into());
    let ids = run(generator.encode("There was a king").unwrap().into());
    assert_eq!(text.text(), ids.text());
    assert_ne!(text.text(), generator.generate("Once upon a time", &config).unwrap().text());
    let own = generator.clone().with_config(config.clone().negative_prompt("There was a king"));
    assert_eq!(own.generate("Once upon a time", &GenerationConfig::greedy()).unwrap().text(), text.text());
}

#[test]
fn explained_and_reckoned() {
    let generator = generator("llama");
    let config = guided(GenerationConfig::greedy(), 2.0).repetition_penalty(1.2).sequence_bias(vec![(vec![5], 1.0)]);
    let explained = generator.explain(&config).unwrap();
    assert_eq!(explained.processors, ["guidance_scale", "sequence_bias", "repetition_penalty"]);
    let cache = |config: &GenerationConfig| generator.memory(config, 3, 40).unwrap().cache;
    let plain = cache(&GenerationConfig::greedy().max_new_tokens(14));
    let page = plain / 3 / 4;
    assert_eq!(cache(&guided(GenerationConfig::greedy(), 2.0)), plain + 3 * page, "a token and 14");
    assert_eq!(cache(&guided(GenerationConfig::greedy(), 2.0).negative_prompt([5; 40])), 2 * plain);
    assert_eq!(cache(&contrastive(0.6, 5)), plain + 3 * 4 * page, "a page for each other candidate");
}

#[track_caller]
fn refused(family: &str, config: &GenerationConfig, kind: &str, names: &[&str]) {
    let error = generator(family).generate_batch(prompts(), config).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(names.iter().all(|name| error.to_string().contains(name)), "{error}");
}

#[test]
fn what_cannot_be_is_named() {
    refused("llama", &contrastive(0.6, 4).use_cache(false), "config", &["use_cache"]);
    refused("llama", &contrastive(0.6, 100_000), "config", &["top_k", "112"]);
    refused("llama", &contrastive(f64::INFINITY, 4), "config", &["penalty_alpha"]);
    refused("llama", &contrastive(0.6, 4).num_return_sequences(2), "config", &["num_return_sequences"]);
    refused("llama", &guided(contrastive(0.6, 4), 2.0), "unsupported", &["guidance_scale", "contrastive"]);
    refused("llama", &guided(dola(&[0], false), 2.0), "unsupported", &["guidance_scale", "dola"]);
    refused("llama", &dola(&[], false), "config", &["dola_layers", "0 to 1"]);
    refused("llama", &dola(&[2, 9], false), "config", &["dola_layers", "[2,9]"]);
    let low = GenerationConfig::from_json(&serde_json::json!({"dola_layers": "low"})).unwrap();
    refused("gemma2", &low, "config", &["dola_layers", "low"]);
    let greedy = GenerationConfig::greedy;
    refused("llama", &guided(greedy(), f64::NAN), "config", &["guidance_scale"]);
    refused("llama", &greedy().negative_prompt([5]), "config", &["negative_prompts", "guidance_scale"]);
    refused("llama", &guided(greedy(), 2.0).negative_prompts([[5], [6]]), "config", &["negative_prompts", "2", "4"]);
    refused("llama", &guided(greedy(), 2.0).negative_prompt([5, 4000]), "prompt", &["4000", "vocabulary"]);
    refused("llama", &guided(greedy(), 2.0).negative_prompt("text"), "prompt", &["tokenizer"]);
    refused("gpt2", &guided(greedy(), 2.0).negative_prompt([5; 60]), "prompt", &["negative prompt", "60", "74", "64"]);
}

/// What golden/states.py wrote.
#[derive(Deserialize)]
struct States {
    input_ids: Vec<u32>,
    /// The first values of the states of every token after the final norm.
    hidden: Vec<Vec<f32>>,
    /// By layer, the best logits of the head for its state after the last token.
    layers: Vec<Vec<(usize, f32)>>,
}

#[test]
fn states_are_those_of_the_reference() {
    let text = std::fs::read_to_string(Path::new("tests/golden/states.json")).unwrap();
    let families: HashMap<String, States> = serde_json::from_str(&text).unwrap();
    for (family, generator) in generators() {
        let States { input_ids, hidden, layers } = &families[family];
        let model = generator.model();
        let run = |want| {
            let mut cache = model.start(&[Start::default()]).unwrap().remove(0);
            model.forward(&mut [Feed { tokens: input_ids, cache: cache.as_mut() }], want).unwrap()
        };
        let found = run(Want::Hidden).hidden.into_host().unwrap();
        for (found, expected) in found.chunks(found.len() / input_ids.len()).zip(hidden) {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{family}: {found:?} for {expected:?}");
        }
        let places: Vec<_> = (0..model.info().layers).collect();
        let found = run(Want::Layers(&places)).logits.into_host().unwrap();
        assert_eq!(layers.len(), places.len());
        for (found, expected) in found.chunks(model.info().vocab_size).zip(layers) {
            assert!(expected.iter().all(|&(id, logit)| (found[id] - logit).abs() < 1e-4), "{family}: {expected:?}");
        }
    }
}
