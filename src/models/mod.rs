//! Loads a checkpoint folder as a model: `config.json` names the family, the family says what its decoder is made of.

mod bin;
mod decoder;
mod encoder;
mod entry;
mod families;
mod fields;
mod kv;
#[cfg(test)]
mod laws;
mod layers;
mod pickle;
mod relative;
mod rope;
mod spec;
#[cfg(test)]
pub(crate) mod tiny;
mod weights;

use crate::{
    cache::{PAGE, Pages},
    device::turn,
    error::{Error, Result},
    kernels::{AttnImplementation, Instructions, candle::CandleOps, cpu::CpuOps},
    model::{Model, ModelInfo},
    progress::OnProgress,
};
use candle_core::{DType, Device};
use decoder::Decoder;
use fields::Fields;
use spec::DecoderSpec;
use std::{path::Path, sync::Arc};
use weights::Weights;

/// How a checkpoint is loaded.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Where the model runs; the CPU unless set.
    pub device: Device,
    /// The type of the arithmetic: on the CPU `F32` unless set, whatever type the file's weights have.
    pub dtype: Option<DType>,
    /// Which implementation of the operations is used.
    pub kernels: Kernels,
    /// Threads of the fused operations; as many as the process may use physical cores unless set.
    pub threads: Option<usize>,
    /// The most that the fused operations may use of the processor's instructions.
    pub instructions: Option<Instructions>,
    /// How attention is computed; flash unless set, where there is a choice.
    pub attn_implementation: Option<AttnImplementation>,
    /// Told about progress; can cancel.
    pub progress: Option<OnProgress>,
}

/// Implementations of the decoder's operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Kernels {
    /// The fastest that the device and the arithmetic allow.
    #[default]
    Auto,
    /// Candle's own operations, on any device and in any float type: the reference that the others are tested against.
    Candle,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: None,
            kernels: Kernels::Auto,
            threads: None,
            instructions: None,
            attn_implementation: None,
            progress: None,
        }
    }
}

/// The most threads that a model may be given.
const THREADS: usize = 1024;

/// Loads the model of a folder in Hugging Face's format: `config.json` and the weights.
pub fn load(folder: impl AsRef<Path>, options: &LoadOptions) -> Result<Arc<dyn Model>> {
    let folder = folder.as_ref();
    let config = Fields::open(folder)?;
    let spec = families::spec(&config)?;
    let dtype = match (options.dtype, &options.device) {
        (Some(dtype), _) => dtype,
        (None, Device::Cpu) => DType::F32,
        (None, _) => config.dtype()?,
    };
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        return Err(Error::config("dtype", dtype.as_str(), "f32, bf16 and f16 are accepted"));
    }
    if let Some(threads) = options.threads.filter(|threads| !(1..=THREADS).contains(threads)) {
        return Err(Error::config("threads", threads, format!("1 to {THREADS} are accepted")));
    }
    let weights = Weights::open(folder, spec.base)?;
    build(&spec, &weights, dtype, options)
}

/// The one place where the operations are chosen.
fn build(spec: &DecoderSpec, weights: &Weights, dtype: DType, options: &LoadOptions) -> Result<Arc<dyn Model>> {
    let LoadOptions { device, kernels, progress, .. } = options;
    let (shape, progress) = (spec.shape(), progress.as_ref());
    let info = ModelInfo { device: device.clone(), dtype, ..ModelInfo::new(spec.family, spec.vocab) };
    Ok(match (device, dtype, kernels) {
        (Device::Cpu, _, Kernels::Auto) => {
            let attention = options.attn_implementation.unwrap_or(AttnImplementation::Flash);
            let ops = CpuOps::new(dtype, options.threads, options.instructions, attention);
            let info = ModelInfo { page: PAGE, position_bytes: Pages::position_bytes(shape), operations: ops.describe(), ..info };
            Arc::new(Decoder::load(ops, info, spec, weights, progress)?)
        }
        _ if options.attn_implementation == Some(AttnImplementation::Flash) => {
            return Err(Error::Unsupported("flash attention in candle's operations, whose attention is eager".into()));
        }
        _ => {
            let values = 2 * shape.layers * shape.kv_heads * shape.head_dim;
            let operations = "candle's operations, eager attention".to_owned();
            let info = ModelInfo { position_bytes: (values * dtype.size_in_bytes()) as u64, operations, ..info };
            Arc::new(turn(device, || Decoder::load(CandleOps::new(device.clone(), dtype), info, spec, weights, progress))?)
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        model::{Context, Feed, Start, Want},
        progress::{Progress, Stage},
    };
    use safetensors::Dtype;
    use std::{ops::ControlFlow, sync::Mutex};

    const STORYTELLER: &str = "examples/models/storyteller";

    #[derive(serde::Deserialize)]
    struct Reference {
        input_ids: Vec<u32>,
        output_ids: Vec<u32>,
    }

    #[test]
    fn the_storyteller_says_what_the_reference_says() {
        let lines = std::fs::read_to_string(format!("{STORYTELLER}/reference.jsonl")).unwrap();
        let references: Vec<Reference> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let model = load(STORYTELLER, &LoadOptions::default()).unwrap();
        let vocab = model.info().vocab_size;
        let sources: Vec<&[u32]> = references.iter().map(|reference| &reference.input_ids[..]).collect();
        let mut caches = model.start(&vec![Start::default(); sources.len()]).unwrap();
        let mut tokens: Vec<Vec<u32>> = references.iter().map(|reference| reference.input_ids.clone()).collect();
        let mut outputs = vec![Vec::new(); references.len()];
        // Without optimisation the whole of it takes half a minute.
        let steps = if cfg!(debug_assertions) { 12 } else { 64 };
        for _ in 0..steps {
            let mut feeds: Vec<_> = caches.iter_mut().zip(&tokens).map(|(cache, tokens)| Feed { tokens, cache: &mut **cache }).collect();
            let logits = model.forward(&mut feeds, Want::Last).unwrap().logits.into_host().unwrap();
            for (row, logits) in logits.chunks(vocab).enumerate() {
                let best = (0..vocab).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
                outputs[row].push(best);
                tokens[row] = vec![best];
            }
        }
        for (output, reference) in outputs.iter().zip(&references) {
            let len = steps.min(reference.output_ids.len());
            assert_eq!(output[..len], reference.output_ids[..len]);
        }
    }

    #[test]
    fn info_counts_bytes() {
        let model = load(STORYTELLER, &LoadOptions::default()).unwrap();
        let info = model.info();
        assert_eq!((info.name.as_str(), info.vocab_size, info.context), ("llama", 2048, Context::Soft(1024)));
        assert!(!info.is_encoder_decoder);
        // Keys and values of 7 layers with 2 heads of 32 in f32.
        assert_eq!(info.position_bytes, 2 * 7 * 2 * 32 * 4);
        // 3148608 parameters but for the 15 norms of 192, in two or four bytes.
        let matrices = 3_148_608 - 15 * 192;
        assert!([2 * matrices, 4 * matrices].contains(&info.weight_bytes));
    }

    #[test]
    fn types_that_models_do_not_compute_in_are_refused() {
        let options = LoadOptions { dtype: Some(DType::I64), ..LoadOptions::default() };
        let error = load(STORYTELLER, &options).err().unwrap();
        assert_eq!(error.to_string(), "invalid generation config: dtype = i64: f32, bf16 and f16 are accepted");
    }

    #[test]
    fn half_precision_files_and_arithmetic_stay_close() {
        for family in tiny::FAMILIES {
            let logits = |file, dtype| {
                let folder = tiny::write(&tiny::config(family), file);
                let model = load(folder.path(), &LoadOptions { dtype: Some(dtype), ..LoadOptions::default() }).unwrap();
                let mut cache = model.start(&[Start { source: &tiny::SOURCE, ..Start::default() }]).unwrap().remove(0);
                let mut feed = [Feed { tokens: &[5, 6, 7, 8, 9, 10], cache: &mut *cache }];
                model.forward(&mut feed, Want::Last).unwrap().logits.into_host().unwrap()
            };
            let exact = logits(Dtype::F32, DType::F32);
            let spread = exact.iter().map(|logit| logit.abs()).fold(0.0, f32::max);
            for (file, dtype, share) in [
                (Dtype::F16, DType::F32, 0.01),
                (Dtype::BF16, DType::F32, 0.1),
                (Dtype::F32, DType::F16, 0.02),
                (Dtype::F32, DType::BF16, 0.15),
            ] {
                let apart = exact.iter().zip(logits(file, dtype)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart > 0.0 && apart < share * spread, "{family}, {file:?} in {dtype:?}: {apart} of {spread}");
            }
        }
    }

    #[test]
    fn progress_is_reported_to_the_end_and_can_cancel() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        let progress = OnProgress::new(move |progress: Progress| {
            record.lock().unwrap().push(progress);
            ControlFlow::Continue(())
        });
        load(STORYTELLER, &LoadOptions { progress: Some(progress), ..LoadOptions::default() }).unwrap();
        let seen = seen.lock().unwrap();
        assert!(seen.iter().all(|progress| progress.stage == Stage::Load && progress.total == 6_297_216));
        assert!(seen.is_sorted_by(|a, b| a.done < b.done), "{seen:?}");
        assert_eq!((seen.len(), seen.last().map(|last| last.done)), (9, Some(6_297_216)));

        let progress = OnProgress::new(|_| ControlFlow::Break(()));
        let error = load(STORYTELLER, &LoadOptions { progress: Some(progress), ..LoadOptions::default() }).err().unwrap();
        assert!(matches!(error, Error::Cancelled));
    }
}
