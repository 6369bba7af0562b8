//! A beginning that is computed already: ids, and the cache that holds them. Rows that begin with some of them go on from there.

use crate::{
    error::Result,
    model::{Cache, Model, ModelInfo, Start},
    search,
};
use std::sync::{Mutex, PoisonError};

/// Ids, and the cache that holds them.
pub(crate) struct Prefix {
    ids: Vec<u32>,
    /// Only forked: a lock, since a cache may be sent to a thread but not shared by two.
    cache: Mutex<Box<dyn Cache>>,
}

impl Prefix {
    /// What is computed of a row; none if nothing is, or nothing that another row could go on from.
    pub fn new(tokens: &[u32], mut cache: Box<dyn Cache>) -> Result<Option<Self>> {
        let ids = tokens.get(..cache.len()).unwrap_or(tokens);
        // Room that was reserved, and drafts that were refused, go.
        let start = Start { len: ids.len(), ..Start::default() };
        let kept = !ids.is_empty() && cache.resume(ids.len(), &start)?;
        Ok(kept.then(|| Self { ids: ids.to_vec(), cache: Mutex::new(cache) }))
    }

    /// How many tokens of a row can be kept: never its last, as the logits after it are wanted.
    fn common(&self, tokens: &[u32]) -> usize {
        let same = self.ids.iter().zip(tokens).take_while(|(held, token)| held == token).count();
        same.min(tokens.len().saturating_sub(1))
    }

    /// Bytes that it takes beside a row with these tokens, whose full pages are those that both begin with.
    pub fn bytes(&self, tokens: &[u32], info: &ModelInfo) -> u64 {
        let page = info.page.max(1);
        let pages = self.ids.len().div_ceil(page) - self.common(tokens) / page;
        (pages as u64).saturating_mul(page as u64).saturating_mul(info.position_bytes)
    }

    /// A cache for such a row, and how many of its tokens are in it; none if it has to begin anew.
    fn fork(&self, tokens: &[u32], start: &Start<'_>) -> Result<Option<(Box<dyn Cache>, usize)>> {
        let common = self.common(tokens);
        if common == 0 || !start.source.is_empty() {
            return Ok(None);
        }
        // A fork changes nothing, so that a panic within one leaves nothing half done.
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner).fork();
        Ok(cache.resume(common, start)?.then_some((cache, common)))
    }
}

/// Caches for rows with these tokens, and how many of them each holds: what they have in common with the prefix, if the model's caches
/// allow it.
pub(crate) fn start(prefix: Option<&Prefix>, model: &dyn Model, rows: &[(Start<'_>, &[u32])]) -> Result<Vec<(Box<dyn Cache>, usize)>> {
    let fork = |(start, tokens): &(Start<'_>, &[u32])| prefix.map_or(Ok(None), |prefix| prefix.fork(tokens, start));
    let forks = rows.iter().map(fork).collect::<Result<Vec<_>>>()?;
    let fresh: Vec<_> = rows.iter().zip(&forks).filter(|(_, fork)| fork.is_none()).map(|((start, _), _)| *start).collect();
    let mut fresh = search::start(model, &fresh)?.into_iter().map(|cache| (cache, 0));
    Ok(forks.into_iter().filter_map(|fork| fork.or_else(|| fresh.next())).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::Room;

    /// The ids that it was fed; it forgets only the last `recall` of them.
    #[derive(Clone)]
    struct Fed(Vec<u32>, usize);

    impl Cache for Fed {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn fork(&self) -> Box<dyn Cache> {
            Box::new(self.clone())
        }

        fn truncate(&mut self, len: usize) -> Result<()> {
            if self.len() - len > self.1 {
                return Err(crate::Error::Unsupported("it is too long ago".into()));
            }
            self.0.truncate(len);
            Ok(())
        }
    }

    fn prefix(ids: &[u32], recall: usize) -> Prefix {
        Prefix::new(ids, Box::new(Fed(ids.to_vec(), recall))).unwrap().unwrap()
    }

    fn kept(prefix: &Prefix, tokens: &[u32], room: Room) -> Option<usize> {
        let start = Start { len: tokens.len(), room, ..Start::default() };
        prefix.fork(tokens, &start).unwrap().map(|(cache, kept)| {
            assert_eq!(cache.len(), kept);
            kept
        })
    }

    #[test]
    fn rows_keep_what_they_have_in_common_but_their_last_token() {
        let prefix = prefix(&[1, 2, 3, 4], 9);
        for (tokens, expected) in [
            (&[1, 2, 3, 4, 5, 6][..], Some(4)),
            (&[1, 2, 3, 4], Some(3)),
            (&[1, 2, 9, 4], Some(2)),
            (&[1, 2], Some(1)),
            (&[1], None),
            (&[9, 2, 3], None),
            (&[], None),
        ] {
            assert_eq!(kept(&prefix, tokens, Room::Grow), expected, "{tokens:?}");
        }
        let encoded = Start { source: &[7], len: 6, room: Room::Grow };
        assert!(prefix.fork(&[1, 2, 3], &encoded).unwrap().is_none(), "a decoder's ids do not tell what was encoded");
    }

    #[test]
    fn what_cannot_be_forgotten_or_reserved_is_computed_anew() {
        let prefix = prefix(&[1, 2, 3, 4], 1);
        assert_eq!(kept(&prefix, &[1, 2, 3, 9, 9], Room::Grow), Some(3));
        assert_eq!(kept(&prefix, &[1, 2, 9, 9, 9], Room::Grow), None);
        assert_eq!(kept(&prefix, &[1, 2, 3, 4, 9], Room::Reserve(8)), None);
        assert_eq!(kept(&prefix, &[1, 2, 3, 4, 9], Room::Grow), Some(4), "no fork changes it");
    }

    #[test]
    fn only_what_a_cache_holds_is_known() {
        let prefix = |tokens: &[u32], held: &[u32], recall| {
            let prefix = Prefix::new(tokens, Box::new(Fed(held.to_vec(), recall))).unwrap()?;
            let len = prefix.cache.lock().unwrap().len();
            Some((prefix.ids, len))
        };
        assert_eq!(prefix(&[1, 2, 3], &[1, 2], 0), Some((vec![1, 2], 2)));
        assert_eq!(prefix(&[1, 2], &[1, 2, 8, 9], 2), Some((vec![1, 2], 2)));
        assert_eq!(prefix(&[1, 2], &[1, 2, 8, 9], 1), None);
        assert_eq!(prefix(&[1, 2], &[], 0), None);
    }

    #[test]
    fn shared_pages_are_counted_once() {
        let info = ModelInfo { page: 4, position_bytes: 10, ..ModelInfo::new("m", 8) };
        let prefix = prefix(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 0);
        assert_eq!(prefix.bytes(&[], &info), 3 * 4 * 10);
        assert_eq!(prefix.bytes(&[1, 2, 3, 4, 5, 6], &info), 2 * 4 * 10);
        assert_eq!(prefix.bytes(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 1], &info), 4 * 10);
    }
}
