//! candle-transformers' llama and qwen2 in the loop of candle's own examples, greedily, rows of equal lengths.

use crate::{Reply, Request, Search};
use anyhow::{Result, bail};
use candle_generate::candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2};
use serde_json::Value;
use std::{fs, path::Path, time::Instant};

pub struct Candle {
    network: Network,
    dtype: DType,
}

enum Network {
    Llama(llama::Llama, llama::Config),
    Qwen(qwen2::ModelForCausalLM),
}

impl Candle {
    pub fn load(folder: &Path, dtype: &str) -> Result<Self> {
        let dtype = if dtype == "bf16" { DType::BF16 } else { DType::F32 };
        let config = fs::read(folder.join("config.json"))?;
        // SAFETY: nobody changes the file while the benchmark runs.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[folder.join("model.safetensors")], dtype, &Device::Cpu)? };
        let family: Value = serde_json::from_slice(&config)?;
        let network = if family["model_type"] == "qwen2" {
            Network::Qwen(qwen2::ModelForCausalLM::new(&serde_json::from_slice(&config)?, weights)?)
        } else {
            let config = serde_json::from_slice::<llama::LlamaConfig>(&config)?.into_config(false);
            Network::Llama(llama::Llama::load(weights, &config)?, config)
        };
        Ok(Self { network, dtype })
    }

    pub fn call(&mut self, request: &Request) -> Result<Reply> {
        if request.search != Search::Greedy {
            bail!("greedy search alone is offered");
        }
        // Its tables of angles depend on the model alone; ours are not made in the call either.
        let mut cache = match &mut self.network {
            Network::Llama(_, config) => Some(llama::Cache::new(true, self.dtype, config, &Device::Cpu)?),
            Network::Qwen(model) => {
                model.clear_kv_cache();
                None
            }
        };
        let start = Instant::now();
        let mut ids = vec![Vec::with_capacity(request.new); request.prompts.len()];
        let mut input = Tensor::new(request.prompts.clone(), &Device::Cpu)?;
        let (mut position, mut first) = (0, None);
        while ids.first().is_some_and(|row| row.len() < request.new) {
            let logits = match (&mut self.network, &mut cache) {
                (Network::Llama(model, _), Some(cache)) => model.forward(&input, position, cache)?,
                (Network::Qwen(model), _) => model.forward(&input, position)?.squeeze(1)?,
                (Network::Llama(..), None) => bail!("no cache"),
            };
            position += input.dim(1)?;
            let chosen = logits.argmax(D::Minus1)?;
            for (row, id) in ids.iter_mut().zip(chosen.to_vec1::<u32>()?) {
                row.push(id);
            }
            input = chosen.unsqueeze(1)?;
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
        }
        Ok(Reply { seconds: start.elapsed().as_secs_f64(), first, ids, ..Reply::default() })
    }
}
