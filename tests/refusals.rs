//! Bad input: each is a clear error that names the field or the file, before anything is computed or allocated.

use candle_generate::{
    AttnImplementation, Cache, Error, Feed, Forward, GenerationConfig, Generator, Kernels, Model, ModelInfo, Prompt, Result, Start, Values,
    Want, candle_core::DType,
};
use proptest::prelude::*;
use std::{
    fs,
    path::{Path, PathBuf},
};

fn golden(family: &str) -> PathBuf {
    Path::new("tests/golden").join(family)
}

fn folder_of_the_storyteller() -> PathBuf {
    PathBuf::from("examples/models/storyteller")
}

fn generator(family: &str) -> Generator {
    Generator::from_pretrained(golden(family)).unwrap()
}

#[track_caller]
fn refused<T>(result: Result<T>, kind: &str, names: &[&str]) {
    let Err(error) = result else { panic!("{names:?} was accepted") };
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    for name in names {
        assert!(message.contains(name), "{message:?} does not name {name:?}");
    }
}

#[track_caller]
fn field(config: GenerationConfig, names: &[&str]) {
    refused(generator("llama").generate(vec![5, 6, 7], &config.max_new_tokens(2)), "config", names);
}

#[test]
fn prompts() {
    let generator = generator("llama");
    let config = GenerationConfig::greedy().max_new_tokens(2);
    refused(generator.generate(vec![5, 100_000], &config), "prompt", &["100000", "vocabulary"]);
    refused(generator.generate("text", &config), "prompt", &["tokenizer"]);
    let total = GenerationConfig::greedy().max_length(3);
    refused(generator.generate(vec![5, 6, 7], &total), "prompt", &["max_length", "3"]);
    refused(generator.generate_batch([vec![5, 6], vec![5, 6, 7]], &total), "prompt", &["prompt 1"]);
    let bare = Generator::new(Flat::new(8, 0.0), None);
    refused(bare.generate(Vec::<u32>::new(), &config), "prompt", &["empty", "bos_token_id"]);
    assert_eq!(bare.generate(Vec::<u32>::new(), &config.bos_token_id(3)).unwrap().sequences[0].prompt_len, 1);
    let none = bare.generate_batch(Vec::<Prompt>::new(), &GenerationConfig::greedy()).unwrap();
    assert!(none.sequences.is_empty());
}

#[test]
fn a_position_table_that_is_too_short() {
    let generator = generator("gpt2");
    let limit = generator.model().info().context.positions().unwrap();
    let config = GenerationConfig::greedy().max_new_tokens(limit);
    refused(generator.generate(vec![5, 6, 7], &config), "prompt", &[&limit.to_string(), &(limit - 3).to_string()]);
    let fits = GenerationConfig::greedy().max_new_tokens(limit - 3).min_new_tokens(limit - 3);
    assert_eq!(generator.generate(vec![5, 6, 7], &fits).unwrap().tokens().len(), limit - 3);
}

#[test]
fn fields_out_of_range() {
    field(GenerationConfig::sampling().temperature(0.0), &["temperature", "0"]);
    field(GenerationConfig::sampling().temperature(-1.0), &["temperature", "-1"]);
    field(GenerationConfig::sampling().top_p(1.5), &["top_p", "1.5"]);
    field(GenerationConfig::sampling().min_p(2.0), &["min_p"]);
    field(GenerationConfig::greedy().repetition_penalty(0.0), &["repetition_penalty"]);
    field(GenerationConfig::greedy().prefill_chunk_size(0), &["prefill_chunk_size"]);
    field(GenerationConfig::greedy().num_return_sequences(2), &["num_return_sequences"]);
    field(GenerationConfig::greedy().stop_strings(["x"]), &["stop_strings", "tokenizer"]);
    field(GenerationConfig::greedy().bad_words_ids(vec![vec![100_000]]), &["bad_words_ids", "100000"]);
    field(GenerationConfig::sampling().seeds(vec![1, 2]), &["seeds", "1"]);
    field(GenerationConfig::sampling().temperature(0.0).top_p(-1.0).typical_p(7.0), &["temperature", "top_p", "typical_p"]);
}

#[test]
fn modes_that_are_not_built() {
    let heads = GenerationConfig::from_json(&serde_json::json!({"use_mtp": true})).unwrap();
    refused(generator("llama").generate(vec![5, 6], &heads), "unsupported", &["assisted"]);
}

#[test]
fn a_billion_tokens_allocate_nothing() {
    let generator = generator("llama");
    let config = GenerationConfig::greedy().max_new_tokens(1_000_000_000);
    let mut stream = generator.stream(vec![5, 6, 7], &config).unwrap();
    assert_eq!(stream.next().unwrap().unwrap().tokens.len(), 1);
    let memory = generator.memory(&config, 2, 3).unwrap();
    assert!(memory.cache > 1_000_000_000 && memory.total() > memory.cache);
    let limited = Generator::builder(golden("llama")).memory_limit(memory.weights + 1_000_000).load().unwrap();
    refused(limited.generate(vec![5, 6, 7], &config), "memory", &["limit", &(memory.weights + 1_000_000).to_string()]);
    let rows = GenerationConfig::sampling().max_new_tokens(2).num_return_sequences(1_000_000_000_000usize);
    refused(generator.generate(vec![5, 6, 7], &rows), "config", &["num_return_sequences"]);
    let reserved = config.cache_implementation("static").max_new_tokens(1_000_000_000_000usize);
    refused(generator.generate(vec![5, 6, 7], &reserved), "config", &["max_cache_len", "memory"]);
    let fixed = GenerationConfig::greedy().max_new_tokens(8).cache_implementation("static");
    refused(generator.generate(vec![5, 6, 7], &fixed.max_cache_len(4)), "config", &["max_cache_len", "4"]);
}

#[test]
fn names_that_are_no_folders() {
    for name in ["nowhere", "a/b/c", "./owner/name", "owner/na me"] {
        refused(Generator::from_pretrained(name), "load", &["there is no such folder", "owner/name", name]);
    }
    #[cfg(not(feature = "hub"))]
    refused(Generator::from_pretrained("owner/name"), "unsupported", &["owner/name", "the feature `hub`"]);
    #[cfg(feature = "hub")]
    {
        let cache = tempfile::tempdir().unwrap();
        let builder = Generator::builder("owner/name@v1").cache_folder(cache.path());
        refused(builder.clone().offline(true).load(), "hub", &["owner/name", "revision v1", "is not in the cache"]);
        refused(builder.revision("v2").load(), "hub", &["\"v2\"", "\"v1\""]);
    }
}

#[test]
fn what_cannot_compute() {
    let builder = || Generator::builder("examples/models/storyteller");
    for threads in [0, 1025, usize::MAX] {
        refused(builder().threads(threads).load(), "config", &["threads", &threads.to_string(), "1 to 1024"]);
    }
    let flash = builder().kernels(Kernels::Candle).attn_implementation(AttnImplementation::Flash);
    refused(flash.load(), "unsupported", &["flash attention", "eager"]);
}

#[test]
fn damaged_checkpoints() {
    let source = golden("llama");
    let good: serde_json::Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    let build = |config: &[u8], weights: Option<&[u8]>| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), config).unwrap();
        if let Some(bytes) = weights {
            fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        }
        let result = Generator::from_pretrained(folder.path());
        (folder, result)
    };
    let with = |key: &str, value: serde_json::Value| {
        let mut config = good.clone();
        config[key] = value;
        serde_json::to_vec(&config).unwrap()
    };
    let plain = serde_json::to_vec(&good).unwrap();
    assert!(build(&plain, Some(&weights)).1.is_ok());
    refused(Generator::from_pretrained("no/such/folder"), "load", &["no/such/folder"]);
    refused(build(b"{", Some(&weights)).1, "load", &["config.json"]);
    refused(build(&plain, None).1, "load", &["model.safetensors"]);
    refused(build(&with("model_type", "unheard_of".into()), Some(&weights)).1, "load", &["unheard_of", "llama", "gpt2"]);
    refused(build(&with("hidden_size", 64_000.into()), Some(&weights)).1, "load", &["64000"]);
    refused(build(&with("num_hidden_layers", 99.into()), Some(&weights)).1, "load", &["layers"]);
    refused(build(&with("vocab_size", 1_000_000_000_000u64.into()), Some(&weights)).1, "load", &["vocab_size"]);
    refused(build(&with("num_attention_heads", 0.into()), Some(&weights)).1, "load", &["num_attention_heads"]);
    for cut in [0, 7, 8, 100, weights.len() / 2, weights.len() - 1] {
        refused(build(&plain, Some(&weights[..cut])).1, "load", &["model.safetensors"]);
    }
    let mut lying = weights.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(build(&plain, Some(&lying)).1, "load", &["model.safetensors"]);
    refused(Generator::builder(&source).dtype(DType::U8).load(), "config", &["dtype", "u8"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a file says, the answer is a model or an error: reaching the end is the test.
    #[test]
    fn no_damage_is_a_panic(
        name in prop::sample::select(vec!["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]),
        edits in prop::collection::vec((0usize..3000, any::<u8>()), 1..5),
        cut in prop::option::weighted(0.1, 0usize..3000),
        family in prop::sample::select(vec!["llama", "t5", "bart"]),
    ) {
        let source = if name.starts_with("token") { folder_of_the_storyteller() } else { golden(family) };
        let folder = tempfile::tempdir().unwrap();
        for file in fs::read_dir(source).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
            fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        let path = folder.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        let len = bytes.len();
        edits.iter().for_each(|&(at, byte)| bytes[at % len] = byte);
        bytes.truncate(cut.unwrap_or(len));
        fs::write(&path, bytes).unwrap();
        if let Ok(generator) = Generator::from_pretrained(folder.path()) {
            let _ = generator.generate(vec![5, 6, 7], &GenerationConfig::new().max_new_tokens(3));
            let _ = generator.generate("Once upon a time", &GenerationConfig::new().max_new_tokens(3));
        }
    }
}

/// A model whose logits are all the same value.
struct Flat {
    info: ModelInfo,
    logit: f32,
    step: usize,
    caches: usize,
    /// Peaks that it tells of its logits.
    peaks: usize,
}

impl Flat {
    fn new(vocab_size: usize, logit: f32) -> Self {
        Self { info: ModelInfo::new("flat", vocab_size), logit, step: 1, caches: usize::MAX, peaks: 0 }
    }
}

/// Counts positions `step` at a time: 1 is honest, 0 remembers nothing, 2 claims too much.
struct Count {
    len: usize,
    step: usize,
}

impl Model for Flat {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        let fresh = || Box::new(Count { len: 0, step: self.step }) as Box<dyn Cache>;
        Ok(rows.iter().take(self.caches).map(|_| fresh()).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], _: Want) -> Result<Forward> {
        for row in rows.iter_mut() {
            let cache = candle_generate::model::downcast::<Count>(row.cache)?;
            cache.len += cache.step * row.tokens.len();
        }
        let logits = Values::Host(vec![self.logit; rows.len() * self.info.vocab_size]);
        Ok(Forward { logits, peaks: vec![self.logit; self.peaks], ..Forward::default() })
    }
}

impl Cache for Count {
    fn len(&self) -> usize {
        self.len
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(Self { ..*self })
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.len = len;
        Ok(())
    }
}

#[test]
fn models_that_miscount() {
    let config = GenerationConfig::sampling().max_new_tokens(3).num_return_sequences(2).seed(1);
    let prompt = vec![1; 700];
    let honest = Generator::new(Flat::new(8, 0.0), None).generate(prompt.clone(), &config).unwrap();
    let forgetful = Generator::new(Flat { step: 0, ..Flat::new(8, 0.0) }, None).generate(prompt.clone(), &config).unwrap();
    assert_eq!(honest.sequences[1].tokens, forgetful.sequences[1].tokens);
    let boastful = Generator::new(Flat { step: 2, ..Flat::new(8, 0.0) }, None);
    refused(boastful.generate(prompt.clone(), &config), "unsupported", &["700 tokens", "cache"]);
    let short = Generator::new(Flat { caches: 0, ..Flat::new(8, 0.0) }, None);
    refused(short.generate(prompt.clone(), &config), "unsupported", &["0 caches", "1 were asked for"]);
    let alone = config.num_return_sequences(1);
    for (peaks, logit) in [(0, 0.0), (1, 0.0), (1, f32::NAN)] {
        let told = Generator::new(Flat { peaks, ..Flat::new(8, logit) }, None);
        match told.generate(prompt.clone(), &alone) {
            Ok(output) => assert_eq!(output.tokens(), honest.sequences[0].tokens),
            result => refused(result, "processor", &["model", "NaN"]),
        }
    }
    let lavish = Generator::new(Flat { peaks: 2, ..Flat::new(8, 0.0) }, None);
    refused(lavish.generate(prompt, &alone), "unsupported", &["2 peaks", "1 were expected"]);
    let mute = Generator::new(Flat::new(0, 0.0), None);
    refused(mute.generate(vec![0], &alone), "unsupported", &["vocab_size is 0"]);
    assert!(mute.score(vec![0], [vec![0]]).is_err());
}

#[test]
fn logits_that_are_not_numbers() {
    let broken = Generator::new(Flat::new(8, f32::NAN), None);
    let config = GenerationConfig::greedy().max_new_tokens(2);
    refused(broken.generate(vec![1], &config), "processor", &["model", "NaN"]);
    assert_eq!(broken.generate(vec![1], &config.remove_invalid_values(true)).unwrap().tokens(), [0, 0]);
}

#[test]
fn a_row_without_a_token_names_the_processor() {
    let flat = Generator::new(Flat::new(4, 1.0), None);
    let config = GenerationConfig::greedy().max_new_tokens(2).suppress_tokens(vec![0, 1, 2, 3]);
    refused(flat.generate(vec![1], &config), "processor", &["suppress_tokens"]);
    let nothing = GenerationConfig::greedy().max_new_tokens(2).prefix_allowed_tokens_fn(|_, _: &[u32]| Vec::new());
    refused(flat.generate(vec![1], &nothing), "processor", &["prefix_allowed_tokens_fn"]);
    assert!(matches!(flat.generate(vec![9], &nothing), Err(Error::Prompt(_))));
}
