//! A SentencePiece model: a text to pieces and back, as the library does it.

use super::{
    normal::{Normalizer, SPACE},
    proto::{Algorithm, Kind, Piece, Proto},
};
use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, HashMap},
    ops::Range,
};

/// How much less likely than the least likely piece an unknown character is (unigram_model.cc).
const UNKNOWN: f32 = 10.0;

/// A model, ready for use. It gives pieces, not ids: those who use it have vocabularies of their own.
#[derive(Debug)]
pub(super) struct Model {
    normalizer: Normalizer,
    pieces: Vec<Piece>,
    /// All of `pieces`, except for what a text never becomes.
    normal: Sorted,
    user: Sorted,
    /// What a text never becomes: control tokens, bytes and the unknown piece.
    reserved: Sorted,
    algorithm: Algorithm,
    /// The pieces of the 256 bytes, if unknown characters are written in these.
    bytes: bool,
    unk: u32,
    unk_surface: String,
    /// Whether a text's first space is not its own.
    strips_first: bool,
    /// Whether all of a text's leading spaces are not its own.
    strips_all: bool,
    least: f32,
    most: f32,
}

/// Pieces in the order of their bytes, with their ids.
#[derive(Debug)]
pub(super) struct Sorted(Vec<(String, u32)>);

impl Model {
    pub fn new(proto: Proto) -> Result<Self, String> {
        if proto.denormalises {
            return Err("it maps the characters of decoded text, which is not supported; accepted is a model without a denormaliser".into());
        }
        let normalizer = Normalizer::new(&proto)?;
        let of = |kinds: &[Kind]| {
            let pieces = proto.pieces.iter().zip(0..).filter(|(piece, _)| kinds.contains(&piece.kind));
            Sorted::new(pieces.map(|(piece, id)| (piece.text.clone(), id)))
        };
        let reserved = of(&[Kind::Control, Kind::Unknown, Kind::Byte])?;
        let bytes = (0..=u8::MAX).all(|byte| reserved.id(&token(byte)).is_some());
        if proto.byte_fallback && !bytes {
            return Err("it writes unknown characters as bytes, and has not all of <0x00> to <0xFF>".into());
        }
        let mut unknown = (0..).zip(&proto.pieces).filter(|(_, piece)| piece.kind == Kind::Unknown).map(|(id, _)| id);
        let (Some(unk), None) = (unknown.next(), unknown.next()) else {
            return Err("accepted is a model with one unknown piece".into());
        };
        let scores = || proto.pieces.iter().filter(|piece| piece.kind == Kind::Normal).map(|piece| piece.score);
        Ok(Self {
            normalizer,
            normal: of(&[Kind::Normal, Kind::UserDefined, Kind::Unused])?,
            user: of(&[Kind::UserDefined])?,
            reserved,
            algorithm: proto.algorithm,
            bytes: proto.byte_fallback,
            unk,
            unk_surface: proto.unk_surface,
            strips_first: proto.add_dummy_prefix || proto.remove_extra_whitespaces,
            strips_all: proto.remove_extra_whitespaces,
            least: scores().fold(f32::MAX, f32::min),
            most: scores().fold(f32::MIN_POSITIVE, f32::max),
            pieces: proto.pieces,
        })
    }

    /// The pieces of a text; unknown characters in a row are one piece, or one for each of their bytes.
    pub fn encode(&self, text: &str) -> Vec<String> {
        let text = self.normalizer.normalise(text, |text| self.user_symbol(text));
        let found = match self.algorithm {
            Algorithm::Unigram => self.unigram(&text),
            Algorithm::Bpe => self.bpe(&text),
        };
        let (mut pieces, mut after_unknown) = (Vec::<String>::new(), false);
        for (part, id) in found {
            let unknown = id == self.unk;
            match pieces.last_mut().filter(|_| unknown && after_unknown) {
                _ if self.kind(id) == Kind::Control => {}
                _ if unknown && self.bytes => pieces.extend(part.bytes().map(token)),
                Some(last) => last.push_str(part),
                None => pieces.push(part.to_owned()),
            }
            after_unknown = unknown;
        }
        pieces
    }

    /// The text that pieces spell. One that the model does not know spells itself.
    pub fn decode<'a>(&self, pieces: impl IntoIterator<Item = &'a str>) -> String {
        let (mut text, mut bytes) = (String::new(), Vec::new());
        let mut first = true;
        let mut consumed = false;
        for piece in pieces {
            let id = self.id(piece);
            if self.kind(id) == Kind::Byte {
                bytes.extend(piece.get(3..5).and_then(|digits| u8::from_str_radix(digits, 16).ok()));
                continue;
            }
            flush(&mut text, &mut bytes);
            first &= !consumed && text.is_empty();
            consumed = false;
            match self.kind(id) {
                Kind::Control => {}
                Kind::Unknown if self.pieces.get(id as usize).is_some_and(|unknown| unknown.text == piece) => {
                    text.push_str(&self.unk_surface);
                }
                Kind::Unknown => text.push_str(piece),
                _ => {
                    let rest = piece.strip_prefix(SPACE).filter(|_| first && self.strips_first);
                    consumed = rest.is_some() && !self.strips_all;
                    text.push_str(&rest.unwrap_or(piece).replace(SPACE, " "));
                }
            }
        }
        flush(&mut text, &mut bytes);
        text
    }

    /// The id of a piece, or that of the unknown one.
    fn id(&self, piece: &str) -> u32 {
        self.reserved.id(piece).or_else(|| self.normal.id(piece)).unwrap_or(self.unk)
    }

    fn kind(&self, id: u32) -> Kind {
        self.pieces.get(id as usize).map_or(Kind::Unknown, |piece| piece.kind)
    }

    fn score(&self, id: u32) -> f32 {
        self.pieces.get(id as usize).map_or(0.0, |piece| piece.score)
    }

    /// The length of the longest symbol of a user's that the text begins with.
    fn user_symbol(&self, text: &str) -> Option<usize> {
        self.user.prefixes(text).last().map(|(len, _)| len)
    }

    /// The most likely pieces (Kudo 2018, <https://arxiv.org/abs/1804.10959>). Of equally likely ways the first one found wins, with
    /// sums in the library's precisions.
    fn unigram<'a>(&self, text: &'a str) -> Vec<(&'a str, u32)> {
        let mut paths = Paths(vec![(0.0, None); text.len() + 1]);
        for (start, character) in text.char_indices() {
            let before = paths.sum(start);
            let mut single = false;
            for (len, id) in self.normal.prefixes(&text[start..]) {
                let score = match self.kind(id) {
                    Kind::Unused => continue,
                    // Always wins over the pieces that it is made of.
                    Kind::UserDefined => f64::from(len as f32 * self.most) - 0.1,
                    _ => f64::from(self.score(id)),
                };
                paths.reach(start + len, score + f64::from(before), start, id);
                single |= len == character.len_utf8();
            }
            if !single {
                paths.reach(start + character.len_utf8(), f64::from(self.least - UNKNOWN + before), start, self.unk);
            }
        }
        let (mut pieces, mut end) = (Vec::new(), text.len());
        while let Some(&(_, Some((start, id)))) = paths.0.get(end) {
            pieces.push((&text[start..end], id));
            end = start;
        }
        pieces.reverse();
        pieces
    }

    /// Merges neighbours into pieces, the best piece first (Sennrich et al. 2016, <https://arxiv.org/abs/1508.07909>).
    fn bpe<'a>(&self, text: &'a str) -> Vec<(&'a str, u32)> {
        let mut symbols = Vec::new();
        let mut start = 0;
        while let Some(character) = text[start..].chars().next() {
            let user = self.user_symbol(&text[start..]);
            let end = start + user.unwrap_or(character.len_utf8());
            symbols.push(Symbol { range: start..end, frozen: user.is_some(), before: symbols.len().checked_sub(1), after: None });
            start = end;
        }
        for next in 1..symbols.len() {
            symbols[next - 1].after = Some(next);
        }
        let mut merges = Merges { model: self, text, heap: BinaryHeap::new(), parts: HashMap::new() };
        for next in 1..symbols.len() {
            merges.add(&symbols, Some(next - 1), Some(next));
        }
        while let Some(Merge { left: Reverse(left), right, len, .. }) = merges.heap.pop() {
            let (a, b) = (symbols[left].range.clone(), symbols[right].range.clone());
            // One of the two may be part of another piece by now.
            if a.is_empty() || b.is_empty() || a.len() + b.len() != len {
                continue;
            }
            symbols[left].range = a.start..b.end;
            symbols[right].range = b.end..b.end;
            let after = symbols[right].after;
            symbols[left].after = after;
            if let Some(after) = after {
                symbols[after].before = Some(left);
            }
            merges.add(&symbols, symbols[left].before, Some(left));
            merges.add(&symbols, Some(left), after);
        }
        let mut pieces = Vec::new();
        for symbol in symbols.into_iter().filter(|symbol| !symbol.range.is_empty()) {
            merges.split(symbol.range, &mut pieces);
        }
        pieces
    }
}

/// For each byte of a text: the best sum of scores up to it, and where its last piece begins and what it is.
struct Paths(Vec<(f32, Option<(usize, u32)>)>);

impl Paths {
    fn sum(&self, end: usize) -> f32 {
        self.0.get(end).map_or(0.0, |node| node.0)
    }

    fn reach(&mut self, end: usize, sum: f64, start: usize, id: u32) {
        if let Some(node) = self.0.get_mut(end)
            && (node.1.is_none() || sum > f64::from(node.0))
        {
            *node = (sum as f32, Some((start, id)));
        }
    }
}

/// A piece in the making.
struct Symbol {
    range: Range<usize>,
    /// Whether it is a symbol of a user's, which is merged with nothing.
    frozen: bool,
    before: Option<usize>,
    after: Option<usize>,
}

/// Two neighbours that make a piece. The greatest is the one to make next: that of the highest score, and of these the leftmost.
#[derive(PartialEq)]
struct Merge {
    score: f32,
    left: Reverse<usize>,
    right: usize,
    len: usize,
}

// Scores are finite.
impl Eq for Merge {}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        let score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        score.then_with(|| (self.left, self.right, self.len).cmp(&(other.left, other.right, other.len)))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

struct Merges<'m, 'a> {
    model: &'m Model,
    text: &'a str,
    heap: BinaryHeap<Merge>,
    /// What pieces that are not used were made of: where their second half begins, in bytes.
    parts: HashMap<&'a str, usize>,
}

impl<'a> Merges<'_, 'a> {
    fn add(&mut self, symbols: &[Symbol], left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let (a, b) = (&symbols[left], &symbols[right]);
        let piece = &self.text[a.range.start..b.range.end];
        if !a.frozen
            && !b.frozen
            && let Some(id) = self.model.normal.id(piece)
        {
            self.heap.push(Merge { score: self.model.score(id), left: Reverse(left), right, len: piece.len() });
            if self.model.kind(id) == Kind::Unused {
                self.parts.insert(piece, a.range.len());
            }
        }
    }

    /// The piece at `range`, or those that it was made of if it is not used.
    fn split(&self, range: Range<usize>, pieces: &mut Vec<(&'a str, u32)>) {
        let mut open = vec![&self.text[range]];
        while let Some(piece) = open.pop() {
            let id = self.model.id(piece);
            match self.parts.get(piece).filter(|_| self.model.kind(id) == Kind::Unused) {
                Some(&half) => open.extend([&piece[half..], &piece[..half]]),
                None => pieces.push((piece, id)),
            }
        }
    }
}

impl Sorted {
    pub fn new(pieces: impl Iterator<Item = (String, u32)>) -> Result<Self, String> {
        let mut pieces: Vec<_> = pieces.collect();
        pieces.sort_unstable();
        match pieces.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            Some(pair) => Err(format!("the piece {:?} is there twice", pair[0].0)),
            None => Ok(Self(pieces)),
        }
    }

    pub fn id(&self, piece: &str) -> Option<u32> {
        let at = self.0.binary_search_by(|(other, _)| other.as_str().cmp(piece)).ok()?;
        Some(self.0[at].1)
    }

    /// The pieces that a text begins with, shortest first: their lengths in bytes and their ids.
    pub fn prefixes(&self, text: &str) -> impl Iterator<Item = (usize, u32)> {
        let (mut range, mut text) = (&self.0[..], text.bytes().enumerate());
        std::iter::from_fn(move || {
            loop {
                let (depth, byte) = text.next()?;
                let at = |piece: &(String, u32)| piece.0.as_bytes().get(depth).copied();
                let start = range.partition_point(|piece| at(piece) < Some(byte));
                range = &range[start..];
                range = &range[..range.partition_point(|piece| at(piece) <= Some(byte))];
                let (piece, id) = range.first()?;
                if piece.len() == depth + 1 {
                    return Some((piece.len(), *id));
                }
            }
        })
    }
}

/// The piece of a byte.
fn token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Writes the bytes that were held; each that is no part of a character is replaced.
fn flush(text: &mut String, bytes: &mut Vec<u8>) {
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    bytes.clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, path::Path, sync::LazyLock};

    fn file(name: &str) -> Vec<u8> {
        fs::read(Path::new("tests/tokenizers/spm").join(name)).unwrap()
    }

    fn load(name: &str) -> Model {
        Model::new(Proto::read(&file(name)).unwrap()).unwrap()
    }

    static MODELS: LazyLock<[Model; 3]> = LazyLock::new(|| ["unigram.model", "bpe.model", "llama.model"].map(load));

    /// A model of pieces with scores and kinds, all bytes among them if it falls back on them.
    fn build(algorithm: Algorithm, pieces: &[(&str, f32, Kind)], bytes: bool) -> Result<Model, String> {
        let mut proto = Proto::read(b"\x0A\x03\x0A\x01a").unwrap();
        let all = (0..=u8::MAX).map(|byte| Piece { text: token(byte), score: 0.0, kind: Kind::Byte });
        proto.pieces = vec![Piece { text: "<unk>".into(), score: 0.0, kind: Kind::Unknown }];
        proto.pieces.extend(pieces.iter().map(|&(text, score, kind)| Piece { text: text.into(), score, kind }));
        proto.pieces.extend(all.filter(|_| bytes));
        (proto.algorithm, proto.byte_fallback, proto.add_dummy_prefix) = (algorithm, bytes, false);
        Model::new(proto)
    }

    use Kind::{Control, Normal, Unused, UserDefined};

    #[test]
    fn the_likeliest_pieces_are_found_and_of_equals_the_first() {
        let pieces = [("a", -1.0, Normal), ("b", -1.0, Normal), ("c", -1.0, Normal), ("ab", -2.0, Normal), ("bc", -1.5, Normal)];
        let model = build(Algorithm::Unigram, &pieces, false).unwrap();
        assert_eq!(model.encode("abc"), ["a", "bc"]);
        assert_eq!(model.encode("ab"), ["ab"], "the longer piece comes first");
        assert_eq!(model.encode("xya x"), ["xy", "a", "▁x"], "unknown characters in a row are one piece");
        let bytes = build(Algorithm::Unigram, &pieces, true).unwrap();
        assert_eq!(bytes.encode("aé"), ["a", "<0xC3>", "<0xA9>"]);
    }

    #[test]
    fn the_best_merge_is_made_first_and_unused_pieces_are_taken_apart() {
        let pieces = [("a", -9.0, Normal), ("b", -9.0, Normal), ("ab", -1.0, Unused), ("aba", -0.5, Normal), ("ba", -2.0, Normal)];
        let model = build(Algorithm::Bpe, &pieces, false).unwrap();
        assert_eq!(model.encode("aba"), ["aba"]);
        assert_eq!(model.encode("abb"), ["a", "b", "b"]);
        assert_eq!(model.encode("bab"), ["b", "a", "b"], "the score decides, not the place");
        assert_eq!(model.encode("baa"), ["ba", "a"]);
    }

    #[test]
    fn a_user_s_symbol_is_one_piece_wherever_it_stands() {
        for algorithm in [Algorithm::Unigram, Algorithm::Bpe] {
            let pieces = [("a", -1.0, Normal), ("<", -1.0, Normal), ("a<", -0.1, Normal), ("<s>", 0.0, Control), ("<>", 0.0, UserDefined)];
            let model = build(algorithm, &pieces, false).unwrap();
            assert_eq!(model.encode("a<>a"), ["a", "<>", "a"]);
            assert_eq!(model.encode("<s>"), ["<", "s>"], "a control token is written by no text");
        }
    }

    // Of sentencepiece 0.2.3's decode_pieces.
    #[test]
    fn pieces_are_spelt_out() {
        let [unigram, _, llama] = &*MODELS;
        assert_eq!(unigram.decode(["▁a", "▁", "▁b", "</s>", "<unk>", "é▁"]), "a ▁b ⁇ é▁", "this model has no ▁b");
        assert_eq!(unigram.decode(["▁", "▁", "▁a"]), "a");
        assert_eq!(llama.decode(["▁", "▁", "▁a"]), "  a");
        assert_eq!(llama.decode(["<s>", "▁a", "<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0xC3>", "b"]), "a€\u{fffd}\u{fffd}b");
    }

    #[test]
    fn what_contradicts_itself_is_no_model() {
        let refused = |pieces: &[(&str, f32, Kind)], part| {
            let reason = build(Algorithm::Bpe, pieces, false).unwrap_err();
            assert!(reason.contains(part), "{reason}");
        };
        refused(&[("a", 0.0, Normal), ("a", 0.0, Normal)], "\"a\" is there twice");
        refused(&[("<x>", 0.0, Kind::Unknown)], "one unknown piece");
        let mut proto = Proto::read(&file("unigram.model")).unwrap();
        proto.byte_fallback = true;
        assert!(Model::new(proto.clone()).unwrap_err().contains("<0xFF>"));
        (proto.byte_fallback, proto.denormalises) = (false, true);
        assert!(Model::new(proto).unwrap_err().contains("denormaliser"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn a_changed_file_is_answered(which in 0..2_usize, changes in prop::collection::vec((any::<u32>(), any::<u8>()), 1..9), text in ".{0,12}") {
            let mut bytes = file(["unigram.model", "bpe.model"][which]);
            let len = bytes.len();
            for (at, byte) in changes {
                // Half of them among the settings and the character map, which stand behind the pieces.
                let at = if byte % 2 == 0 { at as usize % len } else { len - 1 - at as usize % 6000 };
                bytes[at] = byte;
            }
            if let Ok(model) = Proto::read(&bytes).and_then(Model::new) {
                let pieces = model.encode(&text);
                model.decode(pieces.iter().map(String::as_str));
            }
        }

        #[test]
        fn with_bytes_for_the_unknown_a_text_comes_back(text in "[^▁]{0,30}") {
            let model = &MODELS[2];
            let pieces = model.encode(&text);
            prop_assert_eq!(model.decode(pieces.iter().map(String::as_str)), text);
        }
    }
}
