//! SentencePiece models that the reference turns into tokenizers of the `tokenizers` crate.

use super::{
    Class,
    model::Sorted,
    normal::{self, SPACE},
    proto::{Algorithm, Kind, Proto},
    role,
};
use crate::{
    error::{Error, Result},
    text::{
        files::{self, flag},
        tokenizer::guard,
    },
};
use serde_json::{Map, Value, json};
use std::path::Path;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    models::{
        bpe::{self, BPE},
        unigram::Unigram,
    },
    normalizers::{Precompiled, Sequence},
};

/// Tokens that PEGASUS has before its pieces, besides those with a name.
const PEGASUS_OFFSET: u64 = 103;
/// Sentinels of T5.
const T5_EXTRA_IDS: u64 = 100;
/// More than any vocabulary has of these.
const MOST_EXTRA: u64 = 1 << 16;

/// Puts a tokenizer together, and what frames a text unless languages do.
pub(super) fn build(
    class: Class,
    proto: &Proto,
    folder: &Path,
    config: &Map<String, Value>,
    path: &Path,
) -> Result<(Tokenizer, Option<PostProcessorWrapper>)> {
    let failed = |reason: String| Error::load(path, reason);
    let parts = Parts { class, proto, config };
    let mut inner = parts.model().map_err(failed)?;
    let normalizer = parts.normalizer().map_err(failed)?;
    guard(|| inner.with_normalizer(normalizer).map(|_| ())).map_err(failed)?;
    inner.with_pre_tokenizer(part::<PreTokenizerWrapper>(parts.pre_tokenizer()).map_err(failed)?);
    inner.with_decoder(part::<DecoderWrapper>(parts.decoder()).map_err(failed)?);

    let codes: Vec<_> = class.codes(config).into_iter().map(|code| AddedToken::from(code, true)).collect();
    // HF: an NLLB model without tokenizer.json has no languages there; its weights have them between the pieces and the mask.
    guard(|| inner.add_tokens(codes)).map_err(failed)?;
    let named = files::added(folder, config, false)?;
    let mask = config.get("mask_token").and_then(Value::as_str).filter(|_| matches!(class, Class::MBart | Class::MBart50 | Class::Nllb));
    let named = named.into_iter().map(|token| match Some(token.content.as_str()) == mask {
        true => token.lstrip(true).normalized(class == Class::Nllb),
        false => token,
    });
    let named: Vec<_> = named.collect();
    guard(|| inner.add_tokens(named.iter().cloned())).map_err(failed)?;
    let mut tokens: Vec<_> = parts.specials().map_err(failed)?.into_iter().map(|token| AddedToken::from(token, true)).collect();
    // HF: control tokens and users' symbols are cut out of a text only if the config names no further tokens itself.
    if ["additional_special_tokens", "extra_special_tokens"].iter().all(|key| config.get(*key).is_none_or(Value::is_null)) {
        let pieces = proto.pieces.iter().filter(|piece| matches!(piece.kind, Kind::Control | Kind::UserDefined));
        tokens.extend(pieces.map(|piece| AddedToken::from(piece.text.clone(), piece.kind == Kind::Control).normalized(false)));
    }
    tokens.retain(|token| inner.token_to_id(&token.content).is_some() && !named.iter().any(|other| other.content == token.content));
    guard(|| inner.add_tokens(tokens)).map_err(failed)?;
    let frame = match class {
        Class::T5 | Class::Pegasus => {
            let eos = role(config, "eos_token").unwrap_or_else(|| "</s>".into());
            let id =
                inner.token_to_id(&eos).ok_or_else(|| failed(format!("it lacks the end token {eos:?}; a model with it is accepted")))?;
            let template = [json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"SpecialToken": {"id": eos, "type_id": 0}})];
            let known = json!({&eos: {"id": eos, "ids": [id], "tokens": [eos]}});
            Some(json!({"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": known}))
        }
        _ => files::frame(&inner, config),
    };
    let frame = part(frame).map_err(failed)?;
    Ok((inner, frame))
}

/// Reads a part of a tokenizer.
fn part<T: serde::de::DeserializeOwned>(json: Option<Value>) -> Result<Option<T>, String> {
    json.map(|json| serde_json::from_value(json).map_err(|error| error.to_string())).transpose()
}

struct Parts<'a> {
    class: Class,
    proto: &'a Proto,
    config: &'a Map<String, Value>,
}

impl Parts<'_> {
    fn role(&self, name: &str) -> String {
        let usual = || self.class.roles().iter().find(|(role, _)| *role == name).map_or("", |(_, token)| token).to_owned();
        role(self.config, name).unwrap_or_else(usual)
    }

    /// A number of tokens that the config asks for.
    fn count(&self, name: &str, usual: u64) -> Result<u64, String> {
        match self.config.get(name) {
            None | Some(Value::Null) => Ok(usual),
            Some(value) => value
                .as_u64()
                .filter(|&count| count <= MOST_EXTRA)
                .ok_or_else(|| format!("tokenizer_config.json: {name} = {value}; accepted is an integer from 0 to {MOST_EXTRA}")),
        }
    }

    fn model(&self) -> Result<Tokenizer, String> {
        let Self { class, proto, .. } = *self;
        let unigram = |vocab: Vec<(String, f64)>, unk: usize, bytes| guard(|| Unigram::from(vocab, Some(unk), bytes)).map(Tokenizer::new);
        let from = |start: usize| {
            let pieces = proto.pieces.get(start..).unwrap_or_default();
            pieces.iter().map(|piece| (piece.text.clone(), f64::from(piece.score)))
        };
        let zeros = |tokens: Vec<String>| tokens.into_iter().map(|token| (token, 0.0));
        match class {
            Class::T5 => unigram(from(0).chain(zeros(self.specials()?)).collect(), 2, false),
            Class::MBart | Class::MBart50 => {
                let codes = class.codes(self.config).into_iter().map(str::to_owned).chain([self.role("mask_token")]).collect();
                unigram(zeros(self.fairseq()).chain(from(3)).chain(zeros(codes)).collect(), 3, false)
            }
            Class::Pegasus => {
                let ends = vec![self.role("pad_token"), self.role("eos_token")];
                let unused = self.specials()?.into_iter().map(|token| (token, -100.0));
                let vocab: Vec<_> = zeros(ends).chain(unused).chain(from(2)).collect();
                let unk = self.role("unk_token");
                let unk = vocab.iter().position(|(token, _)| *token == unk).ok_or_else(|| format!("it lacks the unknown piece {unk:?}"))?;
                unigram(vocab, unk, false)
            }
            Class::Plain if proto.algorithm == Algorithm::Unigram => {
                let unk = usize::try_from(proto.unk_id).map_err(|_| format!("unk_id = {}; accepted is the id of a piece", proto.unk_id))?;
                unigram(from(0).collect(), unk, proto.byte_fallback)
            }
            Class::Nllb => {
                let known = self.fairseq();
                let rest = proto.pieces.iter().map(|piece| piece.text.clone()).filter(|piece| !known.contains(piece));
                self.bpe(known.iter().cloned().chain(rest).collect(), Some(self.role("unk_token")), false)
            }
            Class::Llama => self.bpe(self.pieces(), None, true),
            Class::Gemma => self.bpe(self.pieces(), Some(self.role("unk_token")), true),
            _ => self.bpe(self.pieces(), Some(proto.unk_piece.clone()), proto.byte_fallback),
        }
    }

    /// A model that merges what makes a piece, a piece of a lower id first.
    fn bpe(&self, vocab: Vec<String>, unk: Option<String>, bytes: bool) -> Result<Tokenizer, String> {
        let sorted = Sorted::new(vocab.iter().cloned().zip(0..))?;
        let mut merges = Vec::new();
        for piece in self.proto.pieces.iter().map(|piece| &piece.text) {
            for (len, _) in sorted.prefixes(piece).filter(|(len, _)| *len < piece.len()) {
                let (left, right) = piece.split_at(len);
                if sorted.id(right).is_some() {
                    merges.push((left.to_owned(), right.to_owned()));
                }
            }
        }
        let vocab: bpe::Vocab = vocab.into_iter().zip(0..).collect();
        let mut builder = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(bytes);
        if let Some(unk) = unk {
            builder = builder.unk_token(unk);
        }
        guard(|| builder.build()).map(Tokenizer::new)
    }

    /// The pieces; those that the config gives another text have it.
    fn pieces(&self) -> Vec<String> {
        let mut pieces: Vec<_> = self.proto.pieces.iter().map(|piece| piece.text.clone()).collect();
        if let (Class::Plain, Some(Value::Object(tokens))) = (self.class, self.config.get("added_tokens_decoder")) {
            for (id, token) in tokens {
                let text = token.get("content").and_then(Value::as_str).filter(|text| !pieces.iter().any(|piece| piece == text));
                if let (Some(text), Some(piece)) = (text, id.parse().ok().and_then(|id: usize| pieces.get_mut(id))) {
                    text.clone_into(piece);
                }
            }
        }
        pieces
    }

    /// What fairseq has before the pieces.
    fn fairseq(&self) -> Vec<String> {
        let first = if self.class == Class::MBart50 { "cls_token" } else { "bos_token" };
        [first, "pad_token", "eos_token", "unk_token"].map(|role| self.role(role)).to_vec()
    }

    /// Special tokens that the class adds to the pieces, in the order of their ids.
    fn specials(&self) -> Result<Vec<String>, String> {
        Ok(match self.class {
            Class::T5 => (0..self.count("extra_ids", T5_EXTRA_IDS)?).rev().map(|index| format!("<extra_id_{index}>")).collect(),
            Class::Pegasus => {
                // HF: with a mask_token in special_tokens_map.json the reference leaves out one of the masks, and moves all ids by one.
                let masks = match self.config.get("mask_token_sent") {
                    None => vec!["<mask_1>".to_owned(), self.role("mask_token")],
                    Some(sentences) => {
                        sentences.as_str().map(|token| [token.to_owned(), self.role("mask_token")]).into_iter().flatten().collect()
                    }
                };
                let unused = (2..self.count("offset", PEGASUS_OFFSET)?).map(|index| format!("<unk_{index}>"));
                masks.into_iter().chain(unused).collect()
            }
            _ => Vec::new(),
        })
    }

    fn normalizer(&self) -> Result<Option<NormalizerWrapper>, String> {
        let map = (!self.proto.charsmap.is_empty()).then_some(&self.proto.charsmap[..]);
        let one_space = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "});
        let escape = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let (map, rest) = match self.class {
            Class::T5 => (map, vec![]),
            Class::Nllb if map.is_none() => (None, vec![]),
            Class::MBart50 | Class::Nllb => (map, vec![one_space]),
            Class::Pegasus if map.is_some() => (map, vec![one_space]),
            Class::Pegasus => (None, vec![json!({"type": "Replace", "pattern": {"Regex": "\\n"}, "content": " "}), one_space]),
            Class::Gemma => (None, vec![escape]),
            Class::Plain => (map, vec![escape]),
            // HF: of mbart's own character map the reference makes nothing.
            _ => (None, vec![]),
        };
        let mut list = Vec::new();
        if let Some(map) = map {
            // The crate believes the length that the map claims.
            normal::split(map).ok_or("the character map claims more than it has")?;
            let map = Precompiled::from(map).map_err(|error| error.to_string())?;
            list.push(NormalizerWrapper::Precompiled(map));
        }
        for normalizer in rest {
            list.extend(part::<NormalizerWrapper>(Some(normalizer))?);
        }
        Ok(if list.is_empty() { None } else { Some(Sequence::new(list).into()) })
    }

    fn pre_tokenizer(&self) -> Option<Value> {
        let space = |scheme, split| json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split});
        match self.class {
            Class::T5 | Class::MBart => {
                Some(json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space("always", true)]}))
            }
            Class::MBart50 | Class::Nllb | Class::Pegasus => Some(space("always", true)),
            Class::Llama if !self.prefixes() => Some(space("never", false)),
            Class::Llama => Some(space(if flag(self.config, "legacy") { "always" } else { "first" }, false)),
            Class::Gemma => Some(json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false})),
            // HF: a model's own dummy prefix is not obeyed.
            _ => None,
        }
    }

    fn decoder(&self) -> Option<Value> {
        let space = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let list = match self.class {
            Class::T5 | Class::MBart | Class::MBart50 | Class::Nllb | Class::Pegasus => {
                return Some(json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": true}));
            }
            Class::Llama if self.prefixes() => vec![space, bytes, fuse, json!({"type": "Strip", "content": " ", "start": 1, "stop": 0})],
            Class::Plain if !self.proto.byte_fallback => vec![space],
            _ => vec![space, bytes, fuse],
        };
        Some(json!({"type": "Sequence", "decoders": list}))
    }

    /// Whether Llama puts a space before a text.
    fn prefixes(&self) -> bool {
        self.config.get("add_prefix_space") != Some(&Value::Bool(false))
    }
}
