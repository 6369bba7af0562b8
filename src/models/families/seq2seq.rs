//! Encoder-decoder families: T5's line, whose attention learns biases by distance, and BART's, whose tokens carry their positions.

use super::{activation, activation_named, head, share};
use crate::{
    error::Result,
    kernels::{Attention, Bias, Sight},
    models::{
        fields::{COUNT, Fields, WIDTH},
        spec::{Cross, DecoderSpec, Encoder, Head, Layout, Linear, Mlp, Norm, NormKind, Positions, Qkv, Residual, Waves},
    },
};

pub(super) fn t5(config: &Fields) -> Result<DecoderSpec> {
    // HF: what was saved by 5.x says all heads are tied, and in a field of its own whether the head is given scaled states.
    let scaled = config.flag("scale_decoder_outputs", config.flag("tie_word_embeddings", true)?)?;
    let family = T5 { name: "t5", vocab: 32_128, inner: 2048, layers: 6, heads: 8, proj: "relu", scaled, each: false };
    family.spec(config)
}

pub(super) fn mt5(config: &Fields) -> Result<DecoderSpec> {
    // HF: 5.x never scales; 4.x did if `tie_word_embeddings` was set, as it is in no published file.
    let family = T5 { name: "mt5", vocab: 250_112, inner: 1024, layers: 8, heads: 6, proj: "gated-gelu", scaled: false, each: false };
    family.spec(config)
}

pub(super) fn umt5(config: &Fields) -> Result<DecoderSpec> {
    // HF: 5.x scales whatever the config says; published files have `tie_word_embeddings` unset and heads that were trained without, as
    // 4.x ran them.
    let scaled = config.flag("tie_word_embeddings", true)?;
    let family = T5 { name: "umt5", vocab: 250_112, inner: 1024, layers: 8, heads: 6, proj: "gated-gelu", scaled, each: true };
    family.spec(config)
}

pub(super) fn bart(config: &Fields) -> Result<DecoderSpec> {
    Bart { name: "bart", before: false, normed: true, waves: None, ..BART }.spec(config)
}

pub(super) fn mbart(config: &Fields) -> Result<DecoderSpec> {
    Bart { name: "mbart", before: true, normed: true, waves: None, ..BART }.spec(config)
}

pub(super) fn marian(config: &Fields) -> Result<DecoderSpec> {
    let mut spec = Bart { name: "marian", vocab: 58_101, before: false, ..BART }.spec(config)?;
    if !config.flag("share_encoder_decoder_embeddings", true)? {
        spec.vocab = config.optional_size("decoder_vocab_size", None, WIDTH)?.unwrap_or(spec.vocab);
        (spec.embedding, spec.aliases) = ("decoder.embed_tokens", &[]);
        if let Some(encoder) = &mut spec.encoder {
            encoder.stack.aliases = &[];
        }
    }
    Ok(spec)
}

pub(super) fn pegasus(config: &Fields) -> Result<DecoderSpec> {
    Bart { name: "pegasus", ..BART }.spec(config)
}

pub(super) fn m2m_100(config: &Fields) -> Result<DecoderSpec> {
    // HF: a padding id has no position there, and those after it one less; rows here are not padded, and each token has its own.
    let skip = config.number("pad_token_id", 1)?.min(WIDTH) + 1;
    let waves = Some(Waves::Fairseq { skip });
    Bart { name: "m2m_100", vocab: 128_112, waves, activation: "relu", scaled: true, biased: false, ..BART }.spec(config)
}

/// What T5's families differ in: mostly what absent fields mean.
struct T5 {
    name: &'static str,
    vocab: usize,
    inner: usize,
    layers: usize,
    heads: usize,
    proj: &'static str,
    /// Whether the head is given states divided by the root of their width.
    scaled: bool,
    /// Whether each layer has biases of its own.
    each: bool,
}

impl T5 {
    fn spec(self, config: &Fields) -> Result<DecoderSpec> {
        let hidden = config.size("d_model", 512, WIDTH)?;
        let layers = config.size("num_layers", self.layers, COUNT)?;
        let heads = config.size("num_heads", self.heads, COUNT)?;
        let head_dim = config.size("d_kv", 64, COUNT)?;
        let attention = |sight| Attention { heads, kv_heads: heads, head_dim, scale: 1.0, softcap: None, sight, bias: Bias::None };
        let linear = |name| Linear { name, bias: false };
        let stack = |encoder: bool, layers: usize| -> Result<DecoderSpec> {
            Ok(DecoderSpec {
                family: self.name,
                base: "",
                vocab: config.size("vocab_size", self.vocab, WIDTH)?,
                hidden,
                embedding: if encoder { "encoder.embed_tokens" } else { "shared" },
                aliases: &["shared", "decoder.embed_tokens", "encoder.embed_tokens"],
                embedding_scale: None,
                embedding_norm: None,
                projection: None,
                positions: self.positions(config)?,
                layer: if encoder { "encoder.block." } else { "decoder.block." },
                attention: vec![attention(if encoder { Sight::Full } else { Sight::Causal }); layers],
                layout: Layout::Linear,
                qkv: Qkv::Split(["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"].map(linear)),
                qk_norm: None,
                out: linear("layer.0.SelfAttention.o"),
                mlp: self.mlp(config, encoder)?,
                experts: None,
                norm: Norm { kind: NormKind::Rms, eps: config.positive("layer_norm_epsilon", 1e-6)? as f32 },
                residual: Residual::Pre {
                    attention: "layer.0.layer_norm",
                    mlp: if encoder { "layer.1.layer_norm" } else { "layer.2.layer_norm" },
                },
                final_norm: Some(if encoder { "encoder.final_layer_norm" } else { "decoder.final_layer_norm" }),
                // HF: all are tied unless the file has a head that differs, whatever the config says.
                head: Head::Tied(linear("lm_head")),
                head_scale: self.scaled.then(|| (hidden as f64).powf(-0.5) as f32),
                logits_bias: None,
                softcap: None,
                encoder: None,
            })
        };
        let cross = Cross {
            attention: attention(Sight::Full),
            norm: "layer.1.layer_norm",
            query: linear("layer.1.EncDecAttention.q"),
            key: linear("layer.1.EncDecAttention.k"),
            value: linear("layer.1.EncDecAttention.v"),
            out: linear("layer.1.EncDecAttention.o"),
        };
        let encoder = Encoder { stack: stack(true, layers)?, cross };
        let layers = config.optional_size("num_decoder_layers", None, COUNT)?.unwrap_or(layers);
        Ok(DecoderSpec { encoder: Some(Box::new(encoder)), ..stack(false, layers)? })
    }

    fn positions(&self, config: &Fields) -> Result<Positions> {
        let (buckets, reach) = ("relative_attention_num_buckets", "relative_attention_max_distance");
        let (count, most) = (config.size(buckets, 32, COUNT)?, config.size(reach, 128, COUNT)?);
        if count < 4 {
            return Err(config.error(buckets, count, "at least 4 are accepted"));
        }
        if most <= count / 2 {
            return Err(config.error(reach, most, &format!("more than half of the {count} buckets are accepted")));
        }
        Ok(Positions::Relative { name: "layer.0.SelfAttention.relative_attention_bias", buckets: count, reach: most, each: self.each })
    }

    fn mlp(&self, config: &Fields, encoder: bool) -> Result<Mlp> {
        let field = "feed_forward_proj";
        let inner = config.size("d_ff", self.inner, WIDTH)?;
        let linear = |first, second| Linear { name: if encoder { first } else { second }, bias: false };
        let down = linear("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo");
        let proj = config.text(field, self.proj)?;
        Ok(match proj.strip_prefix("gated-") {
            Some(name) => Mlp::Gated {
                gate: linear("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
                up: linear("layer.1.DenseReluDense.wi_1", "layer.2.DenseReluDense.wi_1"),
                down,
                inner,
                // HF: the tanh is meant by this one form.
                activation: activation_named(config, field, if name == "gelu" { "gelu_new" } else { name })?,
            },
            None => Mlp::Plain {
                up: linear("layer.1.DenseReluDense.wi", "layer.2.DenseReluDense.wi"),
                down,
                inner,
                activation: activation_named(config, field, proj)?,
            },
        })
    }
}

/// What BART's families differ in.
struct Bart {
    name: &'static str,
    vocab: usize,
    /// Whether norms stand before the parts of a layer, and one after the last layer.
    before: bool,
    /// Whether there is a norm before the first layer.
    normed: bool,
    /// How positions are computed; a table has them if there is none.
    waves: Option<Waves>,
    activation: &'static str,
    /// Whether embeddings are scaled unless the config says otherwise.
    scaled: bool,
    /// Whether the file may have a bias of the logits.
    biased: bool,
}

/// What most of them have in common.
const BART: Bart = Bart {
    name: "",
    vocab: 50_265,
    before: true,
    normed: false,
    waves: Some(Waves::Plain),
    activation: "gelu",
    scaled: false,
    biased: true,
};

impl Bart {
    fn spec(self, config: &Fields) -> Result<DecoderSpec> {
        let encoder = Encoder { stack: self.stack(config, true)?, cross: self.cross(config)? };
        Ok(DecoderSpec { encoder: Some(Box::new(encoder)), ..self.stack(config, false)? })
    }

    fn stack(&self, config: &Fields, encoder: bool) -> Result<DecoderSpec> {
        let either = |first: &'static str, second: &'static str| if encoder { first } else { second };
        let linear = |name| Linear { name, bias: true };
        let hidden = self.hidden(config)?;
        let attention = self.attention(config, either("encoder_attention_heads", "decoder_attention_heads"))?;
        let attention = Attention { sight: if encoder { Sight::Full } else { Sight::Causal }, ..attention };
        let (first, second) = ("self_attn_layer_norm", "final_layer_norm");
        let positions = either("encoder.embed_positions", "decoder.embed_positions");
        let trained = config.size("max_position_embeddings", 1024, WIDTH)?;
        Ok(DecoderSpec {
            family: self.name,
            base: "model.",
            vocab: config.size("vocab_size", self.vocab, WIDTH)?,
            hidden,
            embedding: either("encoder.embed_tokens", "shared"),
            aliases: &["shared", "decoder.embed_tokens", "encoder.embed_tokens"],
            embedding_scale: config.flag("scale_embedding", self.scaled)?.then(|| (hidden as f64).sqrt() as f32),
            embedding_norm: self.normed.then_some(either("encoder.layernorm_embedding", "decoder.layernorm_embedding")),
            projection: None,
            positions: match self.waves {
                None => Positions::Learned { name: positions, skip: 2, len: trained },
                Some(waves) => Positions::Waves { waves, stored: (waves == Waves::Plain).then_some(positions), trained },
            },
            layer: either("encoder.layers.", "decoder.layers."),
            attention: vec![attention; config.size(either("encoder_layers", "decoder_layers"), 12, COUNT)?],
            layout: Layout::Linear,
            qkv: Qkv::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(linear)),
            qk_norm: None,
            out: linear("self_attn.out_proj"),
            mlp: Mlp::Plain {
                up: linear("fc1"),
                down: linear("fc2"),
                inner: config.size(either("encoder_ffn_dim", "decoder_ffn_dim"), 4096, WIDTH)?,
                activation: activation(config, "activation_function", self.activation)?,
            },
            experts: None,
            norm: Norm { kind: NormKind::Layer, eps: 1e-5 },
            residual: match self.before {
                true => Residual::Pre { attention: first, mlp: second },
                false => Residual::Summed { attention: first, mlp: second },
            },
            final_norm: self.before.then_some(either("encoder.layer_norm", "decoder.layer_norm")),
            head: head(config, true)?,
            head_scale: None,
            logits_bias: self.biased.then_some("final_logits_bias"),
            softcap: None,
            encoder: None,
        })
    }

    fn cross(&self, config: &Fields) -> Result<Cross> {
        let linear = |name| Linear { name, bias: true };
        Ok(Cross {
            attention: Attention { sight: Sight::Full, ..self.attention(config, "decoder_attention_heads")? },
            norm: "encoder_attn_layer_norm",
            query: linear("encoder_attn.q_proj"),
            key: linear("encoder_attn.k_proj"),
            value: linear("encoder_attn.v_proj"),
            out: linear("encoder_attn.out_proj"),
        })
    }

    fn hidden(&self, config: &Fields) -> Result<usize> {
        let hidden = config.size("d_model", 1024, WIDTH)?;
        match self.waves {
            Some(_) if hidden % 2 == 1 => Err(config.error("d_model", hidden, "an even number is accepted: half are sines, half cosines")),
            _ => Ok(hidden),
        }
    }

    fn attention(&self, config: &Fields, field: &str) -> Result<Attention> {
        let heads = config.size(field, 16, COUNT)?;
        let head_dim = share(config, field, self.hidden(config)?, heads)?;
        let scale = (head_dim as f64).powf(-0.5) as f32;
        Ok(Attention { heads, kv_heads: heads, head_dim, scale, softcap: None, sight: Sight::Causal, bias: Bias::None })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernels::Activation;
    use serde_json::{Value, json};

    fn fields(config: Value) -> Fields {
        Fields::new(config.as_object().unwrap().clone())
    }

    fn refused(family: fn(&Fields) -> Result<DecoderSpec>, config: Value, message: &str) {
        assert_eq!(family(&fields(config)).unwrap_err().to_string(), format!("cannot load config.json: {message}"));
    }

    #[test]
    fn heads_are_given_scaled_states_where_the_reference_does() {
        let scale = |family: fn(&Fields) -> Result<DecoderSpec>, config| family(&fields(config)).unwrap().head_scale;
        assert_eq!(scale(t5, json!({"d_model": 64})), Some(0.125));
        assert_eq!(scale(t5, json!({"tie_word_embeddings": false})), None);
        assert_eq!(scale(t5, json!({"tie_word_embeddings": true, "scale_decoder_outputs": false})), None);
        assert_eq!(scale(mt5, json!({})), None);
        assert_eq!(scale(umt5, json!({"d_model": 16})), Some(0.25));
        assert_eq!(scale(umt5, json!({"tie_word_embeddings": false})), None);
        let embedded = |family: fn(&Fields) -> Result<DecoderSpec>| family(&fields(json!({"d_model": 256}))).unwrap().embedding_scale;
        assert_eq!([bart, mbart, marian, pegasus, m2m_100].map(embedded), [None, None, None, None, Some(16.0)]);
    }

    #[test]
    fn the_form_of_the_feed_forward_part_is_named_in_one_field() {
        let of = |family: fn(&Fields) -> Result<DecoderSpec>, config| match family(&fields(config)).unwrap().mlp {
            Mlp::Plain { activation, .. } => (false, activation),
            Mlp::Gated { activation, .. } | Mlp::GatedFused { activation, .. } => (true, activation),
        };
        assert_eq!(of(t5, json!({})), (false, Activation::Relu));
        assert_eq!(of(mt5, json!({})), (true, Activation::GeluTanh));
        assert_eq!(of(t5, json!({"feed_forward_proj": "gelu"})), (false, Activation::Gelu));
        assert_eq!(of(t5, json!({"feed_forward_proj": "gated-gelu"})), (true, Activation::GeluTanh));
        assert_eq!(of(t5, json!({"feed_forward_proj": "gated-silu"})), (true, Activation::Silu));
        let known = "silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh and relu are accepted";
        refused(t5, json!({"feed_forward_proj": "gated-mish"}), &format!("feed_forward_proj = mish: {known}"));
        refused(t5, json!({"feed_forward_proj": "wide-relu"}), &format!("feed_forward_proj = wide-relu: {known}"));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        refused(t5, json!({"relative_attention_num_buckets": 3}), "relative_attention_num_buckets = 3: at least 4 are accepted");
        let reason = "relative_attention_max_distance = 16: more than half of the 32 buckets are accepted";
        refused(umt5, json!({"relative_attention_max_distance": 16}), reason);
        let most = "whole numbers from 1 to 4096 are accepted";
        refused(
            mt5,
            json!({"relative_attention_max_distance": 1_u64 << 40}),
            &format!("relative_attention_max_distance = 1099511627776: {most}"),
        );
        let reason = "d_model = 33: an even number is accepted: half are sines, half cosines";
        refused(marian, json!({"d_model": 33}), reason);
        refused(bart, json!({"d_model": 33}), "encoder_attention_heads = 16: a divisor of the hidden size 33 is accepted");
        refused(
            bart,
            json!({"d_model": 48, "decoder_attention_heads": 9}),
            "decoder_attention_heads = 9: a divisor of the hidden size 48 is accepted",
        );
    }

    #[test]
    fn halves_may_differ() {
        let spec = t5(&fields(json!({"num_layers": 3, "num_decoder_layers": 5}))).unwrap();
        assert_eq!((spec.encoder.unwrap().stack.attention.len(), spec.attention.len()), (3, 5));
        let spec = t5(&fields(json!({"num_layers": 3, "num_decoder_layers": null}))).unwrap();
        assert_eq!(spec.attention.len(), 3);
        let apart = json!({"share_encoder_decoder_embeddings": false, "vocab_size": 50, "decoder_vocab_size": 60});
        let spec = marian(&fields(apart)).unwrap();
        assert_eq!((spec.encoder.unwrap().stack.vocab, spec.vocab), (50, 60));
        let spec = marian(&fields(json!({"vocab_size": 50, "decoder_vocab_size": 60}))).unwrap();
        assert_eq!((spec.encoder.unwrap().stack.vocab, spec.vocab), (50, 50));
    }
}
