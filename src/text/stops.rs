//! Stop strings, found in text that appears piece by piece.

use crate::error::{Error, Result};
use std::{cmp::Reverse, sync::Arc};

/// The strings that end a row, compiled. A clone shares them.
///
/// ```
/// use candle_generate::text::StopStrings;
///
/// let mut row = StopStrings::new(["THE END"], false)?.watch("a prompt");
/// assert_eq!(row.push("and so THE").text, "and so "); // the rest may become a stop string
/// assert_eq!(row.push(" END.").stop.as_deref(), Some("THE END"));
/// # Ok::<(), candle_generate::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    needles: Arc<[Needle]>,
    include: bool,
}

/// One row's search for stop strings.
///
/// It holds text back only while that could still be the beginning of a stop string, and costs one automaton step per
/// byte and string (Knuth, Morris, Pratt, "Fast pattern matching in strings", 1977).
#[derive(Debug, Clone)]
pub struct Watch {
    stops: StopStrings,
    /// For each string, how many of its first bytes the text seen so far ends with.
    matched: Vec<usize>,
    /// Generated text that is not passed on yet.
    held: String,
    stopped: bool,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scan {
    /// Text that no stop string can take away any more.
    pub text: String,
    /// The stop string that was met; the row's text ends here.
    pub stop: Option<String>,
}

#[derive(Debug)]
struct Needle {
    text: String,
    /// For each number of matched bytes less one: how many are still matched if the next byte does not fit.
    fallback: Vec<usize>,
}

impl StopStrings {
    /// Compiles `strings`. With `include`, a row's text keeps the stop string at its end.
    ///
    /// # Errors
    /// [`Error::Config`] for an empty string.
    pub fn new<S: Into<String>>(strings: impl IntoIterator<Item = S>, include: bool) -> Result<Self> {
        let needles = strings.into_iter().map(|text| Needle::new(text.into())).collect::<Result<_>>()?;
        Ok(Self { needles, include })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.needles.is_empty()
    }

    /// Starts a row after `prompt`.
    pub fn watch(&self, prompt: &str) -> Watch {
        // HF: the prompt may hold the head of a match, but a match ends in generated text.
        let matched = self.needles.iter().map(|needle| prompt.bytes().fold(0, |matched, byte| needle.step(matched, byte))).collect();
        Watch { stops: self.clone(), matched, held: String::new(), stopped: false }
    }
}

impl Watch {
    /// Takes the next piece of the row's text. The match that ends first wins, of several the longest. After a match,
    /// text is ignored.
    pub fn push(&mut self, piece: &str) -> Scan {
        if self.stopped {
            return Scan::default();
        }
        let old = self.held.len();
        self.held.push_str(piece);
        for (index, byte) in piece.bytes().enumerate() {
            if let Some(stop) = self.step(byte) {
                let end = old + index + 1;
                // A match that began in the prompt leaves no generated text before it.
                self.held.truncate(if self.stops.include { end } else { end.saturating_sub(stop.len()) });
                self.stopped = true;
                return Scan { text: std::mem::take(&mut self.held), stop: Some(stop) };
            }
        }
        let open = self.matched.iter().copied().max().unwrap_or(0);
        let tail = self.held.split_off(self.held.len().saturating_sub(open));
        Scan { text: std::mem::replace(&mut self.held, tail), stop: None }
    }

    /// The text still held when the row ends for another reason.
    pub fn finish(&mut self) -> String {
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    fn step(&mut self, byte: u8) -> Option<String> {
        for (needle, matched) in self.stops.needles.iter().zip(&mut self.matched) {
            *matched = needle.step(*matched, byte);
        }
        let found = self.stops.needles.iter().zip(&self.matched).filter(|(needle, matched)| **matched == needle.text.len());
        found.min_by_key(|(_, matched)| Reverse(**matched)).map(|(needle, _)| needle.text.clone())
    }
}

impl Needle {
    fn new(text: String) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::config(
                "stop_strings",
                "\"\"",
                "an empty string is met everywhere; strings of at least one character are accepted",
            ));
        }
        let mut needle = Self { fallback: Vec::with_capacity(text.len()), text };
        needle.fallback.push(0);
        for index in 1..needle.text.len() {
            let byte = needle.text.as_bytes()[index];
            let shorter = needle.step(needle.fallback[index - 1], byte);
            needle.fallback.push(shorter);
        }
        Ok(needle)
    }

    /// How many bytes are matched after `byte`, if `matched` were before.
    fn step(&self, mut matched: usize, byte: u8) -> usize {
        let text = self.text.as_bytes();
        loop {
            if text.get(matched) == Some(&byte) {
                return matched + 1;
            }
            match matched.checked_sub(1).and_then(|last| self.fallback.get(last)) {
                Some(&shorter) => matched = shorter,
                None => return 0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(strings: &[&str], include: bool, prompt: &str, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let mut watch = StopStrings::new(strings.iter().copied(), include).unwrap().watch(prompt);
        let (mut texts, mut stop) = (Vec::new(), None);
        for piece in pieces {
            let scan = watch.push(piece);
            texts.push(scan.text);
            stop = stop.or(scan.stop);
        }
        texts.push(watch.finish());
        (texts, stop)
    }

    #[test]
    fn a_match_across_pieces_is_trimmed_or_kept() {
        let pieces = ["Hello w", "orld\n", "\nU", "ser: hi", " there"];
        let (texts, stop) = run(&["\n\nUser:"], false, "", &pieces);
        assert_eq!((texts, stop.as_deref()), (["Hello w", "orld", "", "", "", ""].map(str::to_owned).to_vec(), Some("\n\nUser:")));
        let (texts, _) = run(&["\n\nUser:"], true, "", &pieces);
        assert_eq!(texts, ["Hello w", "orld", "", "\n\nUser:", "", ""]);
    }

    #[test]
    fn only_what_may_begin_a_stop_string_is_held() {
        let (texts, stop) = run(&["END", "ab!"], false, "", &["xE", "N", "x", "aaab", "c ENDE"]);
        assert_eq!((texts.as_slice(), stop.as_deref()), (["x", "", "ENx", "aa", "abc ", ""].map(str::to_owned).as_slice(), Some("END")));
        let (texts, stop) = run(&["END"], false, "", &["the EN"]);
        assert_eq!((texts, stop), (vec!["the ".into(), "EN".into()], None));
    }

    #[test]
    fn the_prompt_gives_the_head_of_a_match_but_never_all_of_it() {
        let (texts, stop) = run(&["User:"], false, "Bot: hi\nUs", &["er", ": hello"]);
        assert_eq!((texts.concat().as_str(), stop.as_deref()), ("", Some("User:")));
        let (texts, _) = run(&["User:"], true, "Bot: hi\nUs", &["er", ": hello"]);
        assert_eq!(texts.concat(), "er:");
        let (texts, stop) = run(&["User:"], false, "User:", &[" hello"]);
        assert_eq!((texts.concat().as_str(), stop), (" hello", None));
    }

    #[test]
    fn the_first_end_wins_and_then_the_longer() {
        assert_eq!(run(&["bcd", "c"], false, "", &["abcd"]), (vec!["ab".into(), "".into()], Some("c".into())));
        assert_eq!(run(&["c", "abc", "bc"], false, "", &["xabcd"]), (vec!["x".into(), "".into()], Some("abc".into())));
    }

    #[test]
    fn multibyte_text_is_cut_between_characters() {
        // é is C3 A9 and è is C3 A8: the first byte of the stop string's character is no reason to hold the other one.
        assert_eq!(run(&["é!"], false, "", &["aè", "é", "?é!"]).0, ["aè", "", "é?", ""]);
        assert_eq!(run(&["。"], false, "", &["好", "的。再见"]), (vec!["好".into(), "的".into(), "".into()], Some("。".into())));
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopStrings::new(["a", ""], false).unwrap_err();
        assert!(error.kind() == "config" && error.to_string().contains("stop_strings"), "{error}");
        assert!(StopStrings::new([""; 0], false).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn pieces_find_what_a_search_of_the_whole_text_finds(
            strings in prop::collection::vec("[abé]{1,4}", 0..4), prompt in "[abé]{0,5}", pieces in prop::collection::vec("[abé]{0,4}", 0..8),
        ) {
            let text = pieces.concat();
            let whole = format!("{prompt}{text}");
            let found = strings.iter().flat_map(|stop| {
                let ends = (prompt.len() + 1..=whole.len()).filter(|&end| whole.is_char_boundary(end));
                ends.filter(|&end| whole[..end].ends_with(stop.as_str())).map(move |end| (end, Reverse(stop.len()), stop))
            }).min();
            let mut watch = StopStrings::new(strings.clone(), false).unwrap().watch(&prompt);
            let (mut joined, mut stop) = (String::new(), None);
            for piece in &pieces {
                let scan = watch.push(piece);
                joined += &scan.text;
                stop = stop.or(scan.stop);
            }
            joined += &watch.finish();
            match found {
                Some((end, _, expected)) => {
                    prop_assert_eq!(stop.as_ref(), Some(expected));
                    prop_assert_eq!(joined, &text[..(end - prompt.len()).saturating_sub(expected.len())]);
                }
                None => prop_assert_eq!((joined, stop), (text, None)),
            }
        }
    }
}
