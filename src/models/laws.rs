//! What holds for every decoder over every implementation of the operations.
#![allow(clippy::unwrap_used)]

use super::{decoder::Decoder, families, fields::Fields, tiny, weights::Weights};
use crate::{
    device::tested,
    error::Error,
    kernels::{AttnImplementation, Ops, candle::CandleOps, cpu::CpuOps},
    model::{Cache, Context, Feed, Model, ModelInfo, Room, Start, Values, Want},
};
use candle_core::{DType, Device};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::path::Path;

const IDS: [u32; 11] = [5, 60, 0, 17, 17, 33, 2, 48, 9, 21, 40];

/// A model to be tested and how far two of its computations of one logit may lie apart.
struct Case {
    name: String,
    model: Box<dyn Model>,
    tolerance: f32,
    /// Whether it computes in half precision, which may round away what makes little difference.
    is_half: bool,
}

/// Every family over all operations.
fn cases() -> impl Iterator<Item = Case> {
    tiny::FAMILIES.into_iter().flat_map(|family| all(family, json!({})))
}

/// A family with some fields changed, over all operations: candle's, and fused ones in f32 and in bf16.
fn all(family: &str, changes: Value) -> [Case; 3] {
    let mut config = tiny::config(family);
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let folder = tiny::write(&config, Dtype::F32);
    let case = |model, tolerance, dtype| Case { name: family.to_owned(), model, tolerance, is_half: dtype != DType::F32 };
    let fused = |dtype| case(open(CpuOps::new(dtype, None, None, AttnImplementation::Flash), folder.path()), 0.0, dtype);
    let (plain, tolerance) = plain();
    [case(open(plain, folder.path()), tolerance, tested().1), fused(DType::F32), fused(DType::BF16)]
}

/// Candle's operations, and how far two of their computations of one logit may lie apart.
fn plain() -> (CandleOps, f32) {
    let (device, dtype) = tested();
    let tolerance = match (dtype, &device) {
        (DType::BF16, _) => 0.1,
        (DType::F16, _) => 0.01,
        (_, Device::Cpu) => 2e-5,
        _ => 1e-4,
    };
    (CandleOps::new(device, dtype), tolerance)
}

/// A model whose rows turn otherwise, all their tokens, past 8 positions.
fn crossing() -> [Case; 3] {
    all("phi3", json!({"original_max_position_embeddings": 8}))
}

/// A model whose rows turn more slowly the longer they are, past 8 positions.
fn dynamic() -> [Case; 3] {
    all("llama", json!({"max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 4.0}}))
}

fn open<O: Ops>(ops: O, folder: &Path) -> Box<dyn Model> {
    let spec = families::spec(&Fields::open(folder).unwrap()).unwrap();
    let weights = Weights::open(folder, spec.base).unwrap();
    Box::new(Decoder::load(ops, ModelInfo::new(spec.family, spec.vocab), &spec, &weights, None).unwrap())
}

impl Case {
    fn start(&self, room: Room) -> Box<dyn Cache> {
        self.read(&tiny::SOURCE, room)
    }

    /// A cache of a row with a source, where models have one.
    fn read(&self, source: &[u32], room: Room) -> Box<dyn Cache> {
        self.model.start(&[Start { source, room, ..Start::default() }]).unwrap().remove(0)
    }

    fn feed(&self, cache: &mut Box<dyn Cache>, tokens: &[u32], want: Want) -> Vec<f32> {
        self.model.forward(&mut [Feed { tokens, cache: &mut **cache }], want).unwrap().logits.into_host().unwrap()
    }

    /// The logits after every token, computed in one pass.
    fn whole(&self, tokens: &[u32]) -> Vec<f32> {
        self.feed(&mut self.start(Room::Grow), tokens, Want::All)
    }

    /// The logits after the last token.
    fn last(&self, tokens: &[u32]) -> Vec<f32> {
        self.whole(tokens).split_off((tokens.len() - 1) * self.model.info().vocab_size)
    }

    fn same(&self, found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len(), "{}", self.name);
        let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart <= self.tolerance, "{}: {apart} apart", self.name);
    }
}

#[test]
fn logits_depend_on_every_token_in_sight() {
    for case in cases().filter(|case| !case.is_half) {
        let logits = case.last(&IDS);
        for place in 0..IDS.len() {
            let mut ids = IDS;
            ids[place] = 50;
            let apart = logits.iter().zip(case.last(&ids)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // What is not seen changes no bit.
            assert!(apart > 0.0, "{}: token {place} makes no difference", case.name);
        }
    }
}

#[test]
fn fused_operations_agree_with_candles() {
    if tested().1 != DType::F32 {
        println!("skipped: in half precision the golden suite compares with f32");
        return;
    }
    for family in tiny::FAMILIES {
        let [candle, fused, _] = all(family, json!({})).map(|case| case.whole(&IDS));
        let spread = candle.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
        let apart = candle.iter().zip(&fused).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(candle.len() == fused.len() && apart < 1e-5 * spread.max(1.0), "{family}: {apart} apart of {spread}");
    }
}

#[test]
fn cached_equals_uncached() {
    for case in cases() {
        let mut cache = case.start(Room::Grow);
        let steps: Vec<f32> = IDS.iter().flat_map(|&id| case.feed(&mut cache, &[id], Want::Last)).collect();
        case.same(&steps, &case.whole(&IDS));
        assert_eq!(cache.len(), IDS.len());
    }
}

#[test]
fn chunked_equals_whole() {
    for case in cases() {
        for chunk in [2, 3, 5] {
            let mut cache = case.start(Room::Grow);
            let chunks: Vec<f32> = IDS.chunks(chunk).flat_map(|ids| case.feed(&mut cache, ids, Want::All)).collect();
            case.same(&chunks, &case.whole(&IDS));
        }
    }
}

#[test]
fn wanting_nothing_fills_the_cache() {
    for case in cases() {
        let mut cache = case.start(Room::Grow);
        let forward = case.model.forward(&mut [Feed { tokens: &IDS[..6], cache: &mut *cache }], Want::Nothing).unwrap();
        assert!(matches!(forward.logits, Values::Nothing) && matches!(forward.hidden, Values::Nothing));
        case.same(&case.feed(&mut cache, &IDS[6..], Want::Last), &case.last(&IDS));
    }
}

#[test]
fn states_do_not_depend_on_how_they_were_computed() {
    for case in cases() {
        let hidden = |cache: &mut Box<dyn Cache>, tokens: &[u32]| {
            let forward = case.model.forward(&mut [Feed { tokens, cache: &mut **cache }], Want::Hidden).unwrap();
            case.same(&forward.logits.into_host().unwrap(), &case.last(&IDS[..cache.len()]));
            forward.hidden.into_host().unwrap()
        };
        let whole = hidden(&mut case.start(Room::Grow), &IDS);
        let width = whole.len() / IDS.len();
        assert!(width > 1 && whole.len() == IDS.len() * width, "{}: {} numbers", case.name, whole.len());
        for chunk in [1, 2, 5] {
            let mut cache = case.start(Room::Grow);
            let chunks: Vec<f32> = IDS.chunks(chunk).flat_map(|ids| hidden(&mut cache, ids)).collect();
            case.same(&chunks, &whole);
        }
        let (mut one, mut two) = (case.start(Room::Grow), case.start(Room::Grow));
        case.feed(&mut two, &IDS[..4], Want::Nothing);
        let mut feeds = [Feed { tokens: &IDS[..3], cache: &mut *one }, Feed { tokens: &IDS[4..], cache: &mut *two }];
        let forward = case.model.forward(&mut feeds, Want::Hidden).unwrap();
        case.same(&forward.hidden.into_host().unwrap(), &[&whole[..3 * width], &whole[4 * width..]].concat());
        case.same(&forward.logits.into_host().unwrap(), &[case.last(&IDS[..3]), case.last(&IDS)].concat());
    }
}

#[test]
fn early_layers_do_not_depend_on_how_they_were_computed() {
    for case in cases().filter(|case| !case.model.info().is_encoder_decoder) {
        let want = Want::Layers(&[2, 0, 1]);
        let whole = case.feed(&mut case.start(Room::Grow), &IDS, want);
        let vocab = case.model.info().vocab_size;
        assert_eq!((case.model.info().layers, whole.len()), (3, 4 * vocab));
        case.same(&whole[3 * vocab..], &case.last(&IDS));
        let rows: Vec<_> = whole.chunks(vocab).collect();
        assert!((0..4).all(|a| (0..a).all(|b| rows[a] != rows[b])), "{}: two layers say the same", case.name);
        case.same(&case.feed(&mut case.start(Room::Grow), &IDS, Want::Layers(&[1])), &[rows[2], rows[3]].concat());
        for held in [1, 6, 10] {
            let (mut one, mut two) = (case.start(Room::Grow), case.start(Room::Grow));
            case.feed(&mut two, &IDS[..held], Want::Nothing);
            case.same(&case.feed(&mut two.fork(), &IDS[held..], want), &whole);
            let mut feeds = [Feed { tokens: &IDS[..7], cache: &mut *one }, Feed { tokens: &IDS[held..], cache: &mut *two }];
            let both = case.model.forward(&mut feeds, want).unwrap().logits.into_host().unwrap();
            case.same(&both, &[case.feed(&mut case.start(Room::Grow), &IDS[..7], want), whole.clone()].concat());
        }
        let error =
            case.model.forward(&mut [Feed { tokens: &[1], cache: &mut *case.start(Room::Grow) }], Want::Layers(&[1, 3])).unwrap_err();
        assert_eq!(error.to_string(), "unsupported: the state after layer 3; layers 0 to 2 are accepted");
    }
}

#[test]
fn a_row_that_crosses_equals_a_fresh_one() {
    for case in crossing() {
        let mut cache = case.start(Room::Reserve(11));
        for len in 1..=IDS.len() {
            case.same(&case.feed(&mut cache, &IDS[len - 1..len], Want::Last), &case.last(&IDS[..len]));
            assert_eq!(cache.len(), len);
        }
        // Up, down, down to nothing, and up again; forks stay where they were.
        let mut steps = vec![(10, 1), (5, 2), (7, 1), (8, 1), (8, 3), (0, 4), (4, 7)];
        while let Some((len, count)) = steps.pop() {
            let mut other = cache.fork();
            cache.truncate(len.min(cache.len())).unwrap();
            let held = cache.len();
            case.same(&case.feed(&mut cache, &IDS[held..][..count.min(11 - held)], Want::Last), &case.last(&IDS[..(held + count).min(11)]));
            let len = other.len();
            if len < IDS.len() {
                case.same(&case.feed(&mut other, &IDS[len..], Want::Last), &case.last(&IDS));
            }
        }
        let short = case.last(&IDS[..8]);
        let long = &case.whole(&IDS)[7 * 61..8 * 61];
        assert!(short.iter().zip(long).any(|(a, b)| (a - b).abs() > 1e-3), "crossing changes nothing");
    }
}

#[test]
fn rows_that_cross_do_not_touch_others() {
    for case in crossing() {
        let lens = [3, 8, 7, 9];
        let begin = |len: usize| {
            let mut cache = case.start(Room::Grow);
            case.feed(&mut cache, &IDS[..len], Want::Nothing);
            cache
        };
        for want in [Want::Last, Want::All, Want::Each(&[2, 1, 0, 2]), Want::Hidden] {
            let mut caches = lens.map(begin);
            let mut feeds = Vec::new();
            for (cache, len) in caches.iter_mut().zip(lens) {
                feeds.push(Feed { tokens: &IDS[len..len + 2], cache: &mut **cache });
            }
            let forward = case.model.forward(&mut feeds, want).unwrap();
            let (mut logits, mut hidden) = (Vec::new(), Vec::new());
            for (row, len) in lens.into_iter().enumerate() {
                let mut cache = begin(len);
                let counts = [[2, 1, 0, 2][row]];
                let want = if let Want::Each(_) = want { Want::Each(&counts) } else { want };
                let forward = case.model.forward(&mut [Feed { tokens: &IDS[len..len + 2], cache: &mut *cache }], want).unwrap();
                logits.extend(forward.logits.into_host().unwrap());
                hidden.extend(forward.hidden.into_host().unwrap());
            }
            case.same(&forward.logits.into_host().unwrap(), &logits);
            let found = forward.hidden.into_host().unwrap();
            assert_eq!(found.len(), if want == Want::Hidden { 8 * 32 } else { 0 });
            case.same(&found, &hidden);
            assert_eq!(caches.map(|cache| cache.len()), [5, 10, 9, 11]);
        }
    }
}

#[test]
fn a_prompt_in_chunks_is_rotated_by_its_whole_length() {
    for case in crossing().into_iter().chain(dynamic()) {
        for len in [6, 8, 9, 11] {
            let start = Start { len, ..Start::default() };
            let mut cache = case.model.start(&[start]).unwrap().remove(0);
            let chunks: Vec<f32> = IDS[..len].chunks(3).flat_map(|ids| case.feed(&mut cache, ids, Want::All)).collect();
            case.same(&chunks, &case.whole(&IDS[..len]));
            // Cut short, the row is no longer known to become so long.
            cache.truncate(0).unwrap();
            case.same(&case.feed(&mut cache, &IDS[..4], Want::Last), &case.last(&IDS[..4]));
        }
    }
}

#[test]
fn dynamic_rows_leave_their_keys_as_they_were_written() {
    for case in dynamic() {
        let mut cache = case.start(Room::Grow);
        let steps: Vec<Vec<f32>> = IDS.iter().map(|&id| case.feed(&mut cache, &[id], Want::Last)).collect();
        for len in 1..=8 {
            case.same(&steps[len - 1], &case.last(&IDS[..len]));
        }
        assert!(steps[10].iter().zip(case.last(&IDS)).any(|(a, b)| (a - b).abs() > 1e-4));
    }
}

#[test]
fn a_ragged_batch_equals_its_rows_alone() {
    for case in cases() {
        // Rows with 0, 3 and 6 positions held bring 5, 1 and 4 tokens.
        let splits = [(&IDS[..5], 0), (&IDS[2..6], 3), (&IDS[1..11], 6)];
        for want in [Want::Last, Want::All] {
            let mut caches: Vec<_> = splits.iter().map(|_| case.start(Room::Grow)).collect();
            let mut alone = Vec::new();
            for (cache, (ids, held)) in caches.iter_mut().zip(splits) {
                if held > 0 {
                    case.feed(cache, &ids[..held], Want::Nothing);
                }
                alone.extend(case.feed(&mut cache.fork(), &ids[held..], want));
            }
            let tokens = splits.map(|(ids, held)| &ids[held..]);
            let mut feeds: Vec<_> = caches.iter_mut().zip(tokens).map(|(cache, tokens)| Feed { tokens, cache: &mut **cache }).collect();
            case.same(&case.model.forward(&mut feeds, want).unwrap().logits.into_host().unwrap(), &alone);
            assert_eq!(caches.iter().map(|cache| cache.len()).collect::<Vec<_>>(), [5, 4, 10]);
        }
    }
}

/// The families that read a source.
fn readers() -> impl Iterator<Item = Case> {
    cases().filter(|case| case.model.info().is_encoder_decoder)
}

#[test]
fn logits_depend_on_every_token_of_the_source() {
    for case in readers().filter(|case| !case.is_half) {
        let last = |source: &[u32]| case.feed(&mut case.read(source, Room::Grow), &IDS, Want::Last);
        let ids = IDS.map(|id| id % 57);
        let logits = last(&ids);
        for place in 0..IDS.len() {
            let mut source = ids;
            source[place] = 50;
            let apart = logits.iter().zip(last(&source)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart > 0.0, "{}: token {place} of the source makes no difference", case.name);
        }
        assert_eq!(case.model.info().layers, 0);
    }
}

#[test]
fn sources_in_a_batch_are_what_they_are_alone() {
    for case in readers() {
        let sources = [&IDS[..], &IDS[..1], &[5; 40][..], &IDS[3..7]].map(|source| source.iter().map(|id| id % 57).collect::<Vec<_>>());
        let starts: Vec<_> = sources.iter().map(|source| Start { source, ..Start::default() }).collect();
        let mut caches = case.model.start(&starts).unwrap();
        for want in [Want::Last, Want::Each(&[1, 2, 0, 4]), Want::Hidden, Want::All] {
            let mut alone = Vec::new();
            let mut feeds = Vec::new();
            for (row, (cache, source)) in caches.iter_mut().zip(&sources).enumerate() {
                let tokens = &IDS[row..2 * row + 2];
                let counts = [[1, 2, 0, 4][row]];
                let want = if let Want::Each(_) = want { Want::Each(&counts) } else { want };
                cache.truncate(0).unwrap();
                alone.extend(case.feed(&mut case.read(source, Room::Grow), tokens, want));
                feeds.push(Feed { tokens, cache: &mut **cache });
            }
            case.same(&case.model.forward(&mut feeds, want).unwrap().logits.into_host().unwrap(), &alone);
        }
    }
}

#[test]
fn a_source_stays_through_forks_and_truncations() {
    for case in readers() {
        let mut one = case.start(Room::Reserve(11));
        case.feed(&mut one, &IDS[..7], Want::Nothing);
        let mut two = one.fork();
        one.truncate(0).unwrap();
        case.same(&case.feed(&mut one, &IDS, Want::Last), &case.last(&IDS));
        case.same(&case.feed(&mut two, &IDS[7..], Want::Last), &case.last(&IDS));
        let other = case.feed(&mut case.read(&[5, 6], Room::Grow), &IDS, Want::Last);
        assert!(other.iter().zip(case.last(&IDS)).any(|(a, b)| (a - b).abs() > 1e-3), "{}", case.name);
    }
}

#[test]
fn sources_that_cannot_be_read_are_refused() {
    for case in readers() {
        let refused = |source| case.model.start(&[Start::default(), Start { source, ..Start::default() }][1..]).err().unwrap().to_string();
        assert_eq!(refused(&[]), "invalid prompt: a row without a source, which an encoder-decoder model needs");
        let vocab = case.model.info().source_vocab_size;
        assert_eq!(vocab, if case.name == "marian-apart" { 57 } else { 61 });
        let message = format!("invalid prompt: id {vocab} is outside the encoder's vocabulary; ids below {vocab} are accepted");
        assert_eq!(refused(&[1, vocab as u32]), message);
        let long = case.model.start(&[Start { source: &[6; 41], ..Start::default() }]);
        match case.model.info().source_context {
            Context::Hard(40) => {
                let message = "invalid prompt: a source of 41 tokens does not fit into the encoder's positions; at most 40 do";
                assert_eq!(long.err().unwrap().to_string(), message);
            }
            _ => assert_eq!(long.unwrap().len(), 1),
        }
    }
}

#[test]
fn forks_go_their_own_ways() {
    for case in cases() {
        let mut one = case.start(Room::Grow);
        case.feed(&mut one, &IDS[..7], Want::Nothing);
        let mut two = one.fork();
        let ways = [[3, 8, 55], [44, 8, 1]];
        for step in 0..3 {
            for (cache, way) in [&mut one, &mut two].into_iter().zip(ways) {
                let logits = case.feed(cache, &way[step..=step], Want::Last);
                case.same(&logits, &case.last(&[&IDS[..7], &way[..=step]].concat()));
            }
        }
    }
}

#[test]
fn truncation_forgets() {
    for case in cases() {
        for len in [0, 1, 4, 9] {
            let mut cache = case.start(Room::Grow);
            case.feed(&mut cache, &IDS, Want::Nothing);
            let mut untouched = cache.fork();
            cache.truncate(len).unwrap();
            assert_eq!(cache.len(), len);
            case.same(&case.feed(&mut cache, &[30, 31], Want::Last), &case.last(&[&IDS[..len], &[30, 31]].concat()));
            case.same(&case.feed(&mut untouched, &[7], Want::Last), &case.last(&[&IDS[..], &[7]].concat()));
            assert!(cache.truncate(len + 3).is_err());
        }
    }
}

#[test]
fn a_reserved_cache_refuses_more() {
    for case in cases() {
        let mut cache = case.start(Room::Reserve(8));
        case.same(&case.feed(&mut cache, &IDS[..8], Want::Last), &case.last(&IDS[..8]));
        let error = case.model.forward(&mut [Feed { tokens: &[1], cache: &mut *cache }], Want::Last).unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid generation config: max_cache_len = 8: the row needs 9 positions; at least that many are accepted"
        );
        cache.truncate(7).unwrap();
        case.same(&case.feed(&mut cache, &IDS[7..8], Want::Last), &case.last(&IDS[..8]));
    }
}

#[test]
fn a_refused_pass_leaves_every_cache_alone() {
    for case in cases() {
        let (mut one, mut two) = (case.start(Room::Grow), case.start(Room::Grow));
        case.feed(&mut one, &IDS[..3], Want::Nothing);
        for (bad, message) in [
            (&[4, 61][..], "invalid prompt: id 61 is outside the vocabulary; ids below 61 are accepted"),
            (&[], "invalid prompt: a row without new tokens; at least one is needed"),
        ] {
            let mut feeds = [Feed { tokens: &[4], cache: &mut *one }, Feed { tokens: bad, cache: &mut *two }];
            assert_eq!(case.model.forward(&mut feeds, Want::Last).unwrap_err().to_string(), message);
        }
        assert_eq!((one.len(), two.len()), (3, 0));
        case.same(&case.feed(&mut one, &IDS[3..], Want::Last), &case.last(&IDS));
    }
}

#[test]
fn a_table_of_positions_ends_and_computed_positions_do_not() {
    for case in cases() {
        let mut cache = case.start(Room::Grow);
        case.feed(&mut cache, &[6; 40], Want::Nothing);
        let forward = case.model.forward(&mut [Feed { tokens: &[6], cache: &mut *cache }], Want::Last);
        match case.model.info().context {
            Context::Hard(40) => {
                let message = "invalid prompt: 41 tokens do not fit into the model's positions; at most 40 do";
                assert_eq!(forward.unwrap_err().to_string(), message);
            }
            context => {
                assert!([Context::Soft(40), Context::Unlimited].contains(&context));
                assert!(forward.unwrap().logits.into_host().unwrap().iter().all(|logit| logit.is_finite()));
            }
        }
    }
}

#[test]
fn a_cache_of_another_model_is_refused() {
    let [gpt2, llama] = ["gpt2", "llama"].map(|family| {
        let folder = tiny::folder(family);
        open(plain().0, folder.path())
    });
    let mut cache = gpt2.start(&[Start::default()]).unwrap().remove(0);
    let forward = llama.forward(&mut [Feed { tokens: &[1], cache: &mut *cache }], Want::Last);
    assert!(matches!(forward, Err(Error::Unsupported(_))));
}
