//! Other people's models: a closure over a model that keeps its cache inside, run one row at a time.

use crate::{
    error::{Error, Result},
    model::{Cache, Feed, Forward, Model, ModelInfo, Start, Values, Want, downcast},
};
use candle_core::Tensor;
use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

type Pass<M> = dyn Fn(&mut M, &Tensor, usize) -> candle_core::Result<Tensor> + Send + Sync;
type Reset<M> = dyn Fn(&mut M) -> candle_core::Result<()> + Send + Sync;

/// A model whose one cache is its own, as those of candle-transformers are: greedy search and sampling, row by row.
///
/// Rows share the model. It goes on where the tokens that it holds are those that a row begins with; a row of other tokens, in
/// another thread or after a truncation, is computed anew from its first one, which is slower and gives the same. So a batch runs
/// prompt after prompt, and whatever needs rows beside each other, hidden states or earlier logits is [`Error::Unsupported`]:
/// implement [`Model`] and [`Cache`] for that.
///
/// ```
/// use candle_generate::{Foreign, GenerationConfig, Generator, ModelInfo, candle_core::Tensor};
///
/// // Counts the tokens that it has seen, and says that number next.
/// struct Counter(usize);
///
/// let model = Foreign::new(
///     ModelInfo::new("counter", 16),
///     Counter(0),
///     |counter, ids, _position| {
///         counter.0 += ids.elem_count();
///         let logits: Vec<f32> = (0..16).map(|id| f32::from(u8::from(id == counter.0))).collect();
///         Tensor::from_vec(logits, (1, 16), ids.device())
///     },
///     |counter| {
///         counter.0 = 0;
///         Ok(())
///     },
/// );
/// let generator = Generator::new(model, None);
/// let output = generator.generate(vec![7u32, 7, 7], &GenerationConfig::greedy().max_new_tokens(4))?;
/// assert_eq!(output.tokens(), [3, 4, 5, 6]);
/// # Ok::<(), candle_generate::Error>(())
/// ```
pub struct Foreign<M> {
    info: ModelInfo,
    forward: Box<Pass<M>>,
    reset: Box<Reset<M>>,
    state: Mutex<State<M>>,
}

struct State<M> {
    model: M,
    /// The tokens that its cache holds, if that is certain: it is not before the first reset, nor after a pass that failed.
    held: Option<Vec<u32>>,
}

/// What a row remembers: its tokens. A clone is a fork.
#[derive(Clone)]
struct Tokens(Vec<u32>);

impl<M: Send> Foreign<M> {
    /// A model of `info`, with what it keeps in `model`.
    ///
    /// `forward` gets ids as a matrix of one row on the device of `info`, and the position of the first: all tokens of a row that it
    /// has nothing of at once, those after them one by one. It returns the logits after the last id or after each, in any shape
    /// whose last dimension is the vocabulary. `reset` empties the cache; it is called before the first pass, too.
    pub fn new(
        info: ModelInfo,
        model: M,
        forward: impl Fn(&mut M, &Tensor, usize) -> candle_core::Result<Tensor> + Send + Sync + 'static,
        reset: impl Fn(&mut M) -> candle_core::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            info: ModelInfo { single: true, ..info },
            forward: Box::new(forward),
            reset: Box::new(reset),
            state: Mutex::new(State { model, held: None }),
        }
    }

    /// The logits after the last of `tokens`, which are a row from its beginning.
    fn last(&self, state: &mut State<M>, tokens: &[u32]) -> Result<Vec<f32>> {
        let held = state.held.take().filter(|held| held.len() < tokens.len() && tokens.starts_with(held)).unwrap_or_default().len();
        if held == 0 {
            (self.reset)(&mut state.model)?;
        }
        // Models often mask new tokens only where nothing stands before them.
        let step = if held == 0 { tokens.len() } else { 1 };
        let mut last = Vec::new();
        for (index, ids) in tokens[held..].chunks(step).enumerate() {
            let matrix = Tensor::new(ids, &self.info.device)?.unsqueeze(0)?;
            let logits = (self.forward)(&mut state.model, &matrix, held + index)?;
            if held + index + ids.len() == tokens.len() {
                last = self.read(&logits, ids.len())?;
            }
        }
        state.held = Some(tokens.to_vec());
        Ok(last)
    }

    /// The last row of logits that a pass of so many tokens returned.
    fn read(&self, logits: &Tensor, tokens: usize) -> Result<Vec<f32>> {
        let width = self.info.vocab_size;
        let rows = match logits.dims().split_last() {
            Some((&last, rest)) if last == width => rest.iter().product(),
            _ => 0,
        };
        if rows == 0 || (rows != 1 && rows != tokens) {
            let (name, shape) = (&self.info.name, logits.dims());
            return Err(Error::Unsupported(format!(
                "{name} returned logits of shape {shape:?} for {tokens} tokens; accepted are those after the last token or after each, {width} wide"
            )));
        }
        Values::Device(logits.reshape((rows, width))?.get(rows - 1)?).into_host()
    }
}

impl<M: Send> Model for Foreign<M> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&self, rows: &[Start<'_>]) -> Result<Vec<Box<dyn Cache>>> {
        Ok(rows.iter().map(|_| Box::new(Tokens(Vec::new())) as Box<dyn Cache>).collect())
    }

    fn forward(&self, rows: &mut [Feed<'_>], want: Want<'_>) -> Result<Forward> {
        if !matches!(want, Want::Nothing | Want::Last) {
            let name = &self.info.name;
            return Err(Error::Unsupported(format!(
                "{name} tells the logits after a row's last token alone; for hidden states and earlier logits implement Model"
            )));
        }
        // A panic of the model's own has left `held` empty.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut texts, mut logits) = (Vec::with_capacity(rows.len()), Vec::new());
        for Feed { tokens, cache } in rows.iter_mut() {
            if tokens.is_empty() {
                return Err(Error::Unsupported("a row was fed without new tokens; each needs at least one".into()));
            }
            let text = [&downcast::<Tokens>(&mut **cache)?.0, *tokens].concat();
            // Where nothing is wanted yet, the tokens are computed in the pass that wants something.
            if want == Want::Last {
                logits.extend(self.last(&mut state, &text)?);
            }
            texts.push(text);
        }
        for (Feed { cache, .. }, text) in rows.iter_mut().zip(texts) {
            downcast::<Tokens>(&mut **cache)?.0 = text;
        }
        Ok(if want == Want::Last { Values::Host(logits) } else { Values::Nothing }.into())
    }
}

impl<M> fmt::Debug for Foreign<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Foreign").field(&self.info).finish()
    }
}

impl Cache for Tokens {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn fork(&self) -> Box<dyn Cache> {
        Box::new(self.clone())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.0.len() {
            return Err(Error::Unsupported(format!("a cache of {} positions cannot be truncated to {len}", self.0.len())));
        }
        self.0.truncate(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::{DType, Device};
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
    };

    const WIDTH: usize = 8;

    /// What the toy was asked: ids and their position; `None` for a reset.
    type Calls = Arc<Mutex<Vec<Option<(Vec<u32>, usize)>>>>;

    /// Sums up the ids that it has seen: its logits are one-hot at the sum. In front of them stand so many dimensions.
    fn toy(dimensions: usize, each: bool) -> (Foreign<u32>, Calls) {
        let calls = Calls::default();
        let (passes, resets) = (calls.clone(), calls.clone());
        let forward = move |sum: &mut u32, ids: &Tensor, position: usize| {
            let ids = ids.squeeze(0)?.to_vec1::<u32>()?;
            passes.lock().unwrap().push(Some((ids.clone(), position)));
            let mut rows = Vec::new();
            for id in &ids {
                *sum += id;
                rows.extend((0..WIDTH as u32).map(|place| f32::from(u8::from(place == *sum % WIDTH as u32))));
            }
            let count = if each { ids.len() } else { 1 };
            let shape = [&vec![1; dimensions][..], &[count, WIDTH]].concat();
            Tensor::from_vec(rows.split_off((ids.len() - count) * WIDTH), &shape[..], &Device::Cpu)
        };
        let reset = move |sum: &mut u32| {
            resets.lock().unwrap().push(None);
            *sum = 0;
            Ok(())
        };
        (Foreign::new(ModelInfo::new("toy", WIDTH), 99, forward, reset), calls)
    }

    fn cache(model: &dyn Model) -> Box<dyn Cache> {
        model.start(&[Start::default()]).unwrap().remove(0)
    }

    fn feed(model: &dyn Model, cache: &mut Box<dyn Cache>, tokens: &[u32], want: Want<'_>) -> Result<Vec<f32>> {
        model.forward(&mut [Feed { tokens, cache: &mut **cache }], want)?.logits.into_host()
    }

    /// What is wanted is the sum of the row.
    #[track_caller]
    fn sums(model: &dyn Model, cache: &mut Box<dyn Cache>, tokens: &[u32], sum: usize) {
        let logits = feed(model, cache, tokens, Want::Last).unwrap();
        assert_eq!(logits.len(), WIDTH);
        assert_eq!(logits.iter().position(|&logit| logit == 1.0), Some(sum));
    }

    #[test]
    fn a_row_alone_is_computed_once() {
        let (model, calls) = toy(0, false);
        let mut row = cache(&model);
        // Parts of a prompt wait for the pass that wants something.
        assert!(feed(&model, &mut row, &[1, 2], Want::Nothing).unwrap().is_empty());
        assert!(calls.lock().unwrap().is_empty());
        sums(&model, &mut row, &[3], 6);
        sums(&model, &mut row, &[1], 7);
        sums(&model, &mut row, &[4, 5], 0);
        assert_eq!(row.len(), 6);
        let expected = [None, Some((vec![1, 2, 3], 0)), Some((vec![1], 3)), Some((vec![4], 4)), Some((vec![5], 5))];
        assert_eq!(*calls.lock().unwrap(), expected);
    }

    #[test]
    fn rows_that_take_turns_are_computed_anew() {
        let (model, calls) = toy(0, false);
        let (mut one, mut two) = (cache(&model), cache(&model));
        sums(&model, &mut one, &[1, 2], 3);
        sums(&model, &mut two, &[4], 4);
        sums(&model, &mut one, &[3], 6);
        let expected = [None, Some((vec![1, 2], 0)), None, Some((vec![4], 0)), None, Some((vec![1, 2, 3], 0))];
        assert_eq!(*calls.lock().unwrap(), expected);
        // What the model holds is what this row begins with, whoever computed it.
        let mut fork = one.fork();
        sums(&model, &mut fork, &[1], 7);
        assert_eq!(calls.lock().unwrap()[6..], [Some((vec![1], 3))]);
        sums(&model, &mut one, &[1, 1], 0);
        assert_eq!(calls.lock().unwrap()[7..], [Some((vec![1], 4))]);
        let mut feeds = [Feed { tokens: &[1], cache: &mut *one }, Feed { tokens: &[3], cache: &mut *two }];
        let logits = model.forward(&mut feeds, Want::Last).unwrap().logits.into_host().unwrap();
        assert_eq!((logits[1], logits[WIDTH + 7], logits.len()), (1.0, 1.0, 2 * WIDTH));
    }

    #[test]
    fn truncation_forgets() {
        let (model, calls) = toy(0, false);
        let mut row = cache(&model);
        sums(&model, &mut row, &[1, 2, 3], 6);
        row.truncate(1).unwrap();
        sums(&model, &mut row, &[4], 5);
        assert_eq!(*calls.lock().unwrap(), [None, Some((vec![1, 2, 3], 0)), None, Some((vec![1, 4], 0))]);
        // The last token once more: its logits are gone, so that it is computed again.
        row.truncate(1).unwrap();
        sums(&model, &mut row, &[4], 5);
        assert_eq!(row.truncate(3).unwrap_err().to_string(), "unsupported: a cache of 2 positions cannot be truncated to 3");
    }

    #[test]
    fn threads_do_not_disturb_each_other() {
        let (model, _) = toy(0, false);
        std::thread::scope(|scope| {
            for first in 0..4u32 {
                let model = &model;
                scope.spawn(move || {
                    let mut row = cache(model);
                    let mut sum = 0;
                    for step in 0..200 {
                        sum = (sum + (first + step) % 8) % 8;
                        sums(model, &mut row, &[(first + step) % 8], sum as usize);
                    }
                });
            }
        });
    }

    #[test]
    fn logits_have_any_shape_with_a_vocabulary() {
        for (dimensions, each) in [(0, false), (1, false), (2, false), (0, true), (1, true)] {
            let (model, _) = toy(dimensions, each);
            let mut row = cache(&model);
            sums(&model, &mut row, &[1, 2, 3], 6);
            sums(&model, &mut row, &[1], 7);
        }
        let shaped = |shape: &'static [usize], dtype| {
            let forward = move |_: &mut (), _: &Tensor, _| Tensor::ones(shape, dtype, &Device::Cpu);
            let model = Foreign::new(ModelInfo::new("toy", WIDTH), (), forward, |_| Ok(()));
            let mut row = cache(&model);
            feed(&model, &mut row, &[1, 2, 3], Want::Last).map_err(|error| {
                assert_eq!(row.len(), 0);
                error.to_string()
            })
        };
        assert_eq!(shaped(&[WIDTH], DType::BF16).unwrap(), [1.0; WIDTH]);
        assert_eq!(shaped(&[3, 1, WIDTH], DType::F64).unwrap(), [1.0; WIDTH]);
        let reason = "unsupported: toy returned logits of shape [1, 2, 8] for 3 tokens; accepted are those after the last token or after \
            each, 8 wide";
        assert_eq!(shaped(&[1, 2, WIDTH], DType::F32).unwrap_err(), reason);
        for wrong in [&[1, 3][..], &[WIDTH, 1], &[], &[0, WIDTH], &[2, 3, WIDTH], &[1, WIDTH + 1]] {
            assert!(shaped(wrong, DType::F32).unwrap_err().starts_with("unsupported: toy returned logits of shape"), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let (model, calls) = toy(0, false);
        let mut row = cache(&model);
        sums(&model, &mut row, &[1], 1);
        for want in [Want::All, Want::Each(&[1]), Want::Hidden, Want::Layers(&[])] {
            let error = feed(&model, &mut row, &[2], want).unwrap_err().to_string();
            let reason =
                "unsupported: toy tells the logits after a row's last token alone; for hidden states and earlier logits implement Model";
            assert_eq!((error.as_str(), row.len()), (reason, 1));
        }
        assert!(matches!(feed(&model, &mut row, &[], Want::Last), Err(Error::Unsupported(_))));
        struct Strange;
        impl Cache for Strange {
            fn len(&self) -> usize {
                0
            }
            fn fork(&self) -> Box<dyn Cache> {
                Box::new(Self)
            }
            fn truncate(&mut self, _: usize) -> Result<()> {
                Ok(())
            }
        }
        let mut strange = Strange;
        assert!(model.forward(&mut [Feed { tokens: &[1], cache: &mut strange }], Want::Last).is_err());
        assert_eq!(calls.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_pass_that_fails_leaves_caches_alone_and_the_next_begins_anew() {
        for panics in [false, true] {
            let left = Arc::new(AtomicUsize::new(2));
            let passes = left.clone();
            let forward = move |sum: &mut u32, ids: &Tensor, _: usize| {
                // It fails half-way: its sum is spoilt.
                *sum += ids.flatten_all()?.sum_all()?.to_scalar::<u32>()?;
                if passes.fetch_sub(1, Relaxed) == 0 {
                    assert!(!panics, "out of luck");
                    candle_core::bail!("out of luck");
                }
                let row: Vec<f32> = (0..WIDTH as u32).map(|place| f32::from(u8::from(place == *sum % WIDTH as u32))).collect();
                Tensor::new(row, &Device::Cpu)
            };
            let reset = |sum: &mut u32| {
                *sum = 0;
                Ok(())
            };
            let model = Foreign::new(ModelInfo::new("toy", WIDTH), 0, forward, reset);
            let (mut one, mut two) = (cache(&model), cache(&model));
            sums(&model, &mut two, &[2], 2);
            let mut both = || {
                let mut feeds = [Feed { tokens: &[1, 2], cache: &mut *one }, Feed { tokens: &[3], cache: &mut *two }];
                model.forward(&mut feeds, Want::Last).err().map(|error| error.to_string())
            };
            match catch_unwind(AssertUnwindSafe(&mut both)) {
                // A backtrace may follow.
                Ok(error) => assert!(!panics && error.is_some_and(|error| error.starts_with("tensor: out of luck"))),
                Err(_) => assert!(panics),
            }
            assert_eq!((one.len(), two.len()), (0, 1));
            left.store(9, Relaxed);
            sums(&model, &mut two, &[3], 5);
            sums(&model, &mut one, &[1, 2], 3);
        }
    }
}
