//! Where the tensors lie in a file of `torch.save`: a zip archive, or before version 1.6 a row of pickles. No code is run, and
//! the values stay where they are, so the file can be mapped.

use super::pickle::{Pickled, Storage, Unpickler};
use safetensors::Dtype;
use std::{collections::HashMap, ops::Range, rc::Rc};

/// A tensor and its place in the file.
#[derive(Debug, PartialEq)]
pub(super) struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Range<usize>,
}

/// How the older files begin: a pickled number that stands for PyTorch.
const MAGIC: [u8; 15] = [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// The tensors of a state dict.
pub(super) fn tensors(file: &[u8]) -> Result<Vec<Tensor>, String> {
    if file.starts_with(&MAGIC) {
        return row(file);
    }
    let files = archive(file).ok_or("it is neither a file of torch.save nor whole")?;
    let pickle = files.keys().find(|name| name.ends_with("/data.pkl")).ok_or("the archive has no data.pkl: it is no file of torch.save")?;
    let folder = pickle.trim_end_matches("data.pkl");
    if let Some(order) = files.get(format!("{folder}byteorder").as_str())
        && file[order.clone()] != *b"little"
    {
        return Err("its numbers are big-endian, which is not read".into());
    }
    let named = Unpickler::new(&file[files[pickle].clone()]).tensors()?;
    named.iter().map(|(name, tensor)| place(name, tensor, files.get(format!("{folder}data/{}", tensor.storage.key).as_str()))).collect()
}

/// The older form: the magic number, a version, facts about the machine, the state dict, the storages' keys, the storages.
fn row(file: &[u8]) -> Result<Vec<Tensor>, String> {
    let mut pickles = Unpickler::new(&file[MAGIC.len()..]);
    pickles.skip()?;
    pickles.skip()?;
    let named = pickles.tensors()?;
    let dtypes: HashMap<Rc<str>, Rc<Storage>> = pickles.storages.iter().map(|storage| (storage.key.clone(), storage.clone())).collect();
    let keys = pickles.names()?;
    let mut at = file.len() - pickles.rest().len();
    let mut places = HashMap::new();
    for key in keys {
        let dtype = dtypes.get(&key).ok_or_else(|| format!("storage {key} has no type"))?.dtype;
        let head = file.get(at..).and_then(|rest| rest.first_chunk()).ok_or_else(|| format!("storage {key} is cut off"))?;
        let start = at + size_of::<u64>();
        let end = usize::try_from(u64::from_le_bytes(*head)).ok().and_then(|len| len.checked_mul(width(dtype))?.checked_add(start));
        at = end.filter(|&end| end <= file.len()).ok_or_else(|| format!("storage {key} is cut off"))?;
        places.insert(key, start..at);
    }
    named.iter().map(|(name, tensor)| place(name, tensor, places.get(&tensor.storage.key))).collect()
}

/// A tensor's place within that of its storage.
fn place(name: &str, tensor: &Pickled, storage: Option<&Range<usize>>) -> Result<Tensor, String> {
    let Pickled { storage: held, offset, shape, stride } = tensor;
    let storage = storage.ok_or_else(|| format!("tensor {name} lies in storage {}, which is not there", held.key))?;
    let count = shape.iter().try_fold(1u64, |count, &len| count.checked_mul(len));
    let count = count.filter(|_| shape.len() == stride.len()).ok_or_else(|| format!("tensor {name} has the shape {shape:?}"))?;
    let mut step = 1u64;
    for (&len, &stride) in shape.iter().zip(stride).rev() {
        if len > 1 && count > 0 && stride != step {
            return Err(format!("tensor {name} of shape {shape:?} does not lie in a row; save a contiguous copy of it"));
        }
        step = step.saturating_mul(len.max(1));
    }
    let bytes = |values: u64| usize::try_from(values).ok()?.checked_mul(width(held.dtype));
    let range = bytes(*offset).zip(bytes(count)).and_then(|(offset, len)| {
        let start = storage.start.checked_add(offset)?;
        Some(start..start.checked_add(len)?)
    });
    let range = range.filter(|range| range.end <= storage.end).ok_or_else(|| format!("tensor {name} ends after its storage"))?;
    Ok(Tensor { name: name.to_owned(), dtype: held.dtype, shape: shape.iter().map(|&len| len as usize).collect(), bytes: range })
}

fn width(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// The files in a zip archive that are not compressed, with their places; none if it is no whole archive.
fn archive(file: &[u8]) -> Option<HashMap<&str, Range<usize>>> {
    // At the end, before a comment of at most 64 kB, is where the directory begins; numbers of all ones are in a second
    // record, in eight bytes.
    let tail = file.len().saturating_sub(22 + 0xffff);
    let end = tail + file.get(tail..)?.windows(4).rposition(|bytes| bytes == b"PK\x05\x06")?;
    let mut at = number(file, end.checked_add(16)?, 4)?;
    if at == 0xffff_ffff {
        let locator = end.checked_sub(20)?;
        let second = number(file, locator + 8, 8).filter(|_| file[locator..].starts_with(b"PK\x06\x07"))?;
        at = number(file, second.checked_add(48)?, 8)?;
    }
    let mut files = HashMap::new();
    while file.get(at..)?.starts_with(b"PK\x01\x02") {
        let field = |offset: usize, len| number(file, at.checked_add(offset)?, len);
        let (method, name, extra, comment) = (field(10, 2)?, field(28, 2)?, field(30, 2)?, field(32, 2)?);
        let (mut packed, mut size, mut local) = (field(20, 4)?, field(24, 4)?, field(42, 4)?);
        let rest = at + 46;
        let mut fields = file.get(rest + name..rest + name + extra)?;
        while let Some((head, body)) = fields.split_first_chunk::<4>() {
            let [kind, len] = [[head[0], head[1]], [head[2], head[3]]].map(u16::from_le_bytes);
            let (mut body, next) = body.split_at_checked(len.into())?;
            if kind == 1 {
                for value in [&mut size, &mut packed, &mut local] {
                    if *value == 0xffff_ffff {
                        *value = number(body, 0, 8)?;
                        body = &body[8..];
                    }
                }
            }
            fields = next;
        }
        // The file's own header repeats its name, with other extra fields.
        let header = |offset: usize| number(file, local.checked_add(offset)?, 2);
        let start = local.checked_add(30 + header(26)? + header(28)?)?;
        let range = start..start.checked_add(size)?;
        if range.end > file.len() || !file.get(local..)?.starts_with(b"PK\x03\x04") {
            return None;
        }
        if method == 0 && packed == size {
            files.insert(str::from_utf8(file.get(rest..rest + name)?).ok()?, range);
        }
        at = rest + name + extra + comment;
    }
    Some(files)
}

/// A number of up to eight bytes, the lowest first.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    usize::try_from(bytes.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte))).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::models::pickle::Unpickler;

    fn golden(name: &str) -> Vec<u8> {
        std::fs::read(format!("tests/golden/{name}")).unwrap()
    }

    const FILES: [&str; 3] = [
        "gpt2-bin/pytorch_model.bin",
        "gpt2-bin-sharded/pytorch_model-00001-of-00003.bin",
        "gpt2-bin-sharded/pytorch_model-00002-of-00003.bin",
    ];

    #[test]
    fn both_forms_are_read() {
        let file = golden(FILES[0]);
        let tensors = tensors(&file).unwrap();
        let found = |name: &str| tensors.iter().find(|tensor| tensor.name.ends_with(name)).unwrap();
        assert_eq!((found("h.0.attn.bias").dtype, &found("h.0.attn.bias").shape[..]), (Dtype::BOOL, &[1, 1, 4, 4][..]));
        assert_eq!(file[found("h.0.attn.bias").bytes.clone()], [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]);
        assert_eq!(
            (found("masked_bias").shape.len(), file[found("masked_bias").bytes.clone()].to_vec()),
            (0, (-1e4f32).to_le_bytes().to_vec())
        );
        assert_eq!((found("wte.weight").dtype, &found("wte.weight").shape[..]), (Dtype::BF16, &[101, 36][..]));

        let file = golden(FILES[1]);
        assert!(file.starts_with(&MAGIC));
        let tensors = super::tensors(&file).unwrap();
        assert!(tensors.len() > 3 && tensors.iter().all(|tensor| tensor.dtype == Dtype::F16));
        assert!(tensors.windows(2).all(|pair| pair[0].bytes.end == pair[1].bytes.start), "all of them lie in one storage");
    }

    #[test]
    fn damage_is_an_error_or_leads_to_bytes_in_the_file() {
        let check = |file: &[u8]| {
            for tensor in tensors(file).unwrap_or_default() {
                assert!(file.get(tensor.bytes).is_some());
            }
        };
        for name in FILES {
            let mut file = golden(name);
            for len in (0..file.len()).step_by(97) {
                assert!(tensors(&file[..len]).is_err(), "{name} of {len} bytes");
            }
            // Every byte of the descriptions: they lie at the beginning and, of an archive, at the end.
            let (len, values) = (file.len(), file.len() / 2);
            for at in (0..4000.min(len)).chain(len.saturating_sub(4000)..len).chain([values]) {
                for wrong in [0, 0x7f, 0xff, file[at] ^ 1] {
                    let right = std::mem::replace(&mut file[at], wrong);
                    check(&file);
                    file[at] = right;
                }
            }
        }
    }

    #[test]
    fn hostile_pickles_end_in_errors() {
        let read = |pickle: &[u8]| Unpickler::new(pickle).tensors().map(|tensors| tensors.len());
        // A pair of pairs of pairs: 2 to the power of 30 values, if each were a copy.
        let laughs = [b"N".to_vec(), b"q\0h\0\x86".repeat(30), b".".to_vec()].concat();
        assert!(read(&laughs).unwrap_err().contains("nests more than 16 tuples"));
        let nest = [b"N".to_vec(), vec![0x85; 1 << 20], b".".to_vec()].concat();
        assert!(read(&nest).unwrap_err().contains("nests"));
        for (pickle, part) in [
            (&b""[..], "ends in the middle"),
            (b".", "empty stack"),
            (b"N.", "no dict of tensors"),
            (b"X\xff\xff\xff\xffa.", "ends in the middle"),
            (b"t", "empty stack"),
            (b"\x87", "empty stack"),
            (b"h\0.", "recalls value 0"),
            (b"Na.", "no list"),
            (b"NNa.", "no list"),
            (b"(NNe.", "no list"),
            (b"]NNs.", "no dict"),
            (b"X\x01\0\0\0\xff.", "not UTF-8"),
            (b"\x8f.", "the code 0x8f"),
        ] {
            let error = read(pickle).unwrap_err();
            assert!(error.contains(part), "{pickle:?}: {error}");
        }
        // What would run a program elsewhere is a value without a meaning here.
        assert_eq!(read(b"}X\x01\0\0\0acos\nsystem\nX\x02\0\0\0ls\x85Rs."), Ok(0));
    }

    #[test]
    fn places_are_checked() {
        let storage = Rc::new(Storage { key: "0".into(), dtype: Dtype::F32, len: 6 });
        let put = |offset, shape: &[u64], stride: &[u64]| {
            let tensor = Pickled { storage: storage.clone(), offset, shape: shape.to_vec(), stride: stride.to_vec() };
            place("t", &tensor, Some(&(100..124))).map(|tensor| tensor.bytes)
        };
        assert_eq!(put(0, &[2, 3], &[3, 1]), Ok(100..124));
        assert_eq!(put(2, &[4, 1], &[1, 99]), Ok(108..124));
        assert_eq!(put(6, &[0, 3], &[9, 9]), Ok(124..124));
        assert_eq!(put(5, &[], &[]), Ok(120..124));
        assert!(put(0, &[3, 2], &[1, 3]).unwrap_err().contains("does not lie in a row"));
        assert!(put(1, &[2, 3], &[3, 1]).unwrap_err().contains("ends after its storage"));
        assert!(put(0, &[2], &[]).unwrap_err().contains("shape"));
        for huge in [&[1 << 63, 4][..], &[u64::MAX], &[1 << 62]] {
            assert!(put(0, huge, &vec![1; huge.len()]).is_err());
            assert!(put(u64::MAX, huge, &vec![1; huge.len()]).is_err());
        }
    }
}
