//! The file of a SentencePiece model: the part of its protocol buffer that matters for encoding and decoding.

use std::str;

/// Groups within each other that are skipped; no such file has any.
const DEPTH: usize = 8;

/// A model as its file holds it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Proto {
    /// In the order of their ids.
    pub pieces: Vec<Piece>,
    pub algorithm: Algorithm,
    pub byte_fallback: bool,
    /// Whether a word ends with its space instead of beginning with it.
    pub suffix: bool,
    pub unk_id: i32,
    pub bos_id: i32,
    pub eos_id: i32,
    pub unk_piece: String,
    pub bos_piece: String,
    pub eos_piece: String,
    /// What an unknown piece is decoded to.
    pub unk_surface: String,
    /// The compiled character map; empty if there is none.
    pub charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub escape_whitespaces: bool,
    /// Whether decoded text is mapped too.
    pub denormalises: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

/// The numbers are those of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Unigram = 1,
    Bpe = 2,
}

/// A field's value.
enum Value<'a> {
    Number(u64),
    Fixed(u32),
    Bytes(&'a [u8]),
    /// Of eight bytes, which no field that is read has.
    Wide,
}

impl Proto {
    /// Reads a file. Nothing in it is believed: lengths are compared with what is there before anything is taken.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut proto = Self {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            suffix: false,
            unk_id: 0,
            bos_id: 1,
            eos_id: 2,
            unk_piece: "<unk>".into(),
            bos_piece: "<s>".into(),
            eos_piece: "</s>".into(),
            unk_surface: " \u{2047} ".into(),
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            denormalises: false,
        };
        fields(bytes, &mut |number, value| match (number, value) {
            (1, Value::Bytes(bytes)) => {
                let piece = Piece::read(bytes).map_err(|reason| format!("piece {}: {reason}", proto.pieces.len()))?;
                proto.pieces.push(piece);
                Ok(())
            }
            (2, Value::Bytes(bytes)) => fields(bytes, &mut |number, value| proto.trainer(number, value)),
            (3, Value::Bytes(bytes)) => fields(bytes, &mut |number, value| {
                proto.normalizer(number, value);
                Ok(())
            }),
            (5, Value::Bytes(bytes)) => fields(bytes, &mut |number, value| {
                proto.denormalises |= matches!((number, value), (2, Value::Bytes(map)) if !map.is_empty());
                Ok(())
            }),
            _ => Ok(()),
        })?;
        if proto.pieces.is_empty() {
            return Err("it has no pieces; a SentencePiece model is accepted".into());
        }
        Ok(proto)
    }

    fn trainer(&mut self, number: u32, value: Value) -> Result<(), String> {
        match (number, value) {
            (3, Value::Number(1)) => self.algorithm = Algorithm::Unigram,
            (3, Value::Number(2)) => self.algorithm = Algorithm::Bpe,
            (3, Value::Number(other)) => {
                return Err(format!("model_type = {other}; accepted are 1, unigram, and 2, byte pair encoding"));
            }
            (24, Value::Number(flag)) => self.suffix = flag != 0,
            (35, Value::Number(flag)) => self.byte_fallback = flag != 0,
            // A negative number is written as one of 64 bits.
            (40, Value::Number(id)) => self.unk_id = id as i32,
            (41, Value::Number(id)) => self.bos_id = id as i32,
            (42, Value::Number(id)) => self.eos_id = id as i32,
            (44, Value::Bytes(bytes)) => self.unk_surface = text(bytes)?,
            (45, Value::Bytes(bytes)) => self.unk_piece = text(bytes)?,
            (46, Value::Bytes(bytes)) => self.bos_piece = text(bytes)?,
            (47, Value::Bytes(bytes)) => self.eos_piece = text(bytes)?,
            _ => {}
        }
        Ok(())
    }

    fn normalizer(&mut self, number: u32, value: Value) {
        match (number, value) {
            (2, Value::Bytes(map)) => self.charsmap = map.to_vec(),
            (3, Value::Number(flag)) => self.add_dummy_prefix = flag != 0,
            (4, Value::Number(flag)) => self.remove_extra_whitespaces = flag != 0,
            (5, Value::Number(flag)) => self.escape_whitespaces = flag != 0,
            _ => {}
        }
    }
}

impl Piece {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: Kind::Normal };
        fields(bytes, &mut |number, value| {
            match (number, value) {
                (1, Value::Bytes(bytes)) => piece.text = text(bytes)?,
                (2, Value::Fixed(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Number(kind)) => piece.kind = Kind::read(kind)?,
                _ => {}
            }
            Ok(())
        })?;
        if piece.text.is_empty() || !piece.score.is_finite() {
            return Err(format!("{:?} with score {}; accepted are a text that is not empty and a finite score", piece.text, piece.score));
        }
        Ok(piece)
    }
}

impl Kind {
    fn read(number: u64) -> Result<Self, String> {
        let kinds = [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte];
        kinds.into_iter().find(|&kind| kind as u64 == number).ok_or_else(|| format!("type = {number}; accepted are 1 to 6"))
    }
}

/// Gives every field of a message to `take`, in the order of the file.
fn fields<'a>(mut bytes: &'a [u8], take: &mut dyn FnMut(u32, Value<'a>) -> Result<(), String>) -> Result<(), String> {
    while !bytes.is_empty() {
        let (number, wire) = key(&mut bytes)?;
        match value(&mut bytes, wire)? {
            Some(value) => take(number, value)?,
            None => skip(&mut bytes, wire, number, 0)?,
        }
    }
    Ok(())
}

/// A field's number and its wire type.
fn key(bytes: &mut &[u8]) -> Result<(u32, u8), String> {
    let key = varint(bytes)?;
    let number = u32::try_from(key >> 3).ok().filter(|&number| number > 0);
    Ok((number.ok_or_else(|| format!("the field number {} does not exist", key >> 3))?, (key & 7) as u8))
}

/// The value of a wire type; none for the ends of groups.
fn value<'a>(bytes: &mut &'a [u8], wire: u8) -> Result<Option<Value<'a>>, String> {
    Ok(Some(match wire {
        0 => Value::Number(varint(bytes)?),
        1 => {
            take(bytes, 8)?;
            Value::Wide
        }
        2 => {
            let len = varint(bytes)?;
            Value::Bytes(take(bytes, len)?)
        }
        3 | 4 => return Ok(None),
        5 => Value::Fixed(take(bytes, 4)?.iter().rev().fold(0, |bits, &byte| bits << 8 | u32::from(byte))),
        _ => return Err(format!("the wire type {wire} does not exist")),
    }))
}

/// Passes over a group, a form of nesting that was given up before there were such files.
fn skip(bytes: &mut &[u8], wire: u8, number: u32, depth: usize) -> Result<(), String> {
    if wire == 4 || depth == DEPTH {
        return Err(format!("the group of field {number} does not begin, or is one of more than {DEPTH} within each other"));
    }
    loop {
        let (inner, wire) = key(bytes)?;
        match (wire, value(bytes, wire)?) {
            (4, _) if inner == number => return Ok(()),
            (_, Some(_)) => {}
            (_, None) => skip(bytes, wire, inner, depth + 1)?,
        }
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut number = 0;
    for shift in (0..70).step_by(7) {
        let byte = take(bytes, 1)?.iter().fold(0, |_, &byte| u64::from(byte));
        // What does not fit into 64 bits is dropped, as every reader of the format does.
        number |= (byte & 0x7F).checked_shl(shift).unwrap_or(0);
        if byte < 0x80 {
            return Ok(number);
        }
    }
    Err("a number has more than 10 bytes".into())
}

fn take<'a>(bytes: &mut &'a [u8], len: u64) -> Result<&'a [u8], String> {
    let split = usize::try_from(len).ok().and_then(|len| bytes.split_at_checked(len));
    let (head, rest) = split.ok_or_else(|| format!("{len} bytes are claimed where {} are left", bytes.len()))?;
    *bytes = rest;
    Ok(head)
}

fn text(bytes: &[u8]) -> Result<String, String> {
    str::from_utf8(bytes).map(str::to_owned).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A message of one piece, a trainer's and a normaliser's settings.
    const SMALL: &[u8] = b"\x0A\x0A\x0A\x03\xE2\x96\x81\x15\0\0\x80\xBF\x12\x08\x18\x02\x98\x02\x01\xC8\x02\x05\x1A\x07\x12\x03abc\x18\0";

    #[test]
    fn fields_are_read_and_unknown_ones_passed_over() {
        let proto = Proto::read(SMALL).unwrap();
        assert_eq!(proto.pieces, [Piece { text: "▁".into(), score: -1.0, kind: Kind::Normal }]);
        assert_eq!((proto.algorithm, proto.byte_fallback, proto.bos_id, proto.eos_id), (Algorithm::Bpe, true, 5, 2));
        assert_eq!((proto.charsmap.as_slice(), proto.add_dummy_prefix, proto.remove_extra_whitespaces), (&b"abc"[..], false, true));
        // A group with a group in it, numbers of 64 bits, and a negative id.
        let more =
            [SMALL, b"\xFB\x01\x43\x08\x01\x44\xFC\x01\xA1\x06\0\0\0\0\0\0\0\0\x12\x0C\xD0\x02\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01"];
        let proto = Proto::read(&more.concat()).unwrap();
        assert_eq!((proto.eos_id, proto.pieces.len()), (-1, 1));
    }

    #[test]
    fn damage_is_told() {
        let deep = [0x0B; 64];
        let cases: [(&[u8], &str); 12] = [
            (b"", "no pieces"),
            (b"{\"a\": 1}", "97 bytes are claimed where 5 are left"),
            (b"\x0A\xFF\xFF\xFF\xFF\x0F", "4294967295 bytes are claimed where 0 are left"),
            (b"\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01a", "18446744073709551615 bytes"),
            (b"\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", "more than 10 bytes"),
            (b"\x0A\x03\x0A\x01\xFF", "piece 0: invalid utf-8"),
            (b"\x0A\x00", "piece 0: \"\" with score 0"),
            (b"\x0A\x08\x0A\x01a\x15\0\0\xC0\x7F", "NaN"),
            (b"\x0A\x05\x0A\x01a\x18\x07", "type = 7"),
            (b"\x12\x02\x18\x03", "model_type = 3"),
            (b"\x02\x01", "field number 0"),
            (&deep, "more than 8"),
        ];
        for (bytes, expected) in cases {
            let reason = Proto::read(bytes).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
        for end in 1..SMALL.len() {
            let _ = Proto::read(&SMALL[..end]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Proto::read(&bytes);
        }

        #[test]
        fn any_change_is_answered(at in 0..SMALL.len(), byte in any::<u8>()) {
            let mut bytes = SMALL.to_vec();
            bytes[at] = byte;
            let _ = Proto::read(&bytes);
        }
    }
}
