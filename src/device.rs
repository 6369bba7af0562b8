//! Where a model runs: devices by name, and one pass at a time on each GPU.

use crate::error::{Error, Result};
#[cfg(test)]
use candle_core::DType;
use candle_core::{Device, DeviceLocation};
use std::sync::{Mutex, PoisonError};

/// A device by its name: `cpu`, `cuda:0` (feature `cuda`) or `metal:0` (feature `metal`); without a number the first.
///
/// ```
/// use candle_generate::{Generator, device};
///
/// let generator = Generator::builder("examples/models/storyteller").device(device("cpu")?).load()?;
/// assert!(device("cuda:three").is_err());
/// # let _ = generator;
/// # Ok::<(), candle_generate::Error>(())
/// ```
///
/// # Errors
/// [`Error::Unsupported`] for a name that is none, a device that this build cannot use, and one that is not there.
pub fn device(name: &str) -> Result<Device> {
    let refused = |reason: String| Error::Unsupported(format!("the device {name}: {reason}"));
    let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
    let number = number.parse().map_err(|_| refused("a whole number is accepted after the colon".into()))?;
    let (open, there): (fn(usize) -> candle_core::Result<Device>, bool) = match kind {
        "cpu" if name == kind => return Ok(Device::Cpu),
        "cuda" => (Device::new_cuda, cfg!(feature = "cuda")),
        "metal" => (Device::new_metal, cfg!(feature = "metal")),
        _ => return Err(refused("cpu, cuda:0 and metal:0 are accepted".into())),
    };
    if !there {
        return Err(refused(format!("this build lacks the feature `{kind}`")));
    }
    open(number).map_err(|error| refused(error.to_string()))
}

/// Passes at a time on each GPU: more GPUs than these share.
static TURNS: [Mutex<()>; 16] = [const { Mutex::new(()) }; 16];

/// Does `work` while no other thread computes on the same GPU, and waits until the GPU has done it.
///
/// A device has one handle of cuBLAS, with one workspace, for all threads, but gives each thread a stream of its own, and what one
/// stream writes another may read too early. After a turn everything is written, so that any thread may go on with it.
pub(crate) fn turn<R>(device: &Device, work: impl FnOnce() -> Result<R>) -> Result<R> {
    let number = match device.location() {
        DeviceLocation::Cpu => return work(),
        DeviceLocation::Cuda { gpu_id } | DeviceLocation::Metal { gpu_id } => gpu_id,
    };
    let _turn = TURNS[number % TURNS.len()].lock().unwrap_or_else(PoisonError::into_inner);
    let done = work();
    device.synchronize()?;
    done
}

/// Where and in which arithmetic tests of candle's operations compute: the CPU and f32, unless variables of the environment say
/// otherwise.
#[cfg(test)]
pub(crate) fn tested() -> (Device, DType) {
    let variable = |name| std::env::var(name).ok();
    let dtype = match variable("CANDLE_GENERATE_DTYPE").as_deref() {
        Some("bf16") => DType::BF16,
        Some("f16") => DType::F16,
        _ => DType::F32,
    };
    (variable("CANDLE_GENERATE_DEVICE").map_or(Device::Cpu, |name| device(&name).unwrap()), dtype)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert!(matches!(device("cpu"), Ok(Device::Cpu)));
        let refused = |name: &str| device(name).err().map(|error| error.to_string()).unwrap_or_default();
        for name in ["", "gpu", "cpu:0", "CPU", "cuda0", "vulkan:1"] {
            assert_eq!(refused(name), format!("unsupported: the device {name}: cpu, cuda:0 and metal:0 are accepted"));
        }
        for name in ["cuda:", "cuda:-1", "metal:x"] {
            assert_eq!(refused(name), format!("unsupported: the device {name}: a whole number is accepted after the colon"));
        }
        if cfg!(not(feature = "cuda")) {
            assert_eq!(refused("cuda"), "unsupported: the device cuda: this build lacks the feature `cuda`");
        }
        // No machine has so many, whatever the build.
        assert!(refused("cuda:4000").starts_with("unsupported: the device cuda:4000: "));
    }
}
