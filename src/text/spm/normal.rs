//! What SentencePiece does to a text before it looks for pieces.

use super::proto::Proto;

/// What stands for a space in pieces.
pub(super) const SPACE: &str = "▁";

/// Maps characters and rewrites white space, as sentencepiece's normalizer.cc.
#[derive(Debug, Clone)]
pub(super) struct Normalizer {
    map: Option<Map>,
    add_dummy_prefix: bool,
    suffix: bool,
    remove_extra_whitespaces: bool,
    space: &'static str,
}

/// A compiled character map: a double array (<https://github.com/s-yata/darts-clone>) from UTF-8 to places in `texts`.
#[derive(Debug, Clone)]
struct Map {
    units: Vec<u32>,
    /// Replacements, each ended by a zero.
    texts: String,
}

impl Normalizer {
    pub fn new(proto: &Proto) -> Result<Self, String> {
        Ok(Self {
            map: if proto.charsmap.is_empty() { None } else { Some(Map::read(&proto.charsmap)?) },
            add_dummy_prefix: proto.add_dummy_prefix,
            suffix: proto.suffix,
            remove_extra_whitespaces: proto.remove_extra_whitespaces,
            space: if proto.escape_whitespaces { SPACE } else { " " },
        })
    }

    /// The text that pieces are looked for in. `user` tells how many bytes a user's symbol at the beginning has, which is left as it is.
    pub fn normalise<'a>(&'a self, mut text: &'a str, user: impl Fn(&str) -> Option<usize>) -> String {
        let prefix = |text: &'a str| self.prefix(text, &user);
        if self.remove_extra_whitespaces {
            while let Some((" ", rest)) = prefix(text) {
                text = rest;
            }
        }
        let mut normal = String::with_capacity(text.len() + SPACE.len());
        if text.is_empty() {
            return normal;
        }
        if self.add_dummy_prefix && !self.suffix {
            normal.push_str(self.space);
        }
        let mut after_space = self.remove_extra_whitespaces;
        while let Some((mut part, rest)) = prefix(text) {
            if after_space {
                part = part.trim_start_matches(' ');
            }
            if !part.is_empty() {
                part.split_inclusive(' ').for_each(|run| match run.strip_suffix(' ') {
                    Some(word) => normal.extend([word, self.space]),
                    None => normal.push_str(run),
                });
                after_space = self.remove_extra_whitespaces && part.ends_with(' ');
            }
            text = rest;
        }
        if self.remove_extra_whitespaces {
            normal.truncate(normal.trim_end_matches(self.space).len());
        }
        if self.add_dummy_prefix && self.suffix {
            normal.push_str(self.space);
        }
        normal
    }

    /// What the beginning of a text becomes, and the rest of the text.
    fn prefix<'a>(&'a self, text: &'a str, user: &impl Fn(&str) -> Option<usize>) -> Option<(&'a str, &'a str)> {
        let first = text.chars().next()?.len_utf8();
        if let Some(len) = user(text) {
            return text.split_at_checked(len);
        }
        match self.map.as_ref().and_then(|map| map.longest(text)) {
            // A map may end within a character; what is left of one is no text.
            Some((len, part)) => Some((part, text.get(len..).unwrap_or(&text[first..]))),
            None => text.split_at_checked(first),
        }
    }
}

impl Map {
    /// The length of the array in bytes, the array, and the replacements.
    fn read(bytes: &[u8]) -> Result<Self, String> {
        let (units, texts) = split(bytes).ok_or("the character map claims more than it has")?;
        let texts = str::from_utf8(texts).map_err(|error| format!("the character map's texts: {error}"))?;
        let units = units.chunks_exact(4).map(|unit| unit.iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte)));
        Ok(Self { units: units.collect(), texts: texts.to_owned() })
    }

    /// The longest beginning of `text` that has a replacement: its length and what it becomes.
    fn longest(&self, text: &str) -> Option<(usize, &str)> {
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let unit = |at: u32| self.units.get(at as usize).copied();
        let mut at = offset(unit(0)?);
        let mut found = None;
        for (index, byte) in text.bytes().enumerate() {
            at ^= u32::from(byte);
            let Some(node) = unit(at).filter(|node| node & ((1 << 31) | 0xFF) == u32::from(byte)) else { break };
            at ^= offset(node);
            if node >> 8 & 1 == 1 {
                found = unit(at).map(|value| (index + 1, value & !(1 << 31))).or(found);
            }
        }
        let (len, start) = found?;
        let texts = self.texts.get(start as usize..)?;
        Some((len, texts.split('\0').next().unwrap_or(texts)))
    }
}

/// The array and the texts of a character map, whose first four bytes claim the length of the array.
pub(super) fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u32::from_le_bytes(*len) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalizer(change: impl FnOnce(&mut Proto)) -> Normalizer {
        let mut proto = Proto::read(b"\x0A\x03\x0A\x01a").unwrap();
        change(&mut proto);
        Normalizer::new(&proto).unwrap()
    }

    // Of sentencepiece 0.2.3.
    #[test]
    fn white_space_is_rewritten_as_the_settings_say() {
        let plain = |text: &str, change: fn(&mut Proto)| normalizer(change).normalise(text, |_| None);
        assert_eq!(plain("  a  b ", |_| {}), "▁a▁b");
        assert_eq!(plain("   ", |_| {}), "");
        assert_eq!(plain("  a  b ", |proto| proto.remove_extra_whitespaces = false), "▁▁▁a▁▁b▁");
        assert_eq!(plain("a b", |proto| proto.add_dummy_prefix = false), "a▁b");
        assert_eq!(plain("a b", |proto| proto.escape_whitespaces = false), " a b");
        assert_eq!(plain("a b", |proto| proto.suffix = true), "a▁b▁");
    }

    #[test]
    fn a_user_s_symbol_is_left_as_it_is() {
        let user = |text: &str| text.starts_with("  ").then_some(2);
        assert_eq!(normalizer(|proto| proto.remove_extra_whitespaces = false).normalise("a  b", user), "▁a▁▁b");
    }

    #[test]
    fn a_damaged_map_is_an_error_or_maps_nothing() {
        let read = |bytes: &[u8]| {
            let mut proto = Proto::read(b"\x0A\x03\x0A\x01a").unwrap();
            proto.charsmap = bytes.to_vec();
            Normalizer::new(&proto).map(|normalizer| normalizer.normalise("aé", |_| None))
        };
        assert!(read(b"\xFF\xFF\xFF\xFFabc").unwrap_err().contains("claims more"));
        assert!(read(b"\0").is_err());
        assert!(read(b"\0\0\0\0\xFF").unwrap_err().contains("utf-8"));
        for bytes in [&b"\0\0\0\0"[..], b"\x08\0\0\0\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", b"\x04\0\0\0\0\0\0\0a"] {
            assert_eq!(read(bytes).unwrap(), "▁aé");
        }
    }
}
