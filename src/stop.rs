//! When a row ends, besides what its length and its end tokens say.

use crate::{logits::History, output::FinishReason};

/// A user's own reason to end a row, checked after each of its tokens.
///
/// Closures are criteria too:
///
/// ```
/// use candle_generate::{FinishReason, History, StoppingCriteria};
///
/// let twenty = |history: &History<'_>| (history.generated().len() >= 20).then_some(FinishReason::Criteria);
/// # fn check(_: impl StoppingCriteria) {}
/// # check(twenty);
/// ```
pub trait StoppingCriteria: Send + Sync {
    /// The reason to end the row, if there is one.
    fn check(&self, history: &History<'_>) -> Option<FinishReason>;
}

impl<F: Fn(&History<'_>) -> Option<FinishReason> + Send + Sync> StoppingCriteria for F {
    fn check(&self, history: &History<'_>) -> Option<FinishReason> {
        self(history)
    }
}

impl std::fmt::Debug for dyn StoppingCriteria {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoppingCriteria")
    }
}

/// Ends calls from another thread. A clone is the same token.
///
/// ```
/// use candle_generate::{CancelToken, FinishReason, GenerationConfig, Generator};
///
/// let generator = Generator::from_pretrained("examples/models/storyteller")?;
/// let token = CancelToken::new();
/// let mut stream = generator.stream("The", &GenerationConfig::greedy().cancel(token.clone()))?;
/// stream.next().transpose()?;
/// token.cancel(); // usually on another thread
/// assert_eq!(stream.last().transpose()?.and_then(|piece| piece.finish), Some(FinishReason::Cancelled));
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct CancelToken(std::sync::Arc<std::sync::atomic::AtomicBool>);

impl CancelToken {
    /// A token that nobody has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends every call that carries this token, at its next step. Rows keep what they have.
    pub fn cancel(&self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}
