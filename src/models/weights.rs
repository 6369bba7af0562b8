//! The tensors of a checkpoint folder, memory-mapped, found by name and checked against the shape that `config.json` implies.

use super::bin;
use crate::{
    error::{Error, Result},
    kernels::Matrix,
};
use candle_core::DType;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    ops::Range,
    path::{Component, Path, PathBuf},
};

/// The tensors of a checkpoint.
#[derive(Debug)]
pub(crate) struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    entries: HashMap<String, Entry>,
    /// What a missing tensor is blamed on: the only file, or the index of the shards.
    source: PathBuf,
    /// The base model's name with its dot. Checkpoints of the base model alone, like the published gpt2, leave it out.
    base: &'static str,
}

/// Where a tensor is.
#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Weights {
    /// Maps the first of `model.safetensors`, the shards that `model.safetensors.index.json` lists, and the same of
    /// `pytorch_model.bin`.
    pub fn open(folder: &Path, base: &'static str) -> Result<Self> {
        for name in ["model.safetensors", "pytorch_model.bin"] {
            let (single, index) = (folder.join(name), folder.join(format!("{name}.index.json")));
            if single.is_file() {
                let mut weights = Self { files: Vec::new(), entries: HashMap::new(), source: single.clone(), base };
                weights.add(single)?;
                return Ok(weights);
            }
            if index.is_file() {
                return Self::sharded(folder, index, base);
            }
        }
        let reason = "neither model.safetensors nor pytorch_model.bin is there, nor an index of shards; other formats are not read";
        Err(Error::load(folder, reason))
    }

    fn sharded(folder: &Path, index: PathBuf, base: &'static str) -> Result<Self> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read(&index).map_err(|error| Error::load(&index, error))?;
        let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| Error::load(&index, error))?;
        let mut weights = Self { files: Vec::new(), entries: HashMap::new(), source: index.clone(), base };
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            // An index comes from strangers: it must not make us read other files than the checkpoint's.
            if shard.is_empty() || !Path::new(shard).components().all(|part| matches!(part, Component::Normal(_))) {
                return Err(Error::load(&index, format!("shard {shard:?} is outside the folder")));
            }
            weights.add(folder.join(shard))?;
        }
        for (tensor, shard) in &weight_map {
            if weights.entries.get(tensor).is_none_or(|entry| weights.path(entry) != folder.join(shard)) {
                return Err(Error::load(folder.join(shard), format!("tensor {tensor} is missing, which the index says is there")));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|error| Error::load(&path, error))?;
        // SAFETY: the map is read-only and lives as long as its file is open to us. Whoever changes a checkpoint in place
        // while it is being loaded gets wrong weights or a bus error; no safetensors reader that maps files is spared that.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::load(&path, error))?;
        let file = self.files.len();
        if path.extension().is_some_and(|extension| extension == "bin") {
            for bin::Tensor { name, dtype, shape, bytes } in bin::tensors(&map).map_err(|reason| Error::load(&path, reason))? {
                self.entries.insert(name, Entry { file, dtype, shape, bytes });
            }
        } else {
            let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| Error::load(&path, error))?;
            let start = header + size_of::<u64>();
            for (name, info) in metadata.tensors() {
                let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
                self.entries.insert(name, Entry { file, dtype: info.dtype, shape: info.shape.clone(), bytes });
            }
        }
        self.files.push((path, map));
        Ok(())
    }

    /// Lets go of bytes that were read, so that a file is not in memory beside the weights made of it. Whoever reads them again
    /// reads them from the file.
    #[cfg_attr(not(unix), allow(unused_variables))]
    pub fn forget(&self, bytes: &[u8]) {
        /// The system maps more than what is read, on both sides, and so what was let go of already: at most a large page.
        #[cfg(unix)]
        const MORE: usize = 2 << 20;
        #[cfg(unix)]
        for (_, map) in &self.files {
            let place = (bytes.as_ptr() as usize).wrapping_sub(map.as_ptr() as usize);
            if place < map.len() {
                let (start, end) = (place.saturating_sub(MORE), map.len().min(place + bytes.len() + MORE));
                // SAFETY: a page of a read-only map of a file that is given back is read from the file anew, with the same bytes
                // unless somebody changes the file, of which `add` speaks. The range is within the map. Where the system refuses,
                // nothing happens.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }

    /// Bytes of all tensors.
    pub fn len(&self) -> u64 {
        self.entries.values().map(|entry| entry.bytes.len() as u64).sum()
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.entry(name).is_ok()
    }

    /// Whether two tensors have the same type, shape and values.
    pub fn equal(&self, one: &str, other: &str) -> Result<bool> {
        let (one, other) = (self.entry(one)?.1, self.entry(other)?.1);
        Ok(one.dtype == other.dtype && one.shape == other.shape && self.bytes(one) == self.bytes(other))
    }

    /// A matrix of `outputs` times `inputs`; `transposed` if the file has it as `(inputs, outputs)`.
    pub fn matrix(&self, name: &str, outputs: usize, inputs: usize, transposed: bool) -> Result<Matrix<'_>> {
        let shape = if transposed { [inputs, outputs] } else { [outputs, inputs] };
        let (dtype, bytes) = self.tensor(name, &shape)?;
        Ok(Matrix { bytes, dtype, outputs, inputs, transposed })
    }

    /// A vector of `len` values, widened.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.values(name, &[len])
    }

    /// All values of a tensor, widened.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (dtype, bytes) = self.tensor(name, shape)?;
        Ok(match dtype {
            DType::BF16 => bytes.as_chunks().0.iter().map(|&value| bf16::from_le_bytes(value).to_f32()).collect(),
            DType::F16 => bytes.as_chunks().0.iter().map(|&value| f16::from_le_bytes(value).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect(),
        })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<(DType, &[u8])> {
        let (name, entry) = self.entry(name)?;
        let reason = |found: String, accepted: String| Error::load(self.path(entry), format!("tensor {name} {found}; {accepted}"));
        if entry.shape != shape {
            return Err(reason(format!("has shape {:?}", entry.shape), format!("by config.json it should be {shape:?}")));
        }
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => return Err(reason(format!("has type {other:?}"), "F32, BF16 and F16 are accepted".into())),
        };
        Ok((dtype, self.bytes(entry)))
    }

    fn entry(&self, name: &str) -> Result<(String, &Entry)> {
        // Of two names, as in `model.decoder.`, the first may be missing too.
        let inner = self.base.split_once('.').map_or("", |(_, inner)| inner);
        let names = [self.base, inner, ""].map(|base| format!("{base}{name}"));
        match names.into_iter().find_map(|name| self.entries.get_key_value(&name)) {
            Some((name, entry)) => Ok((name.clone(), entry)),
            None => Err(Error::load(&self.source, format!("tensor {name} is missing, with and without {:?} before it", self.base))),
        }
    }

    fn path(&self, entry: &Entry) -> &Path {
        &self.files[entry.file].0
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        // Inside the map: whoever read the header checked every offset against the file's length.
        &self.files[entry.file].1[entry.bytes.clone()]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::models::{LoadOptions, load, tiny};
    use serde_json::json;
    use tempfile::TempDir;

    const NORM: &str = "model.layers.1.input_layernorm.weight";
    const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

    /// A tiny llama whose tensors were changed.
    fn changed(change: impl FnOnce(&mut tiny::Tensors)) -> TempDir {
        let config = tiny::config("llama");
        let folder = tiny::write(&config, Dtype::F32);
        let mut tensors = tiny::tensors(&config);
        change(&mut tensors);
        tiny::save(&folder.path().join("model.safetensors"), &tensors, Dtype::F32);
        folder
    }

    /// A tiny llama in two shards, and the index's map.
    fn sharded() -> (TempDir, BTreeMap<String, String>) {
        let folder = tiny::folder("llama");
        let mut one = tiny::tensors(&tiny::config("llama"));
        let two = one.split_off(NORM);
        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        let mut map = BTreeMap::new();
        for (tensors, shard) in [(one, "model-1.safetensors"), (two, "model-2.safetensors")] {
            tiny::save(&folder.path().join(shard), &tensors, Dtype::F32);
            map.extend(tensors.into_keys().map(|name| (name, shard.to_owned())));
        }
        write_index(&folder, &map);
        (folder, map)
    }

    fn write_index(folder: &TempDir, map: &BTreeMap<String, String>) {
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    /// Why a folder does not load, with the file that is named.
    #[track_caller]
    fn refusal(folder: &TempDir) -> (String, String) {
        match load(folder.path(), &LoadOptions::default()).err() {
            Some(Error::Load { path, reason }) => (path.file_name().unwrap().to_str().unwrap().to_owned(), reason),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refused(folder: &TempDir, file: &str, reason: &str) {
        assert_eq!(refusal(folder), (file.to_owned(), reason.to_owned()));
    }

    fn opens(folder: &TempDir) -> bool {
        load(folder.path(), &LoadOptions::default()).is_ok()
    }

    #[test]
    fn vectors_and_matrices_of_every_type() {
        let tensors = BTreeMap::from([("m".to_owned(), (vec![2, 1], vec![1.5, -2.0])), ("v".to_owned(), (vec![3], vec![0.25, 3.0, -1.0]))]);
        for (dtype, candle, bytes) in [
            (Dtype::F32, DType::F32, &[0, 0, 0xc0, 0x3f, 0, 0, 0, 0xc0][..]),
            (Dtype::BF16, DType::BF16, &[0xc0, 0x3f, 0, 0xc0]),
            (Dtype::F16, DType::F16, &[0, 0x3e, 0, 0xc0]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            tiny::save(&folder.path().join("model.safetensors"), &tensors, dtype);
            let weights = Weights::open(folder.path(), "").unwrap();
            assert_eq!(weights.vector("v", 3).unwrap(), [0.25, 3.0, -1.0]);
            let matrix = weights.matrix("m", 2, 1, false).unwrap();
            assert_eq!((matrix.bytes, matrix.dtype, matrix.outputs, matrix.inputs), (bytes, candle, 2, 1));
            let matrix = weights.matrix("m", 1, 2, true).unwrap();
            assert_eq!((matrix.bytes, matrix.outputs, matrix.inputs, matrix.transposed), (bytes, 1, 2, true));
            assert_eq!(weights.len(), 5 * bytes.len() as u64 / 2);
        }
    }

    #[test]
    fn a_file_at_odd_offsets_loads() {
        // A header of an odd length, as its padding is not required, puts every value across word borders.
        let folder = tiny::folder("llama");
        let path = folder.path().join("model.safetensors");
        let file = std::fs::read(&path).unwrap();
        let (len, rest) = file.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
        let shifted = [&(header.len() as u64 + 1).to_le_bytes()[..], header, b" ", data].concat();
        std::fs::write(&path, shifted).unwrap();
        assert!(opens(&folder));
    }

    #[test]
    fn names_may_lack_the_base_and_extra_tensors_are_ignored() {
        let bare = |tensors: &mut tiny::Tensors| {
            *tensors = std::mem::take(tensors).into_iter().map(|(name, tensor)| (name.replace("model.", ""), tensor)).collect();
            tensors.insert("rotary_emb.inv_freq".into(), (vec![0, 7], vec![]));
        };
        assert!(opens(&changed(bare)));
    }

    #[test]
    fn names_may_lack_the_first_part_of_the_base() {
        let config = tiny::config("opt-post");
        let folder = tiny::write(&config, Dtype::F32);
        let tensors = tiny::tensors(&config).into_iter().map(|(name, tensor)| (name.replace("model.decoder.", "decoder."), tensor));
        tiny::save(&folder.path().join("model.safetensors"), &tensors.collect(), Dtype::F32);
        assert!(opens(&folder));
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let reason = r#"tensor layers.1.mlp.down_proj.weight is missing, with and without "model." before it"#;
        refused(&changed(|tensors| drop(tensors.remove(DOWN))), "model.safetensors", reason);
    }

    #[test]
    fn a_wrong_shape_is_named() {
        let reason = format!("tensor {DOWN} has shape [48, 32]; by config.json it should be [32, 48]");
        refused(&changed(|tensors| tensors.get_mut(DOWN).unwrap().0.reverse()), "model.safetensors", &reason);
        let reason = format!("tensor {NORM} has shape [32, 1]; by config.json it should be [32]");
        refused(&changed(|tensors| tensors.get_mut(NORM).unwrap().0.push(1)), "model.safetensors", &reason);
    }

    #[test]
    fn a_type_without_arithmetic_is_named() {
        for dtype in [Dtype::I64, Dtype::U8, Dtype::F64, Dtype::F8_E4M3] {
            let folder = tiny::write(&tiny::config("llama"), dtype);
            let reason = format!("tensor model.embed_tokens.weight has type {dtype:?}; F32, BF16 and F16 are accepted");
            refused(&folder, "model.safetensors", &reason);
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        let folder = tiny::folder("llama");
        let path = folder.path().join("model.safetensors");
        let file = std::fs::read(&path).unwrap();
        for len in [0, 4, 8, 100, file.len() / 2, file.len() - 1] {
            std::fs::write(&path, &file[..len]).unwrap();
            assert_eq!(refusal(&folder).0, "model.safetensors", "{len} bytes");
        }
        let lie = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
        for lying in [
            u64::MAX.to_le_bytes().to_vec(),
            lie("{"),
            lie("[]"),
            lie(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,17]}}"#),
            lie(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#),
            lie(r#"{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}"#),
            lie(r#"{"a":{"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,16]}}"#),
            lie(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[3],"data_offsets":[4,16]}}"#),
        ] {
            std::fs::write(&path, lying).unwrap();
            assert_eq!(refusal(&folder).0, "model.safetensors");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(refusal(&folder).1.starts_with("neither model.safetensors nor pytorch_model.bin is there"));
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        assert_eq!(refusal(&folder).0, "config.json");
    }

    #[test]
    fn shards_are_found_by_their_index() {
        assert!(opens(&sharded().0));
    }

    #[test]
    fn an_index_that_lies_is_refused() {
        for escape in ["../model-1.safetensors", "/etc/passwd", "", "a/../../b"] {
            let (folder, mut map) = sharded();
            map.insert(NORM.into(), escape.into());
            write_index(&folder, &map);
            refused(&folder, "model.safetensors.index.json", &format!("shard {escape:?} is outside the folder"));
        }
        let (folder, mut map) = sharded();
        map.insert(NORM.into(), "model-1.safetensors".into());
        write_index(&folder, &map);
        refused(&folder, "model-1.safetensors", &format!("tensor {NORM} is missing, which the index says is there"));
        map.insert(NORM.into(), "model-3.safetensors".into());
        write_index(&folder, &map);
        assert_eq!(refusal(&folder).0, "model-3.safetensors");
        std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
        assert_eq!(refusal(&folder).0, "model.safetensors.index.json");
    }
}
