//! Beginnings that are computed once: whatever is reused, results are those of a generator that knows nothing of them.
#![cfg(feature = "chat")]

use candle_generate::{
    Cache, CancelToken, Chat, Error, Feed, FinishReason, Forward, GenerationConfig, Generator, History, LogitsProcessor, Message, Messages,
    Model, ModelInfo, Output, Result, Sequence, Start, Strategy, Tokenizer, Values, Want, model::downcast,
};
use proptest::prelude::*;
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// One of each way to tell positions: a table that ends, rotations (in windows, stretched past 24 positions in two ways), biases.
const FAMILIES: [&str; 8] = ["llama", "gpt2", "phi3", "llama-dynamic", "mistral", "gemma2", "bloom", "mixtral"];

static GENERATORS: LazyLock<Vec<Generator>> = LazyLock::new(|| FAMILIES.map(|family| load(golden(family))).into());
static STORYTELLER: LazyLock<Generator> = LazyLock::new(|| load("examples/models/storyteller".into()));

fn golden(family: &str) -> PathBuf {
    Path::new("tests/golden").join(family)
}

fn load(folder: PathBuf) -> Generator {
    Generator::from_pretrained(folder).unwrap()
}

fn greedy(tokens: usize) -> GenerationConfig {
    GenerationConfig::greedy().max_new_tokens(tokens)
}

/// Ids that follow from the seed.
fn ids(len: usize, seed: u64) -> Vec<u32> {
    let id = |at: usize| 3 + ((seed ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % 80;
    (0..len).map(id).collect()
}

/// One of each way to choose tokens and to keep what was computed; most of them reuse.
fn modes(tokens: usize) -> Vec<GenerationConfig> {
    let sampling = || GenerationConfig::sampling().top_k(12).seed(7);
    let modes = vec![
        GenerationConfig::greedy().repetition_penalty(1.2),
        sampling().num_return_sequences(2),
        GenerationConfig::beam(3).num_return_sequences(2),
        GenerationConfig::new().strategy(Strategy::Contrastive { penalty_alpha: 0.6, top_k: 4 }),
        GenerationConfig::greedy().prompt_lookup_num_tokens(3),
        sampling().guidance_scale(1.5),
        GenerationConfig::greedy().cache_implementation("static"),
        GenerationConfig::greedy().use_cache(false),
        GenerationConfig::greedy().prefill_chunk_size(3),
    ];
    modes.into_iter().map(|mode| mode.max_new_tokens(tokens).output_logits(true)).collect()
}

/// Tokens, text, reason to end and bits of the logits of a row.
type Outcome = (Vec<u32>, String, FinishReason, Vec<Vec<u32>>);

fn outcome(output: &Output) -> Vec<Outcome> {
    let bits = |logits: &Vec<f32>| logits.iter().map(|logit| logit.to_bits()).collect();
    let row = |row: &Sequence| {
        let logits = row.logits.as_ref().expect("logits were asked for").iter().map(bits).collect();
        (row.tokens.clone(), row.text.clone(), row.finish, logits)
    };
    output.sequences.iter().map(row).collect()
}

#[track_caller]
fn same(left: &Output, right: &Output) {
    assert!(!left.sequences.is_empty());
    assert_eq!(left.usage.prompt_tokens, right.usage.prompt_tokens);
    let (left, right) = (outcome(left), outcome(right));
    let tokens = |rows: &[Outcome]| rows.iter().map(|row| row.0.clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&left), tokens(&right));
    assert!(left == right, "the same tokens, but other texts, reasons or bits");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn with_a_prefix_as_without(
        family in 0..FAMILIES.len(), held in 1usize..40, common in 0usize..40, rest in 0usize..16, mode in 0usize..9, seed in any::<u64>(),
    ) {
        let generator = &GENERATORS[family];
        let prefix = ids(held, seed);
        let begun = generator.prefix(&prefix).unwrap();
        let prompt = [&prefix[..common.min(held)], &ids(rest, !seed)].concat();
        let prompts = [if prompt.is_empty() { ids(1, seed) } else { prompt }, ids(2, !seed), prefix.clone()];
        let config = modes(6).remove(mode);
        let (with, without) = (begun.generate_batch(&prompts, &config).unwrap(), generator.generate_batch(&prompts, &config).unwrap());
        same(&with, &without);
        assert_eq!(without.usage.reused_tokens, 0);
        let scores = |generator: &Generator| generator.score_batch(prompts.iter().map(|prompt| (prompt, [ids(4, seed), ids(1, 3)]))).unwrap();
        assert_eq!(scores(&begun), scores(generator));
    }

    #[test]
    fn a_turn_is_what_a_fresh_generator_gives(
        ops in prop::collection::vec((0usize..9, any::<u64>()), 3..9), mode in 0usize..9, rewrites in any::<bool>(),
    ) {
        let config = modes(5).remove(mode);
        let mut chat = STORYTELLER.chat();
        if rewrites {
            // Of what the assistant said, only the last answer is told as it was.
            chat.conversation_mut().template = Some(
                "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content[:4] if message.role == 'assistant' \
                 and not loop.last and messages[loop.index + 1:] else message.content }}{% endfor %}<|assistant|>".into(),
            );
        }
        let mut forks: Vec<Chat> = Vec::new();
        for (op, random) in ops {
            let pick = |count: usize| random as usize % count;
            match op {
                0 => chat.rewind(pick(chat.messages().len() + 1)),
                1 => chat.system(["You are a storyteller.", "You are kind."][pick(2)]),
                2 => forks.push(chat.clone()),
                3 if !forks.is_empty() => chat = forks.remove(pick(forks.len())),
                4 if !chat.messages().is_empty() => {
                    let at = pick(chat.messages().len());
                    chat.conversation_mut().messages[at] = Message::new(["user", "assistant"][pick(2)], "A cat sat there.");
                }
                5 if chat.messages().iter().any(|message| message.role() == Some("user")) => {
                    let output = chat.regenerate(&config).unwrap();
                    let mut before = chat.conversation().clone();
                    before.messages.pop();
                    same(&output, &STORYTELLER.generate(before, &config).unwrap());
                }
                _ => {
                    let output = chat.send(["Hello!", "Tell me a story about a fox.", "And then? ", "Why?"][pick(4)], &config).unwrap();
                    let mut before = chat.conversation().clone();
                    assert_eq!(before.messages.pop().unwrap().content(), Some(output.text()));
                    same(&output, &STORYTELLER.generate(before, &config).unwrap());
                }
            }
        }
    }
}

/// The positions of a model's passes, counted.
struct Counted(Arc<dyn Model>, Arc<AtomicUsize>);

impl Model for Counted {
    fn info(&self) -> &ModelInfo {
        self.0.info()
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        self.0.start(rows)
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward> {
        self.1.fetch_add(rows.iter().map(|row| row.tokens.len()).sum(), Ordering::Relaxed);
        self.0.forward(rows, want)
    }
}

/// The storyteller, and how many positions it has computed since it was last asked.
fn counted() -> (Generator, impl Fn() -> usize) {
    let count = Arc::new(AtomicUsize::new(0));
    let model = Counted(STORYTELLER.model().clone(), count.clone());
    (Generator::new(model, STORYTELLER.tokenizer().cloned()), move || count.swap(0, Ordering::Relaxed))
}

/// A chat of the counted storyteller, which has no template of its own.
fn counted_chat(generator: &Generator) -> Chat {
    let mut chat = generator.chat();
    let file: serde_json::Value =
        serde_json::from_slice(&fs::read(Path::new("examples/models/storyteller/tokenizer_config.json")).unwrap()).unwrap();
    let conversation = chat.conversation_mut();
    conversation.template = Some(file["chat_template"].as_str().unwrap().into());
    for token in ["bos_token", "eos_token"] {
        conversation.variables.insert(token.into(), file[token].clone());
    }
    chat
}

#[test]
fn a_turn_computes_only_what_is_new() {
    let (generator, count) = counted();
    let mut chat = counted_chat(&generator);
    let config = greedy(20).eos_token_id([2]);
    let first = chat.send("Hello!", &config).unwrap();
    let answer = first.tokens().len();
    assert_eq!((first.sequences[0].finish, first.usage.reused_tokens), (FinishReason::Eos, 0));
    // The end is chosen, and never fed.
    assert_eq!(count(), first.usage.prompt_tokens + answer - 1);

    let second = chat.send("Tell me a story about a fox.", &config).unwrap();
    let new = second.usage.prompt_tokens - first.usage.prompt_tokens - answer;
    assert_eq!(second.usage.reused_tokens, first.usage.prompt_tokens + answer - 1, "all of the first turn but its end token");
    assert_eq!(count(), 1 + new + second.tokens().len() - 1);

    let again = chat.regenerate(&config).unwrap();
    assert_eq!((again.tokens(), again.usage.reused_tokens), (second.tokens(), second.usage.prompt_tokens - 1));
    assert_eq!(count(), 1 + again.tokens().len() - 1, "one token of the prompt, for its logits");

    let mut fork = chat.clone();
    let texts = [&mut chat, &mut fork].map(|chat| chat.send("Goodbye!", &config).unwrap());
    assert_eq!(texts[0].tokens(), texts[1].tokens());
    assert_eq!(texts[1].usage.reused_tokens, texts[0].usage.reused_tokens);

    // Beams part with their caches; what they began with is kept.
    chat.rewind(2);
    let config = GenerationConfig::beam(3).max_new_tokens(20).eos_token_id([2]);
    let beams = chat.send("Tell me a story about a fox.", &config).unwrap();
    count();
    let next = chat.send("Goodbye!", &config).unwrap();
    assert_eq!(next.usage.reused_tokens, beams.usage.prompt_tokens - 1);
}

#[test]
fn a_prefix_is_computed_once_for_all_rows_and_threads() {
    let (generator, count) = counted();
    let king = generator.prefix("There was once a king who had three sons").unwrap();
    let length = generator.encode("There was once a king who had three sons").unwrap().len();
    assert_eq!(count(), length);
    let prompts = ["There was once a king who had three sons, and", "There was once a king who had three sons."];
    let config = GenerationConfig::sampling().max_new_tokens(8).seed(3).output_logits(true);
    let batch = king.generate_batch(prompts, &config).unwrap();
    assert_eq!(batch.usage.reused_tokens, 2 * length);
    assert_eq!(count(), batch.usage.prompt_tokens - 2 * length + batch.usage.generated_tokens - 2);
    same(&batch, &STORYTELLER.clone().with_config(GenerationConfig::new()).generate_batch(prompts, &config).unwrap());
    count();

    let longer = king.prefix(prompts[0]).unwrap();
    assert_eq!(count(), 2, "a prefix goes on from a prefix");
    let scores = longer.score(prompts[0], [" the youngest", " the king"]).unwrap();
    assert_eq!(scores, STORYTELLER.score(prompts[0], [" the youngest", " the king"]).unwrap());
    assert!(count() < 8);

    let alone = STORYTELLER.generate(prompts[0], &config).unwrap();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| longer.generate(prompts[0], &config).unwrap())).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap().tokens(), alone.tokens());
        }
    });
    let healed = greedy(6).token_healing(true).output_logits(true);
    same(
        &king.generate("There was once a king who ha", &healed).unwrap(),
        &STORYTELLER.generate("There was once a king who ha", &healed).unwrap(),
    );
}

#[test]
fn crossings_are_computed_anew() {
    // Past 24 positions all keys of phi3 turn otherwise; those of llama-dynamic depend on the length that the row had.
    for (family, prefix, prompt, reused) in [
        ("phi3", 20, 24, 20),
        ("phi3", 20, 25, 0),
        ("phi3", 30, 24, 0),
        ("phi3", 30, 25, 24),
        ("llama-dynamic", 20, 24, 20),
        ("llama-dynamic", 20, 25, 0),
        ("llama-dynamic", 30, 24, 0),
        ("llama-dynamic", 30, 40, 0),
    ] {
        let generator = load(golden(family));
        let (prompt, config) = (ids(prompt, 5), greedy(12).output_logits(true));
        let with = generator.prefix(ids(prefix, 5)).unwrap().generate(&prompt, &config).unwrap();
        assert_eq!(with.usage.reused_tokens, reused, "{family}: {} after {prefix}", prompt.len());
        same(&with, &generator.generate(&prompt, &config).unwrap());
    }
}

#[test]
fn a_static_room_is_taken_and_left() {
    let llama = &GENERATORS[0];
    let begun = llama.prefix(ids(20, 1)).unwrap();
    let prompt = ids(30, 1);
    let fixed = |positions: usize| greedy(4).cache_implementation("static").max_cache_len(positions).output_logits(true);
    let output = begun.generate(&prompt, &fixed(40)).unwrap();
    assert_eq!(output.usage.reused_tokens, 20);
    same(&output, &llama.generate(&prompt, &fixed(40)).unwrap());
    assert_eq!(begun.generate(&prompt, &fixed(10)).unwrap_err().to_string(), llama.generate(&prompt, &fixed(10)).unwrap_err().to_string());

    let mut chat = STORYTELLER.chat();
    let fixed = GenerationConfig::greedy().cache_implementation("static");
    chat.send("Hello!", &fixed).unwrap();
    let output = chat.send("Tell me a story about a fox.", &greedy(200)).unwrap();
    assert!(output.usage.reused_tokens > 10, "what was reserved for the first turn does not bound the second");
    assert_eq!(output.text(), STORYTELLER.generate(chat.messages()[..3].to_vec(), &greedy(200)).unwrap().text());
}

#[test]
fn what_is_shared_counts_once_against_the_memory_limit() {
    let page = 16 * STORYTELLER.model().info().position_bytes;
    let weights = STORYTELLER.model().info().weight_bytes;
    let limited = |pages: u64| {
        let folder = Path::new("examples/models/storyteller");
        Generator::builder(folder).memory_limit(weights + pages * page).load().unwrap()
    };
    let (prefix, prompt) = (ids(64, 1), ids(65, 1));
    // Four pages are shared; the row takes two more for 65 + 31 positions.
    let begun = limited(6).prefix(&prefix).unwrap();
    assert_eq!(begun.generate(&prompt, &greedy(31)).unwrap().usage.reused_tokens, 64);
    let needed = |error: Error| match error {
        Error::Memory { needed, .. } => (needed - weights) / page,
        error => panic!("{error}"),
    };
    assert_eq!(needed(begun.generate(&prompt, &greedy(32)).unwrap_err()), 7);
    assert_eq!(needed(begun.generate(ids(33, 9), &greedy(15)).unwrap_err()), 7, "nothing is shared");
    let contrastive = GenerationConfig::new().strategy(Strategy::Contrastive { penalty_alpha: 0.6, top_k: 2 });
    assert_eq!(needed(begun.generate(&prompt, &contrastive.max_new_tokens(3)).unwrap_err()), 4 + 5 + 1, "all is computed anew");
    assert_eq!(needed(begun.score(ids(33, 9), [ids(2, 1)]).unwrap_err()), 4 + 3 + 1, "and a page for the continuation");
    assert!(begun.score(&prompt, [ids(2, 1)]).is_ok());
    assert_eq!(needed(limited(4).prefix(&prefix).unwrap_err()), 5);
}

#[test]
fn answers_that_are_cut_off_are_kept() {
    let ask = "Tell me a story about a fox.";
    let whole = STORYTELLER.chat().send(ask, &greedy(40)).unwrap();

    let mut dropped = STORYTELLER.chat();
    let shown: String = dropped.stream(ask, &greedy(40)).unwrap().take(5).map(|piece| piece.unwrap().text).collect();
    let said = dropped.messages()[1].content().unwrap().to_owned();
    assert!(!shown.is_empty() && said.starts_with(&shown) && whole.text().starts_with(&said) && said.len() < whole.text().len());

    let mut cancelled = STORYTELLER.chat();
    let token = CancelToken::new();
    let config = greedy(40).cancel(token.clone());
    let mut reply = cancelled.stream(ask, &config).unwrap();
    for (step, piece) in reply.by_ref().enumerate() {
        piece.unwrap();
        if step == 4 {
            token.cancel();
        }
    }
    let output = reply.into_output().unwrap();
    assert_eq!((output.sequences[0].finish, output.tokens()), (FinishReason::Cancelled, &whole.tokens()[..5]));
    assert_eq!(cancelled.messages()[1].content(), Some(output.text()));

    let mut stopped = STORYTELLER.chat();
    let output = stopped.send(ask, &greedy(40).stop_strings(["fox"])).unwrap();
    assert_eq!(output.sequences[0].finish, FinishReason::StopString);
    assert_eq!((stopped.messages()[1].content(), output.text().contains("fox")), (Some(output.text()), false));

    for mut chat in [dropped, cancelled, stopped] {
        let config = greedy(8).output_logits(true);
        let output = chat.send("Why?", &config).unwrap();
        same(&output, &STORYTELLER.generate(&chat.messages()[..3], &config).unwrap());
        assert!(output.usage.reused_tokens > 15);
    }
}

#[test]
fn a_turn_that_comes_to_nothing_leaves_the_conversation() {
    let mut chat = STORYTELLER.chat();
    chat.send("Hello!", &greedy(20)).unwrap();
    let before = chat.messages().to_vec();
    let refused = |chat: &mut Chat, config: &GenerationConfig, kind: &str| {
        assert_eq!(chat.send("Why?", config).unwrap_err().kind(), kind);
        assert_eq!(chat.regenerate(config).unwrap_err().kind(), kind);
        assert_eq!(chat.messages(), before);
    };
    refused(&mut chat, &greedy(5).temperature(-1.0).do_sample(true), "config");
    let failing = greedy(5).logits_processor(Fails);
    refused(&mut chat, &failing, "processor");
    let mut reply = chat.stream("Why?", &failing).unwrap();
    assert!(reply.by_ref().any(|piece| piece.is_err()));
    assert!(reply.next().is_none());
    drop(reply);
    assert_eq!(chat.messages(), before);

    let cancelled = CancelToken::new();
    cancelled.cancel();
    let output = chat.send("Why?", &greedy(5).cancel(cancelled.clone())).unwrap();
    assert!(output.tokens().is_empty() && output.sequences[0].finish == FinishReason::Cancelled);
    assert!(chat.regenerate(&greedy(5).cancel(cancelled)).unwrap().tokens().is_empty());
    assert_eq!(chat.messages(), before);
    drop(chat.stream("Why?", &greedy(5)).unwrap());
    assert_eq!(chat.messages(), before);
    assert!(chat.send("Tell me a story about a fox.", &greedy(5)).unwrap().usage.reused_tokens > 10, "nothing was forgotten either");

    let mut empty = STORYTELLER.chat();
    assert_eq!(empty.regenerate(&greedy(5)).unwrap_err().kind(), "prompt");
    empty.push(Message::assistant("Once upon a time"));
    assert_eq!(empty.regenerate(&greedy(5)).unwrap_err().kind(), "prompt");
    assert_eq!(empty.messages().len(), 1);
    assert_eq!(load(golden("llama")).chat().send("Hello!", &greedy(5)).unwrap_err().kind(), "template");
}

/// Fails with the third token.
#[derive(Debug)]
struct Fails;

impl LogitsProcessor for Fails {
    fn name(&self) -> &str {
        "fails"
    }

    fn process(&self, history: &History<'_>, scores: &mut [f32]) -> Result<()> {
        if history.generated().len() == 2 {
            scores.fill(f32::NEG_INFINITY);
        }
        Ok(())
    }
}

#[test]
fn a_file_gives_the_conversation_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("chat.json");
    let mut chat = STORYTELLER.chat();
    chat.system("You are a storyteller.");
    chat.push("Grüße! \u{1F98A} \"\n");
    chat.push(Message::new("assistant", json!(null)).with("tool_calls", json!([{"function": {"name": "f", "arguments": {"x": 1.5}}}])));
    let conversation = chat.conversation_mut();
    conversation.tools = Some(vec![json!({"type": "function"})]);
    conversation.variables.insert("enable_thinking".into(), json!(false));
    chat.save(&path).unwrap();
    let mut other = STORYTELLER.chat();
    other.load(&path).unwrap();
    assert_eq!(other.conversation(), chat.conversation());
    let file: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(file.as_object().unwrap().keys().collect::<Vec<_>>(), ["messages", "tools", "chat_template_kwargs"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");

    fs::write(&path, r#"[{"role": "user", "content": "Hello!"}]"#).unwrap();
    other.load(&path).unwrap();
    assert_eq!(other.conversation(), &Messages::new([Message::user("Hello!")]));
    assert!(other.regenerate(&greedy(20)).unwrap().text().starts_with("Good day!"));

    let before = other.conversation().clone();
    for (text, named) in [
        ("", "EOF"),
        ("5", "neither an object"),
        ("{}", "messages"),
        (r#"{"messages": 5}"#, "sequence"),
        (r#"{"messages": [], "colour": 1}"#, "colour"),
        (r#"{"messages": [], "tools": 1}"#, "invalid type"),
        (r#"[{"role": "user"}, {"content": "x"}]"#, "message 1"),
        (r#"[{"role": 5}]"#, "message 0"),
        (r#"["Hello!"]"#, "invalid type"),
        (r#"[{"role": "user""#, "EOF"),
        (&"[".repeat(100_000), "recursion"),
    ] {
        fs::write(&path, text).unwrap();
        let error = other.load(&path).unwrap_err();
        assert!(error.kind() == "load" && error.to_string().contains("chat.json") && error.to_string().contains(named), "{error}");
    }
    fs::write(&path, [b'"', 0xff, b'"']).unwrap();
    assert_eq!(other.load(&path).unwrap_err().kind(), "load");
    assert_eq!(other.load(folder.path()).unwrap_err().kind(), "load");
    assert_eq!(other.load(folder.path().join("none.json")).unwrap_err().kind(), "load");
    #[cfg(unix)]
    assert!(other.load("/dev/zero").unwrap_err().to_string().contains("longer"));
    assert_eq!(other.conversation(), &before);
    let nowhere = other.save(folder.path().join("none/chat.json")).unwrap_err();
    assert!(nowhere.kind() == "save" && nowhere.to_string().contains("none/chat.json"), "{nowhere}");
    assert_eq!(other.save(folder.path()).unwrap_err().kind(), "save");
}

/// A model whose logits follow from the ids it was fed.
struct Toy {
    info: ModelInfo,
    forgets: bool,
    fed: Arc<AtomicUsize>,
}

#[derive(Clone)]
struct Ids {
    source: Vec<u32>,
    ids: Vec<u32>,
    forgets: bool,
}

impl Toy {
    fn new(vocab_size: usize, forgets: bool) -> (Self, Arc<AtomicUsize>) {
        let fed = Arc::new(AtomicUsize::new(0));
        (Self { info: ModelInfo::new("toy", vocab_size), forgets, fed: fed.clone() }, fed)
    }
}

impl Model for Toy {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        let cache =
            |start: &Start<'_>| Box::new(Ids { source: start.source.to_vec(), ids: Vec::new(), forgets: self.forgets }) as Box<dyn Cache>;
        Ok(rows.iter().map(cache).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward> {
        let mut logits = Vec::new();
        for row in rows {
            self.fed.fetch_add(row.tokens.len(), Ordering::Relaxed);
            let cache: &mut Ids = downcast(row.cache)?;
            cache.ids.extend(row.tokens);
            if want != Want::Nothing {
                let read = cache.source.iter().chain(&cache.ids);
                let state = read.fold(7u64, |state, &id| (state ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                logits.extend((0..self.info.vocab_size as u64).map(|id| ((state ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32));
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
        Box::new(self.clone())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if !self.forgets {
            return Err(Error::Unsupported("this cache cannot forget".into()));
        }
        self.ids.truncate(len);
        Ok(())
    }
}

#[test]
fn a_cache_that_cannot_forget_goes_on_from_its_end_or_anew() {
    for forgets in [true, false] {
        let (toy, fed) = Toy::new(50, forgets);
        let generator = Generator::new(toy, None);
        let begun = generator.prefix([1, 2, 3, 4]).unwrap();
        for (prompt, common) in [(vec![1, 2, 3, 4, 5], 4), (vec![1, 2, 9, 9], 2), (vec![1, 2, 3, 4], 3)] {
            let reused = if forgets || common == 4 { common } else { 0 };
            let config = greedy(5).output_logits(true);
            let without = generator.generate(&prompt, &config).unwrap();
            fed.store(0, Ordering::Relaxed);
            let with = begun.generate(&prompt, &config).unwrap();
            assert_eq!((with.usage.reused_tokens, fed.load(Ordering::Relaxed)), (reused, prompt.len() - reused + 4));
            same(&with, &without);
        }
    }
}

#[test]
fn an_encoder_reads_every_prompt_whole() {
    let tokenizer = Tokenizer::from_folder(Path::new("examples/models/storyteller")).unwrap();
    let (mut toy, _) = Toy::new(2048, true);
    toy.info.is_encoder_decoder = true;
    let generator = Generator::new(toy, tokenizer).with_config(GenerationConfig::new().decoder_start_token_id(2));
    let error = generator.prefix([1, 2]).unwrap_err();
    assert!(error.kind() == "unsupported" && error.to_string().contains("encoder-decoder"), "{error}");
    let (mut chat, config) = (counted_chat(&generator), greedy(4).output_logits(true));
    for text in ["Hello!", "Why?"] {
        let output = chat.send(text, &config).unwrap();
        assert_eq!(output.usage.reused_tokens, 0);
        let mut before = chat.conversation().clone();
        before.messages.pop();
        same(&output, &generator.generate(before, &config).unwrap());
    }
}

#[test]
fn a_session_moves_between_threads() {
    fn moves<T: Send>(value: T) -> T {
        value
    }
    fn shared<T: Send + Sync>(_: &T) {}
    let begun = STORYTELLER.prefix("Once upon a time").unwrap();
    shared(&begun);
    let mut chat = moves(begun.chat());
    let text = thread::spawn(move || chat.send("Hello!", &greedy(20)).map(|output| output.text().to_owned())).join().unwrap().unwrap();
    assert!(text.starts_with("Good day!"));
}
