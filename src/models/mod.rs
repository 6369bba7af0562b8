//! Loads a checkpoint folder as a model: `config.json` names the family, the family says what its decoder is made of.

use crate::{
    error::{Error, Result},
    model::Model,
    progress::OnProgress,
};
use candle_core::{DType, Device};
use std::{path::Path, sync::Arc};

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
        Self { device: Device::Cpu, dtype: None, kernels: Kernels::Auto, progress: None }
    }
}

/// Loads the model of a folder in Hugging Face's format.
pub fn load(folder: impl AsRef<Path>, options: &LoadOptions) -> Result<Arc<dyn Model>> {
    let _ = options;
    Err(Error::load(folder, "not built yet"))
}
