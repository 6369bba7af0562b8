//! Text that appears token by token.

use super::Tokenizer;
use crate::error::Result;

/// What a tokenizer's decoder writes for bytes that are no character, or not yet.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;
/// Tokens after which an unfinished character is a broken one: UTF-8 has at most four bytes.
const CHARACTER: usize = 4;
/// Ids of a window at most. Only garbage fills it; then half of it is forgotten.
const WINDOW: usize = 64;

/// The incremental detokeniser of one row. Its pieces joined are the row's text: what [`Tokenizer::decode`] adds to the
/// prompt's text when the generated ids follow the prompt's.
///
/// A piece never ends within a character and is never held longer than until that character is complete, or known to be
/// broken. Only a small window of ids is decoded per token, so that a row costs time in proportion to its length.
///
/// ```
/// use candle_generate::{Tokenizer, text::Detokenizer};
///
/// let tokenizer = Tokenizer::from_folder("examples/models/storyteller")?.expect("it has one");
/// let mut row = Detokenizer::new(&tokenizer, &tokenizer.encode("Once", true)?)?;
/// let mut text = String::new();
/// for id in tokenizer.encode(" upon a time", false)? {
///     text += &row.push(id)?;
/// }
/// assert_eq!(text + &row.finish()?, " upon a time");
/// # Ok::<(), candle_generate::Error>(())
/// ```
// HF: the decoder for byte tokens (`<0xE2>`) replaces every byte of a run that is not UTF-8 as a whole, and so takes back
// characters that were complete. What a stream has shown cannot be taken back: here only the bytes after them are replaced.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// The last ids, enough of them for those that follow to decode as they would after the whole row.
    window: Vec<u32>,
    /// What was shown, or belongs to the prompt, of the window's text.
    shown: String,
    /// The number of ids since the text last ended in a complete character.
    open: usize,
}

impl Detokenizer {
    /// Starts a row after `prompt`, which is decoded once.
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32]) -> Result<Self> {
        let window: Vec<_> = prompt.iter().copied().filter(|&id| visible(tokenizer, id)).collect();
        let shown = tokenizer.decode(&window, true)?;
        let mut row = Self { tokenizer: tokenizer.clone(), window, shown, open: 0 };
        row.slide()?;
        Ok(row)
    }

    /// Takes the row's next id and gives the text that became certain.
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.open == 0
            && !self.shown.ends_with(REPLACEMENT)
            && let Some(piece) = self.tokenizer.piece(id)
        {
            if !piece.is_empty() {
                self.window.clear();
                self.window.push(id);
                piece.clone_into(&mut self.shown);
            }
            return Ok(piece.to_owned());
        }
        if !visible(&self.tokenizer, id) {
            return Ok(String::new());
        }
        self.window.push(id);
        self.open += 1;
        let text = self.tokenizer.decode(&self.window, true)?;
        let broken = text.ends_with(REPLACEMENT);
        let certain = self.tokenizer.tidied(settled(&text)).len();
        let piece = self.show(&text[..certain], broken && self.open < CHARACTER)?;
        if !broken {
            self.open = 0;
        }
        // What is held is not yet what the window's ids will have written.
        if certain == text.len() {
            self.slide()?;
        }
        if self.window.len() > WINDOW {
            self.window.drain(..self.window.len() - WINDOW / 2);
            let text = self.tokenizer.decode(&self.window, true)?;
            settled(&text).clone_into(&mut self.shown);
            self.open = if text.ends_with(REPLACEMENT) { self.open } else { 0 };
        }
        Ok(piece)
    }

    /// The text that is still held when the row ends: the replacements of an unfinished character.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window, true)?;
        self.show(&text, false)
    }

    /// Marks `text`, the certain part of the window's text, as shown, and gives what is new in it. With `wait`, a text that
    /// contradicts what was shown is looked at again after the next id.
    fn show(&mut self, text: &str, wait: bool) -> Result<String> {
        if self.shown.starts_with(text) {
            return Ok(String::new());
        }
        let piece = if let Some(new) = text.strip_prefix(&self.shown) {
            new.to_owned()
        } else if wait {
            return Ok(String::new());
        } else if let Some(new) = text.strip_prefix(self.shown.trim_end_matches(REPLACEMENT)) {
            // The prompt ended within a character that the row completed.
            new.to_owned()
        } else {
            // A run of byte tokens turned out to be broken after some of it was shown: the rest stands alone.
            self.window.drain(..self.window.len().saturating_sub(self.open));
            self.shown = self.tokenizer.decode(&self.window, true)?;
            return Ok(self.shown.clone());
        };
        text.clone_into(&mut self.shown);
        Ok(piece)
    }

    /// Forgets the ids that those to come cannot depend on: the fewest last ids are kept whose own text is how the
    /// window's text ends, and is not empty, lest the decoder takes the next id for the first one of a text.
    fn slide(&mut self) -> Result<()> {
        for kept in 1..=self.window.len().min(WINDOW) {
            let start = self.window.len() - kept;
            let text = self.tokenizer.decode(&self.window[start..], true)?;
            if !text.trim_end_matches(REPLACEMENT).is_empty() && self.shown.ends_with(&text) {
                self.window.drain(..start);
                self.shown = text;
                break;
            }
        }
        Ok(())
    }
}

/// A text without the replacements of a character that may yet be completed: it lacks a byte of its four at least, and
/// each byte may be replaced on its own.
fn settled(text: &str) -> &str {
    (1..CHARACTER).fold(text, |text, _| text.strip_suffix(REPLACEMENT).unwrap_or(text))
}

/// Whether an id takes part in decoding.
fn visible(tokenizer: &Tokenizer, id: u32) -> bool {
    !tokenizer.is_special(id) && tokenizer.token(id).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::sync::LazyLock;

    static BYTE_LEVEL: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_folder("examples/models/storyteller").unwrap().unwrap());
    /// As Llama 2 has it: bytes of unknown characters are tokens, a leading space is stripped from a text.
    static BYTE_FALLBACK: LazyLock<Tokenizer> = LazyLock::new(|| {
        let decoders = json!([
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        ]);
        let bytes = [0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF, 0x41].map(|byte: u8| format!("<0x{byte:02X}>"));
        let words = ["▁", "▁Hello", "▁world", "ing", "!", "▁▁"].map(str::to_owned);
        build(&[&bytes[..], &words].concat(), json!({"type": "Sequence", "decoders": decoders}))
    });
    static METASPACE: LazyLock<Tokenizer> = LazyLock::new(|| {
        let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        build(&["▁", "▁Hello", "▁world", "ing", "!", "▁▁", "é"].map(str::to_owned), decoder)
    });
    static WORD_PIECE: LazyLock<Tokenizer> = LazyLock::new(|| {
        build(
            &["hello", "world", "##ing", "##s", "!", "'", "s"].map(str::to_owned),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        )
    });
    static SUFFIX: LazyLock<Tokenizer> = LazyLock::new(|| {
        build(&["hel", "lo</w>", "world</w>", "!</w>"].map(str::to_owned), json!({"type": "BPEDecoder", "suffix": "</w>"}))
    });
    static SENTENCEPIECE: LazyLock<Tokenizer> = LazyLock::new(|| super::super::case("marian"));
    static PLAIN: LazyLock<Tokenizer> = LazyLock::new(|| build(&["a", "b", "c"].map(str::to_owned), Value::Null));

    /// A tokenizer with `<s>` as id 0, the special token, and `words` from id 1 on.
    fn build(words: &[String], decoder: Value) -> Tokenizer {
        let vocab: serde_json::Map<_, _> =
            std::iter::once("<s>").chain(words.iter().map(String::as_str)).zip(0..).map(|(word, id)| (word.into(), id.into())).collect();
        let special = json!({"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": decoder, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"}
        });
        file.to_string().parse::<tokenizers::Tokenizer>().unwrap().into()
    }

    fn ids(tokenizer: &Tokenizer, tokens: &[&str]) -> Vec<u32> {
        tokens.iter().map(|token| tokenizer.id(token).unwrap()).collect()
    }

    fn pieces(tokenizer: &Tokenizer, prompt: &[u32], generated: &[u32]) -> Vec<String> {
        let mut row = Detokenizer::new(tokenizer, prompt).unwrap();
        let mut pieces: Vec<_> = generated.iter().map(|&id| row.push(id).unwrap()).collect();
        pieces.push(row.finish().unwrap());
        assert!(row.window.len() <= WINDOW);
        pieces
    }

    #[test]
    fn byte_level_characters_come_whole_and_at_once() {
        let mut row = Detokenizer::new(&BYTE_LEVEL, &BYTE_LEVEL.encode("Once", true).unwrap()).unwrap();
        let mut push = |text| BYTE_LEVEL.encode(text, false).unwrap().into_iter().map(|id| row.push(id).unwrap()).collect::<Vec<_>>();
        assert_eq!(push("😀"), ["", "", "", "😀"]);
        for text in [" a", " é", "好", "e\u{301}", "\n", " 😀"] {
            let pieces = push(text);
            assert_eq!(pieces.concat(), text);
            assert!(!pieces.last().unwrap().is_empty(), "{pieces:?}");
        }
    }

    #[test]
    fn byte_tokens_assemble_and_leading_spaces_stay() {
        let hello = ids(&BYTE_FALLBACK, &["<s>", "▁Hello"]);
        let generated =
            ids(&BYTE_FALLBACK, &["▁world", "<0xE2>", "<0x82>", "<0xAC>", "<s>", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &hello, &generated), [" world", "", "", "€", "", " ", "", "", "", "😀", "!", ""]);
        assert_eq!(pieces(&BYTE_FALLBACK, &[0], &generated[..1]), ["world", ""]);
        // A run of byte tokens with more than one character: each comes with its own last byte.
        let run = ids(&BYTE_FALLBACK, &["<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &hello, &run), ["", "é", "", "é", "", "", "€", ""]);
    }

    #[test]
    fn broken_bytes_wait_no_longer_than_a_character() {
        let broken = ids(&BYTE_FALLBACK, &["<0xFF>"; 9]);
        let pieces_of = pieces(&BYTE_FALLBACK, &[], &broken);
        assert_eq!(pieces_of, ["", "", "", "�", "�", "�", "�", "�", "�", "���"]);
        let mixed = ids(&BYTE_FALLBACK, &["▁Hello", "<0xE2>", "<0x82>", "!", "<0xF0>"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &[], &mixed), ["Hello", "", "", "��!", "", "�"]);
        // HF: the reference's decoder gives three replacements, and takes the é back.
        let late = ids(&BYTE_FALLBACK, &["<0xC3>", "<0xA9>", "<0xFF>", "!"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &[], &late), ["", "é", "", "�!", ""]);
        let endless = ids(&BYTE_FALLBACK, &[&["<0xC3>", "<0xA9>"][..], &["<0xFF>"; 8]].concat());
        assert_eq!(pieces(&BYTE_FALLBACK, &[], &endless), ["", "é", "", "", "", "����", "", "", "", "�", "���"]);
        let cut = ids(&BYTE_FALLBACK, &["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &[], &cut), ["", "é", "", "", "��"]);
        let endless = vec![BYTE_LEVEL.id("ÿ").unwrap(); 300];
        assert_eq!(pieces(&BYTE_LEVEL, &[], &endless).concat(), "�".repeat(300));
        // Once the window has forgotten the broken byte, what follows it is whole again.
        let recovered = ids(&BYTE_FALLBACK, &[&["<0xFF>"][..], &["<0xC3>", "<0xA9>"].repeat(40)].concat());
        assert!(pieces(&BYTE_FALLBACK, &[], &recovered).concat().ends_with("�éééééééé"));
    }

    #[test]
    fn a_character_may_begin_in_the_prompt() {
        let prompt = ids(&BYTE_FALLBACK, &["▁Hello", "<0xF0>", "<0x9F>"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &prompt, &ids(&BYTE_FALLBACK, &["<0x98>", "<0x80>", "!"])), ["", "😀", "!", ""]);
        assert_eq!(pieces(&BYTE_FALLBACK, &prompt, &ids(&BYTE_FALLBACK, &["!"])), ["!", ""]);
        let broken = ids(&BYTE_FALLBACK, &["▁Hello", "<0xFF>", "<0x41>"]);
        assert_eq!(pieces(&BYTE_FALLBACK, &broken, &ids(&BYTE_FALLBACK, &["<0x41>", "!"])), ["", "�!", ""]);
        let emoji = BYTE_LEVEL.encode("😀", false).unwrap();
        assert_eq!(pieces(&BYTE_LEVEL, &emoji[..2], &emoji[2..]), ["", "😀", ""]);
    }

    #[test]
    fn other_decoders() {
        assert_eq!(
            pieces(&METASPACE, &ids(&METASPACE, &["▁Hello", "▁"]), &ids(&METASPACE, &["▁world", "ing", "▁▁", "!"])),
            [" world", "ing", "  ", "!", ""]
        );
        assert_eq!(
            pieces(&WORD_PIECE, &[0], &ids(&WORD_PIECE, &["hello", "world", "##ing", "##s", "!"])),
            ["hello", " world", "ing", "s", "!", ""]
        );
        assert_eq!(pieces(&SUFFIX, &[], &ids(&SUFFIX, &["hel", "lo</w>", "world</w>", "!</w>"])), ["hel", "lo", " world", " !", ""]);
        assert_eq!(pieces(&PLAIN, &[1], &[2, 3]), [" b", " c", ""]);
    }

    /// Whether collecting more ids never takes back a character that was complete.
    fn settles(tokenizer: &Tokenizer, ids: &[u32]) -> bool {
        let whole = tokenizer.decode(ids, true).unwrap();
        (0..ids.len()).all(|end| whole.starts_with(tokenizer.decode(&ids[..end], true).unwrap().trim_end_matches(REPLACEMENT)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn pieces_joined_are_the_collected_text(
            kind in 0..7_usize, seeds in prop::collection::vec(any::<u32>(), 0..120), start in 0..10_usize, garbage in any::<bool>(),
        ) {
            let tokenizer: &Tokenizer = [&BYTE_LEVEL, &BYTE_FALLBACK, &METASPACE, &WORD_PIECE, &SUFFIX, &PLAIN, &SENTENCEPIECE][kind];
            // Bytes lie close to the special tokens; beyond the vocabulary lie ids that no tokenizer knows.
            let size = if kind == 0 && garbage { 262 } else { tokenizer.vocab_size() as u32 + 1 };
            let ids: Vec<_> = seeds.iter().map(|seed| seed % size).collect();
            let (prompt, generated) = ids.split_at(start.min(ids.len()));
            let (before, whole) = (tokenizer.decode(prompt, true).unwrap(), tokenizer.decode(&ids, true).unwrap());
            let pieces = pieces(tokenizer, prompt, generated);
            if let (Some(text), true) = (whole.strip_prefix(&before), kind != 1 || settles(tokenizer, &ids)) {
                prop_assert_eq!(pieces.concat(), text);
            }
            let certain = pieces[..pieces.len() - 1].concat();
            prop_assert!(whole.contains(REPLACEMENT) || !certain.contains(REPLACEMENT));
        }
    }
}
