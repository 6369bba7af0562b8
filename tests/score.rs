//! Scores of given tokens: what transformers computes, and the laws that hold for them.

use candle_generate::{
    Cache, Context, Error, Feed, Forward, GenerationConfig, Generator, Kernels, Message, Model, ModelInfo, OnProgress, Prompt, Result,
    Score, Start, Values, Want,
};
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

const FAMILIES: [&str; 4] = ["gpt2", "llama", "qwen2", "gemma2"];

fn folder(family: &str) -> PathBuf {
    Path::new("tests/golden").join(family)
}

fn storyteller() -> Generator {
    Generator::from_pretrained(Path::new("examples/models/storyteller")).unwrap()
}

/// Ids below 100 without a pattern.
fn ids(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * i * 7 + 3 * i + 5) % 100).collect()
}

fn near(ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.iter().zip(theirs).all(|(a, b)| (a - b).abs() < 1e-4), "{ours:?}, the reference: {theirs:?}");
}

fn bits(score: &Score) -> Vec<u32> {
    score.log_probs.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn scores_are_those_of_the_reference() {
    // log_softmax of the forward pass of transformers 5.23.0 over prompt and continuation.
    let prompt = [5u32, 17, 42, 8];
    let continuations = [vec![9u32], vec![60, 61, 7, 30, 11], vec![3, 3, 3]];
    let reference: [[&[f32]; 3]; 4] = [
        [&[-5.511405], &[-7.862207, -6.947899, -9.194131, -6.161833, -7.03915], &[-9.266025, -8.13642, -3.088238]],
        [&[-8.5718], &[-5.766742, -6.560345, -6.119247, -11.318167, -6.035061], &[-6.557408, -5.170229, -4.827996]],
        [&[-13.079514], &[-4.278368, -7.048551, -5.653553, -9.815651, -14.680307], &[-11.571761, -2.980929, -1.58293]],
        [&[-1.378585], &[-8.381141, -8.416988, -9.229079, -7.953035, -11.046225], &[-7.730719, -2.927268, -4.823297]],
    ];
    for (family, reference) in FAMILIES.into_iter().zip(reference) {
        for kernels in [Kernels::Auto, Kernels::Candle] {
            let generator = Generator::builder(folder(family)).kernels(kernels).load().unwrap();
            let scores = generator.score(prompt, continuations.clone()).unwrap();
            for ((score, continuation), reference) in scores.iter().zip(&continuations).zip(reference) {
                assert_eq!(&score.tokens, continuation);
                near(&score.log_probs, reference);
                assert!((score.total() - reference.iter().copied().map(f64::from).sum::<f64>()).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn texts_score_as_in_the_reference() {
    let generator = storyteller();
    let perplexity = generator.perplexity("Once upon a time there lived a king.").unwrap();
    assert!((perplexity - 2.885_034).abs() < 1e-4, "{perplexity}");
    let score = generator.score("Once upon a time", [" there lived a king"]).unwrap().remove(0);
    assert_eq!(score.tokens, [450, 1222, 264, 689]);
    near(&score.log_probs, &[-0.252949, -0.72444, -0.341269, -1.854263]);
    assert!((score.perplexity() - (-score.mean()).exp()).abs() < 1e-12 && (score.mean() - score.total() / 4.0).abs() < 1e-12);
}

#[test]
fn a_text_beyond_the_context_is_read_in_windows() {
    // The strided perplexity of transformers' guide over gpt2's 64 positions, with a stride of 32.
    let generator = Generator::from_pretrained(folder("gpt2")).unwrap();
    let score = generator.score_texts([ids(200)]).unwrap().remove(0);
    assert_eq!(score.tokens, ids(200)[1..]);
    assert!((score.total() + 1_585.880_03).abs() < 5e-3, "{}", score.total());
    for len in [2, 63, 64, 65, 66, 96, 97] {
        assert_eq!(generator.score_texts([ids(len)]).unwrap()[0].tokens, ids(len)[1..], "{len}");
    }
}

#[test]
fn a_continuation_is_encoded_where_it_stands() {
    let generator = storyteller();
    let tokens = |prompt: &str, continuation: &str| generator.score(prompt, [continuation]).unwrap().remove(0).tokens;
    let own = |text: &str| generator.tokenizer().unwrap().encode(text, false).unwrap();
    assert_eq!(tokens("Once upon", " a time"), own(" a time"));
    // Together with "tim" the "e" would be one token: the prompt's ids stay, and what follows has its own.
    assert_eq!(tokens("Once upon a tim", "e"), own("e"));
    let chat = [Message::user("Hello!")];
    if cfg!(feature = "chat") {
        assert_eq!(generator.score(chat.clone(), ["Good day!"]).unwrap()[0].tokens, own("Good day!"));
    }
}

#[test]
fn a_greedy_row_scores_what_was_recorded() {
    let config = GenerationConfig::greedy().max_new_tokens(20).log_probs(0);
    for family in FAMILIES {
        let generator = Generator::from_pretrained(folder(family)).unwrap();
        let prompts = [ids(1), ids(7), ids(33)];
        for sequence in generator.generate_batch(&prompts, &config).unwrap().sequences {
            let score = generator.score(&prompts[sequence.prompt], [sequence.tokens]).unwrap().remove(0);
            let recorded: Vec<u32> = sequence.log_probs.unwrap().iter().map(|token| token.log_prob.to_bits()).collect();
            assert_eq!(bits(&score), recorded, "{family}");
        }
    }
}

#[test]
fn batches_parts_and_chunks_give_the_same_bits() {
    let generator = storyteller();
    let text = ids(700);
    let whole = generator.score(&text[..20], [&text[20..]]).unwrap().remove(0);
    let first = generator.score(&text[..20], [&text[20..331]]).unwrap().remove(0);
    let second = generator.score(&text[..331], [&text[331..]]).unwrap().remove(0);
    assert_eq!(bits(&whole), [bits(&first), bits(&second)].concat(), "parts = whole");

    let tasks = [(ids(1), vec![ids(3), ids(9)]), (ids(600), vec![]), (ids(40), vec![ids(30); 40]), (ids(5), vec![ids(650)])];
    let batch = generator.score_batch(tasks.clone()).unwrap();
    for ((prompt, continuations), scores) in tasks.iter().zip(&batch) {
        assert_eq!(scores.len(), continuations.len());
        for (continuation, score) in continuations.iter().zip(scores) {
            assert_eq!(bits(score), bits(&generator.score(prompt, [continuation]).unwrap()[0]), "batch = alone");
        }
    }
    let small = Generator::builder(Path::new("examples/models/storyteller"))
        .batch_tokens(1)
        .memory_limit(generator.model().info().weight_bytes + 704 * generator.model().info().position_bytes);
    assert_eq!(small.load().unwrap().score_batch(tasks).unwrap(), batch, "within limits = without");
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let generator = Generator::from_pretrained(folder("gpt2")).unwrap();
    let refused = |result: Result<Vec<Score>>, words: &[&str]| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), "prompt", "{error}");
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
    };
    refused(generator.score([1, 2], [vec![3], vec![]]), &["continuation 1", "prompt 0", "empty"]);
    refused(generator.score([1, 101], [[3]]), &["prompt 0", "101"]);
    refused(generator.score([1, 2], [[3, 4_000_000_000]]), &["continuation", "4000000000", "101"]);
    refused(generator.score(ids(60), [ids(6)]), &["60 tokens", "6", "64 positions"]);
    assert_eq!(generator.score(ids(60), [ids(5)]).unwrap()[0].log_probs.len(), 5);
    refused(generator.score("text", [[1]]), &["tokenizer"]);
    refused(generator.score([1], ["text"]), &["tokenizer"]);
    refused(generator.score([1], [vec![Message::user("text")]]), &["messages"]);
    refused(generator.score_texts([vec![1, 2], vec![1]]), &["text 1", "at least 2"]);
    assert_eq!(generator.score(Vec::<u32>::new(), [[3]]).unwrap(), generator.score([100], [[3]]).unwrap(), "bos stands for nothing");
    let bare = generator.clone().with_config(GenerationConfig::new());
    refused(bare.score(Vec::<u32>::new(), [[3]]), &["prompt 0", "empty", "bos_token_id"]);
    let tight = Generator::builder(folder("gpt2")).memory_limit(generator.model().info().weight_bytes + 1_000).load().unwrap();
    assert!(matches!(tight.score(ids(9), [ids(9)]), Err(Error::Memory { .. })));
    assert!(generator.score_texts(Vec::<Prompt>::new()).unwrap().is_empty());
}

#[test]
fn long_work_reports_and_can_be_cancelled() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = seen.clone();
    let progress = OnProgress::new(move |progress| {
        record.lock().unwrap().push((progress.done, progress.total));
        if progress.done > 800 && progress.total < 2_000 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let folder = Path::new("examples/models/storyteller");
    let generator = Generator::builder(folder).progress(progress).load().unwrap();
    seen.lock().unwrap().clear();
    assert!(matches!(generator.score(ids(500), [ids(400), ids(400)]), Err(Error::Cancelled)));
    assert_eq!(*seen.lock().unwrap(), [(499, 1_299), (1_011, 1_299)]);
}

/// A model whose every logit is the same, and which tells how many it was asked for at once.
struct Flat {
    info: ModelInfo,
    logit: f32,
    keeps: usize,
    most: Arc<Mutex<usize>>,
    sources: Arc<Mutex<Vec<Vec<u32>>>>,
}

struct Count(usize, usize);

impl Model for Flat {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        self.sources.lock().unwrap().extend(rows.iter().map(|row| row.source.to_vec()));
        Ok(rows.iter().map(|_| Box::new(Count(0, self.keeps)) as Box<dyn Cache>).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward> {
        for row in rows.iter_mut() {
            let count = candle_generate::model::downcast::<Count>(row.cache)?;
            count.0 += count.1 * row.tokens.len();
        }
        let Want::Each(counts) = want else { return Ok(Forward::default()) };
        let values = counts.iter().sum::<usize>() * self.info.vocab_size;
        let mut most = self.most.lock().unwrap();
        *most = values.max(*most);
        Ok(Values::Host(vec![self.logit; values]).into())
    }
}

impl Cache for Count {
    fn len(&self) -> usize {
        self.0
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(Self(self.0, self.1))
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.0 = len;
        Ok(())
    }
}

fn flat(vocab_size: usize, logit: f32, keeps: usize) -> (Generator, Arc<Mutex<usize>>) {
    let most = Arc::new(Mutex::new(0));
    let info = ModelInfo::new("flat", vocab_size);
    (Generator::new(Flat { info, logit, keeps, most: most.clone(), sources: Arc::default() }, None), most)
}

#[test]
fn the_logits_of_a_long_text_never_exist_at_once() {
    let (generator, most) = flat(1 << 20, 0.0, 1);
    let score = generator.score([1], [vec![7; 20]]).unwrap().remove(0);
    near(&score.log_probs, &[-(20.0 * std::f32::consts::LN_2); 20]);
    assert_eq!(*most.lock().unwrap(), 1 << 24);
}

#[test]
fn models_that_forget_miscount_or_break() {
    let score = |keeps, logit| flat(8, logit, keeps).0.score(vec![1; 700], [vec![2; 600], vec![3]]);
    assert_eq!(score(1, 0.0).unwrap(), score(0, 0.0).unwrap());
    assert!((score(1, 0.0).unwrap()[0].perplexity() - 8.0).abs() < 1e-6);
    assert_eq!(score(2, 0.0).unwrap_err().kind(), "unsupported");
    assert_eq!(score(1, f32::NAN).unwrap_err().kind(), "processor");
}

#[test]
fn an_encoder_reads_the_prompt_and_the_decoder_the_continuation() {
    let sources = Arc::new(Mutex::new(Vec::new()));
    let mut info = ModelInfo::new("flat", 8);
    info.is_encoder_decoder = true;
    info.context = Context::Hard(4);
    let model = Flat { info, logit: 0.0, keeps: 1, most: Arc::default(), sources: sources.clone() };
    let generator = Generator::new(model, None).with_config(GenerationConfig::new().decoder_start_token_id(2));
    let scores = generator.score([3, 4, 5, 6, 7], [vec![1, 2, 3, 4], vec![1]]).unwrap();
    assert_eq!((scores[0].log_probs.len(), scores[1].log_probs.len()), (4, 1), "the source takes none of the decoder's positions");
    assert_eq!(*sources.lock().unwrap(), [[3, 4, 5, 6, 7]]);
    assert_eq!(generator.score([3, 9], [[1]]).unwrap_err().kind(), "prompt");
    assert_eq!(generator.score([3], [[1; 5]]).unwrap_err().kind(), "prompt");
    assert_eq!(generator.perplexity([3, 4]).unwrap_err().kind(), "unsupported");
}

#[test]
fn beams_without_processors_score_what_they_say() {
    for (family, length_penalty) in FAMILIES.into_iter().zip([0.0f64, 1.0, -1.0, 2.0]) {
        let generator = Generator::from_pretrained(folder(family)).unwrap();
        let config = GenerationConfig::beam(3).num_return_sequences(3).length_penalty(length_penalty).max_new_tokens(9);
        let prompts = [ids(3), ids(12)];
        for sequence in generator.generate_batch(&prompts, &config).unwrap().sequences {
            let score = generator.score(&prompts[sequence.prompt], [&sequence.tokens]).unwrap().remove(0);
            let expected = score.total() / (sequence.tokens.len() as f64).powf(length_penalty);
            assert!((expected - f64::from(sequence.score.unwrap())).abs() < 1e-4, "{family}: {expected}, {:?}", sequence.score);
        }
    }
}
