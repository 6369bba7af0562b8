#!/usr/bin/env python3
"""Makes forms.json: what transformers makes of config.json in each of the forms that it is written in.

    oracle/bin/python tests/golden/forms.py

`shared` has forms that many families have: fields that are set, or taken away where they are "absent". Of each family there is a
small config, what `is` made of it, and `forms`: what then is otherwise, for each shared form `of` a list, or for one with what
it sets. What the reference makes of a file is read from its modules, which are built without memory for their weights:

    weights      the number of parameters, so that every size and every bias counts
    heads        layers, heads, heads of keys and values, dimensions of a head
    windows      of all layers, or of each; null for none
    turns        whether each layer has rotary positions, where some layers of the family have none
    rotations    of all layers, or of full attention and of windows; each at one position and, if it is otherwise there, at three
                 times the trained length: the number of pairs, the first, second and last frequency, the factor on sine and cosine
    scales       on the scores of the first and the last layer, on the embeddings; caps of the scores and of the logits
    eps, activation, tied, dtype, positions
    experts      layers that have them, how many a token uses, whether their shares are made to sum to 1

Forms that the reference refuses are left out. The form `bare` has nothing but the model's type: absent fields have defaults.
"""

import collections
import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VERSION = "5.23.0"
HERE = Path(__file__).resolve().parent
ABSENT = "absent"

USUAL = dict(
    vocab_size=50, hidden_size=64, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
SIZES = {
    "gpt2": dict(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": {key: value for key, value in USUAL.items() if key != "num_key_value_heads"},
    "opt": dict(
        vocab_size=50, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "bloom": dict(vocab_size=50, hidden_size=32, n_layer=3, n_head=4),
    "falcon": dict(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64),
    "gemma": USUAL | dict(head_dim=16),
    "gemma2": USUAL | dict(head_dim=16, sliding_window=6),
    "gemma3_text": USUAL | dict(head_dim=16, sliding_window=6, sliding_window_pattern=2),
    "qwen3": USUAL | dict(head_dim=16),
    "mixtral": USUAL | dict(head_dim=16, num_local_experts=4),
    "qwen3_moe": USUAL | dict(head_dim=16, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=12),
    "phi3": USUAL | dict(pad_token_id=0),
    "smollm3": USUAL | dict(pad_token_id=0),
}  # fmt: skip
# Which families look at `sliding_window`, and which at `layer_types` too.
ALIKE = ["mistral", "phi3", "mixtral", "qwen3_moe", "starcoder2"]
BY_LAYER = ["qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "smollm3"]
# The share of a head that turns.
PARTS = {"gpt_neox": 0.25, "stablelm": 0.25, "phi": 0.5}
FAMILIES = [
    "gpt2", "gpt_neox", "opt", "bloom", "falcon", "phi", "stablelm", "starcoder2", "llama", "mistral", "qwen2", "qwen3", "gemma",
    "gemma2", "gemma3_text", "gemma3", "phi3", "smollm3", "olmo2", "mixtral", "qwen3_moe",
]  # fmt: skip

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def long(count):
    return dict(short_factor=[1 + i / 8 for i in range(count)], long_factor=[1.5 * 2**i for i in range(count)])


LONG = long(8)
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

# Rotary positions in each way to write them; 4.x has `rope_scaling`, 5.x `rope_parameters`.
THETAS = {
    "theta": dict(rope_theta=500.0),
    "null scaling": dict(rope_theta=500.0, rope_scaling=None),
    "empty scaling": dict(rope_theta=500.0, rope_scaling={}),
    "theta inside": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "theta inside, untyped": dict(rope_parameters=dict(rope_theta=500.0)),
    "theta inside and beside": dict(rope_theta=100.0, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "no theta inside": dict(rope_theta=500.0, rope_parameters=dict(rope_type="default")),
    "null parameters": dict(rope_theta=500.0, rope_parameters=None),
    "both objects": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0), rope_scaling=dict(rope_type="linear", factor=2.0)),
    "part": dict(partial_rotary_factor=0.5),
    "part inside": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)),
    "linear by type": dict(rope_theta=500.0, rope_scaling=dict(type="linear", factor=4.0)),
    "linear by rope_type": dict(rope_theta=500.0, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "linear inside": dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    "dynamic": dict(rope_scaling=dict(type="dynamic", factor=4.0)),
    "dynamic inside": dict(rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=4.0)),
}
SCALED = {
    "both types": dict(rope_scaling=dict(type="linear", rope_type="dynamic", factor=4.0)),
    "theta in scaling": dict(rope_theta=100.0, rope_scaling=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    "llama3": dict(rope_theta=500.0, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
    "llama3 inside": dict(rope_parameters=dict(rope_type="llama3", rope_theta=500.0, **LLAMA3)),
    "yarn": dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "yarn, no original": dict(rope_scaling=dict(type="yarn", factor=4.0)),
    "yarn, original beside": dict(original_max_position_embeddings=16, rope_scaling=dict(type="yarn", factor=4.0)),
    "yarn, both originals": dict(
        original_max_position_embeddings=16, rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "yarn inside": dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16, attention_factor=1.25)
    ),
    "yarn as deepseek has it": dict(
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.2, beta_fast=16)
    ),
    "longrope": dict(rope_scaling=dict(type="longrope", original_max_position_embeddings=16, **LONG)),
    "longrope, original beside": dict(original_max_position_embeddings=16, rope_scaling=dict(rope_type="longrope", **LONG)),
    "longrope inside": dict(
        rope_parameters=dict(rope_type="longrope", rope_theta=500.0, original_max_position_embeddings=16, factor=2.0, **LONG)
    ),
}
EVERYWHERE = {
    "torch_dtype": dict(torch_dtype="bfloat16"),
    "dtype": dict(dtype="float16"),
    "both dtypes": dict(dtype="float16", torch_dtype="bfloat16"),
    "tied": dict(tie_word_embeddings=True),
    "untied": dict(tie_word_embeddings=False),
}
NULLS = {
    "null heads": dict(num_key_value_heads=None),
    "no heads": dict(num_key_value_heads=ABSENT, num_attention_heads=32, hidden_size=128),
    "null head_dim": dict(head_dim=None),
    "no head_dim": dict(head_dim=ABSENT),
    "head_dim": dict(head_dim=24),
}
BIASES = {"attention_bias": dict(attention_bias=True), "mlp_bias": dict(mlp_bias=True)}
WINDOW = {
    "window": dict(sliding_window=7),
    "null window": dict(sliding_window=None),
    "no window": dict(sliding_window=ABSENT),
}
LAYERED = WINDOW | {
    "layer_types": dict(layer_types=TYPES),
    "layer_types, window": dict(layer_types=TYPES, sliding_window=7),
    "layer_types, null window": dict(layer_types=["full_attention"] * 4, sliding_window=None),
    "null layer_types": dict(layer_types=None, sliding_window=7),
}
QWEN = LAYERED | {
    "window used": dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "window used everywhere": dict(use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "window used nowhere": dict(use_sliding_window=True, sliding_window=7),
    "window not used": dict(use_sliding_window=False, sliding_window=7, max_window_layers=2),
    "window used, none given": dict(use_sliding_window=True, max_window_layers=2),
    "window used, layer_types": dict(use_sliding_window=True, sliding_window=7, max_window_layers=2, layer_types=TYPES),
}
GEMMA3 = LAYERED | {
    "pattern": dict(sliding_window_pattern=3),
    "no pattern": dict(sliding_window_pattern=ABSENT),
    "pattern as 5.x writes it": dict(sliding_window_pattern=ABSENT, _sliding_window_pattern=3),
    "pattern, layer_types": dict(sliding_window_pattern=3, layer_types=TYPES),
    "no layer slides": dict(sliding_window_pattern=1),
    "local theta": dict(rope_theta=500.0, rope_local_base_freq=100.0),
    "by type": dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=500.0, factor=4.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
    "by type, no theta": dict(
        rope_theta=500.0, rope_local_base_freq=100.0,
        rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0), sliding_attention=dict(rope_type="default")),
    ),
    "by type, one": dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=4.0))),
    "by type, null": dict(rope_parameters=dict(full_attention=dict(rope_type="default"), sliding_attention=None)),
    "by type, scaled": dict(
        rope_scaling=dict(rope_type="linear", factor=4.0),
        rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=500.0), sliding_attention=dict(rope_type="default", rope_theta=100.0)
        ),
    ),
    "by type, sliding scaled": dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="dynamic", rope_theta=500.0, factor=2.0),
            sliding_attention=dict(rope_type="linear", rope_theta=100.0, factor=8.0),
        ),
    ),
    "caps": dict(attn_logit_softcapping=30.0, final_logit_softcapping=20.0),
    "scalar": dict(query_pre_attn_scalar=20),
    "old activation": dict(hidden_act="silu"),
    "activation": dict(hidden_activation="silu"),
}  # fmt: skip
ROPES = THETAS | SCALED
OWN = {
    "gpt2": {
        "common names": dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=32, n_embd=ABSENT, n_layer=ABSENT,
            n_head=ABSENT, n_positions=ABSENT,
        ),
        "both names": dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=32),
        "as published": dict(n_ctx=64, n_inner=None, layer_norm_epsilon=1e-5, activation_function="gelu_new"),
        "inner": dict(n_inner=40, activation_function="relu", layer_norm_epsilon=1e-3),
        "scales": dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
    },
    "gpt_neox": ROPES | {
        "4.x names": dict(rotary_pct=0.5, rotary_emb_base=500),
        "both names": dict(rotary_pct=0.5, rotary_emb_base=500, partial_rotary_factor=0.75, rope_theta=100.0),
        "4.x names, parameters": dict(rotary_pct=0.5, rotary_emb_base=500, rope_parameters=dict(rope_type="default")),
        "scaled": dict(rotary_pct=0.5, rotary_emb_base=500, rope_scaling=dict(type="linear", factor=2.0)),
        "no biases": dict(attention_bias=False),
        "as published": dict(hidden_act="gelu_fast", layer_norm_eps=1e-6, rotary_pct=0.25, use_parallel_residual=True),
    },
    "opt": {
        "projected": dict(word_embed_proj_dim=24),
        "no projection": dict(word_embed_proj_dim=ABSENT),
        "null projection": dict(word_embed_proj_dim=None),
        "post-norm": dict(do_layer_norm_before=False),
        "no final norm": dict(_remove_final_layer_norm=True),
        "bare norms": dict(layer_norm_elementwise_affine=False),
        "no biases": dict(enable_bias=False),
        "activation": dict(activation_function="gelu"),
    },
    "bloom": {
        "common names": dict(num_hidden_layers=2, num_attention_heads=2, n_layer=ABSENT, n_head=ABSENT),
        "both names": dict(num_hidden_layers=2, num_attention_heads=2),
        "as published": dict(n_embed=48, hidden_size=ABSENT, num_attention_heads=6, n_layer=2, n_head=ABSENT, n_inner=None, seq_length=64),
        "both widths": dict(n_embed=48),
        "null width": dict(n_embed=None),
        "eps": dict(layer_norm_epsilon=1e-3),
    },
    "falcon": ROPES | {
        "heads": dict(multi_query=False),
        "kv heads, not new": dict(num_kv_heads=2),
        "new": dict(new_decoder_architecture=True, num_kv_heads=2),
        "new, no heads": dict(new_decoder_architecture=True),
        "new, null heads": dict(new_decoder_architecture=True, num_kv_heads=None),
        "new, one norm": dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
        "serial": dict(parallel_attn=False),
        "alibi": dict(alibi=True),
        "biases": dict(bias=True),
        "inner": dict(ffn_hidden_size=40),
        "null inner": dict(ffn_hidden_size=None),
        "width": dict(n_embed=48, hidden_size=ABSENT),
        "activation": dict(activation="relu", layer_norm_epsilon=1e-3),
    },
    "phi": THETAS | {"null heads": NULLS["null heads"], "no heads": NULLS["no heads"]} | {
        "norms": dict(qk_layernorm=True),
        "as published": dict(hidden_act="gelu_new", layer_norm_eps=1e-6, partial_rotary_factor=0.25, rope_theta=500.0, rope_scaling=None),
        "part and scaling": dict(partial_rotary_factor=0.75, rope_scaling=dict(type="linear", factor=2.0)),
        "both parts": dict(partial_rotary_factor=0.75, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
    },
    "stablelm": THETAS | {"no heads": NULLS["no heads"]} | {
        "norms": dict(qk_layernorm=True),
        "parallel": dict(use_parallel_residual=True),
        "biases": dict(use_qkv_bias=True),
        "as published": dict(hidden_act="silu", layer_norm_eps=1e-6, partial_rotary_factor=0.5, rope_theta=500, rope_scaling=None),
        "both parts": dict(partial_rotary_factor=0.75, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
    },
    "starcoder2": THETAS | WINDOW | {
        "null heads": dict(num_key_value_heads=None),
        "no heads": NULLS["no heads"],
        "no biases": dict(use_bias=False),
        "as published": dict(
            hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-6, norm_type="layer_norm", mlp_type="default", sliding_window=16,
            rope_theta=500, use_sliding_window=None, attention_softmax_in_fp32=True, layer_norm_epsilon=1e-3,
        ),
    },
    "llama": ROPES | NULLS | BIASES | {
        "as published": dict(
            hidden_act="silu", pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=dict(rope_type="llama3", **LLAMA3), rope_theta=500.0,
            torch_dtype="bfloat16", use_cache=True,
        ),
        "window": dict(sliding_window=7),
    },
    "mistral": THETAS | NULLS | WINDOW | {"layer_types": dict(layer_types=TYPES, sliding_window=7)} | BIASES,
    "qwen2": THETAS | NULLS | QWEN | BIASES,
    "qwen3": THETAS | NULLS | QWEN | BIASES,
    "gemma": THETAS | NULLS | BIASES | {
        "old activation": dict(hidden_act="gelu"),
        "both activations": dict(hidden_act="gelu", hidden_activation="relu"),
        "null activation": dict(hidden_act="gelu_pytorch_tanh", hidden_activation=None),
        "other activation": dict(hidden_act="relu"),
        "eps": dict(rms_norm_eps=1e-3),
    },
    "gemma2": THETAS | NULLS | LAYERED | BIASES | {
        "caps": dict(attn_logit_softcapping=30.0, final_logit_softcapping=20.0),
        "null caps": dict(attn_logit_softcapping=None, final_logit_softcapping=None),
        "scalar": dict(query_pre_attn_scalar=20),
        "as published": dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", cache_implementation="hybrid"),
        "old activation": dict(hidden_act="silu"),
        "activation": dict(hidden_activation="silu"),
        "pattern": dict(sliding_window_pattern=3),
    },
    "gemma3_text": {name: form for name, form in ROPES.items() if "original beside" not in name} | NULLS | GEMMA3 | BIASES,
    "phi3": THETAS | {name: form for name, form in SCALED.items() if name.startswith("long")} | WINDOW | {
        "null heads": dict(num_key_value_heads=None),
        "no heads": NULLS["no heads"],
        "su": dict(original_max_position_embeddings=16, rope_scaling=dict(type="su", **LONG)),
        "yarn": dict(original_max_position_embeddings=16, rope_scaling=dict(type="yarn", **LONG)),
        "su, original inside": dict(rope_scaling=dict(type="su", original_max_position_embeddings=16, **LONG)),
        "longrope, no original": dict(rope_scaling=dict(type="longrope", **LONG), max_position_embeddings=8192),
        "as published": dict(
            original_max_position_embeddings=16, rope_theta=500.0, sliding_window=7, rms_norm_eps=1e-6, partial_rotary_factor=0.75,
            rope_scaling=dict(type="longrope", **long(6)),
        ),
        "original alone": dict(original_max_position_embeddings=16),
    },
    "smollm3": THETAS | {name: form for name, form in NULLS.items() if "heads" in name} | BIASES | LAYERED | {
        "layers": dict(no_rope_layers=[1, 0, 1, 0]),
        "null layers": dict(no_rope_layers=None, no_rope_layer_interval=2),
        "interval": dict(no_rope_layer_interval=2),
        "window used": dict(use_sliding_window=True, sliding_window=7, no_rope_layer_interval=2),
        "window not used": dict(use_sliding_window=False, sliding_window=7),
    },
    "olmo2": THETAS | {name: form for name, form in NULLS.items() if "heads" in name} | {"attention_bias": dict(attention_bias=True)},
    "mixtral": THETAS | NULLS | WINDOW | {
        "other name": dict(num_local_experts=ABSENT, num_experts=6),
        "both names": dict(num_experts=6),
        "top": dict(num_experts_per_tok=1),
    },
    "qwen3_moe": THETAS | NULLS | WINDOW | BIASES | {
        "window used": dict(use_sliding_window=True, sliding_window=7),
        "window used, none given": dict(use_sliding_window=True),
        "window used, null": dict(use_sliding_window=True, sliding_window=None),
        "window not used": dict(use_sliding_window=False, sliding_window=7, max_window_layers=2),
        "other name": dict(num_experts=ABSENT, num_local_experts=6),
        "both names": dict(num_local_experts=6),
        "dense": dict(mlp_only_layers=[1, 2]),
        "null dense": dict(mlp_only_layers=None),
        "step": dict(decoder_sparse_step=2),
        "shares": dict(norm_topk_prob=True),
    },
}  # fmt: skip


def config_of(fields):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        return AutoConfig.from_pretrained(folder)


def submodules(model, word):
    return [module for module in model.modules() if type(module).__name__.endswith(word)]


def first(module, *names):
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def rounded(value):
    value = float(f"{value:.6g}")
    return int(value) if value.is_integer() else value


def rotations(model, config):
    found = submodules(model, "RotaryEmbedding")
    if not found or getattr(config, "alibi", False):
        return []
    trained = config.max_position_embeddings
    sets = []
    for layer_type in ("full_attention", "sliding_attention") if "Gemma3" in type(found[-1]).__name__ else (None,):
        if layer_type and layer_type not in config.layer_types:
            sets.append(None)
            continue
        at = []
        for length in (1, 3 * trained):
            rotary = type(found[-1])(config)  # Anew: what it computed in long rows stays.
            prefix = f"{layer_type}_" if layer_type else ""
            rotary(torch.zeros(1), torch.tensor([[length - 1]]), *([layer_type] if layer_type else []))
            inv_freq = getattr(rotary, f"{prefix}inv_freq")
            scale = getattr(rotary, f"{prefix}attention_scaling")
            at.append([len(inv_freq), *(rounded(inv_freq[place].item()) for place in (0, 1 if len(inv_freq) > 1 else 0, -1)), rounded(scale)])
        sets.append(at if at[0] != at[1] else at[:1])
    return sets


def effective(fields):
    whole = config_of(fields)
    dtype = whole.dtype  # Building the model sets it.
    kind = AutoModelForImageTextToText if fields["model_type"] == "gemma3" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(whole, dtype=torch.float32)
    config = whole.get_text_config()
    parts = [model.model.language_model, model.lm_head] if fields["model_type"] == "gemma3" else [model]
    weights = {id(parameter): parameter.numel() for part in parts for parameter in part.parameters()}
    attention = submodules(parts[0], "Attention")
    norms = {first(norm, "eps", "variance_epsilon") for norm in submodules(parts[0], "Norm")}
    assert len(norms) == 1, norms
    count = len(attention)
    # Other families have the fields, but do not look at them.
    windows = [None] * count
    if fields["model_type"] in ALIKE:
        windows = [config.sliding_window] * count
    if fields["model_type"] in BY_LAYER:
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        assert config.sliding_window or not any(slides), "no window"
        windows = [config.sliding_window if slides else None for slides in slides]
    heads = config.num_attention_heads
    dim = first(attention[0], "head_dim", "head_size")
    if fields["model_type"] == "falcon":
        kv = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    else:
        kv = getattr(config, "num_key_value_heads", None) or heads
    act = {
        first(module, "act_fn", "act", "activation_fn", "activation_function", "gelu_impl")
        for module in parts[0].modules()
        if type(module).__name__.endswith(("MLP", "OPTDecoderLayer", "Experts"))
    }
    act = {type(part).__name__ for part in act if part is not None}
    act = {
        "SiLUActivation": "Silu", "SiLU": "Silu", "GELUActivation": "Gelu", "GELU": "Gelu", "ReLU": "Relu", "NewGELUActivation": "GeluTanh",
        "FastGELUActivation": "GeluTanh", "GELUTanh": "GeluTanh", "PytorchGELUTanh": "GeluTanh", "BloomGelu": "GeluTanh",
    }[act.pop()] if len(act) == 1 else act  # fmt: skip
    scales = [rounded(first(part, "scaling", "inv_norm_factor")) for part in (attention[0], attention[-1])]
    gemma = fields["model_type"].startswith("gemma")
    # The other gemmas have the field, but use it nowhere.
    cap = attention[0].attn_logit_softcapping if fields["model_type"] == "gemma2" else None
    final = getattr(config, "final_logit_softcapping", None) if gemma and fields["model_type"] != "gemma" else None
    values = dict(
        weights=sum(weights.values()),
        heads=[count, heads, kv, dim],
        windows=windows if len(set(windows)) > 1 else windows[0],
        rotations=rotations(parts[0], config),
        scales=[*scales, rounded(config.hidden_size**0.5) if gemma else None, cap, final],
        eps=norms.pop(),
        activation=act,
        tied=bool(whole.tie_word_embeddings),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        positions=getattr(config, "max_position_embeddings", None),
    )
    if fields["model_type"] == "smollm3":
        values["turns"] = [bool(part.use_rope) for part in attention]
    experts = submodules(parts[0], "Experts")
    if experts:
        sparse = [any(type(part).__name__.endswith("Experts") for part in layer.modules()) for layer in parts[0].model.layers]
        values["experts"] = [sparse, config.num_experts_per_tok, getattr(config, "norm_topk_prob", True)]
    return values


def forms(family):
    """Names, and what they set; the base comes first."""
    base = {"model_type": family} | SIZES.get(family, USUAL)
    if family == "gemma3":
        inner = {"model_type": "gemma3_text"} | SIZES["gemma3_text"]
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
        yield "base", dict(model_type="gemma3", vision_config=vision, mm_tokens_per_image=4, text_config=inner)
        names = "theta", "linear by rope_type", "local theta", "by type", "pattern", "torch_dtype", "tied", "untied"
        for name in names:
            yield f"text, {name}", dict(text_config=(GEMMA3 | THETAS | EVERYWHERE)[name])
        yield from EVERYWHERE.items()
        return
    yield "base", base
    yield "bare", None
    own = OWN[family]
    if family in PARTS:
        pairs = long(int(8 * PARTS[family]))
        own = own | {name: fitting(form, pairs) for name, form in own.items() if name.startswith("longrope")}
    yield from (EVERYWHERE | own).items()


def fitting(form, pairs):
    return {name: value | pairs if isinstance(value, dict) else value for name, value in form.items()}


def merged(base, form):
    fields = base | form
    if "text_config" in form:
        fields["text_config"] = merged(base["text_config"], form["text_config"])
    return {key: value for key, value in fields.items() if value is not ABSENT}


def main():
    if transformers.__version__ != VERSION:
        sys.exit(f"transformers {VERSION} is the reference, this is {transformers.__version__}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    shared = EVERYWHERE | ROPES | NULLS | BIASES | WINDOW
    families, count = [], 0
    for family in FAMILIES:
        (_, base), *rest = forms(family)
        usual, lines, groups = effective(copy.deepcopy(base)), [], collections.defaultdict(list)
        for name, form in rest:
            fields = merged(base, form) if form is not None else {"model_type": family}
            try:
                values = effective(copy.deepcopy(fields))
            except Exception as error:
                print(f"{family}, {name}: {type(error).__name__} {str(error).strip().splitlines()[-1][:150]}")
                continue
            changed = {key: value for key, value in values.items() if usual.get(key) != value}
            if shared.get(name) == form:
                groups[dump(changed)].append(name)
            else:
                lines.append(dump({"of": [name], "set": form, "is": changed}))
        count += 1 + len(lines) + sum(map(len, groups.values()))
        lines += [f'{{"of":{dump(names)},"is":{changed}}}' for changed, names in groups.items()]
        families.append(f'{dump(family)}:{{"config":{dump(base)},\n"is":{dump(usual)},\n"forms":[\n' + ",\n".join(lines) + "]}")
    text = f'{{"shared":{dump(shared)},\n"families":{{\n' + ",\n".join(families) + "}}\n"
    json.loads(text)
    (HERE / "forms.json").write_text(text)
    print(f"{count} forms, {len(text)} bytes")


def dump(value):
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    main()
