#!/usr/bin/env python3
"""Makes the golden folders: tiny random checkpoints, and what transformers generates with them.

    python3.11 -m venv oracle
    oracle/bin/pip install transformers==5.23.0 torch==2.15.0 safetensors==0.8.0 numpy==2.4.6
    oracle/bin/python tests/golden/make.py [folder ...]

Every folder holds a checkpoint in Hugging Face's format and `cases.jsonl`, one request a line:

    name               unique in the folder
    input_ids          prompts as ids, or
    prompts            prompts as text (storyteller only, whose checkpoint lies in examples/models)
    generation_config  the request, in Hugging Face's fields
    sequences          generated ids of each row; absent where they are drawn
    ties               whether best scores are equal somewhere; the lowest id wins
    finish             eos, length or stop_string, for each row
    z_scores           what WatermarkDetector says of each row, where a mark is asked for
    texts, trimmed     (storyteller) the ids decoded, and the same up to the stop string
    scores             [row][step] {top, banned | kept}: the best processed scores as [id, value], and the ids at -inf
                       or, where most are, those that are not
    logits             [row][step] the best raw logits as [id, value]; the case `plain` has every id

Rows are generated one by one, without padding. Everything is computed in f32 with eager attention (but for falcon with
ALiBi, whose eager attention adds the biases twice) on one thread, from the files as they lie there. A request is recorded only if

 *  the two best scores of each greedy step are at least GAP apart (or exactly equal, in cases that say `ties`),
 *  small noise on the logits changes neither tokens nor the set of banned ids,
 *  leaving any of its fields out (but lengths, and those in `idle`) changes the outcome,
 *  raw logits agree with one uncached pass in double precision over the whole sequence,
 *  where nothing depends on padding, a left-padded batch gives the same,
 *  where a few lines of numpy suffice to process the logits by hand, they give the same;

otherwise the next prompt of the case's own random sequence is tried. Another CPU may change the last digits.

A new family is one entry of FOLDERS, with the parameters' scales if its logits come out too even or too uneven.
"""

import collections
import copy
import json
import math
import random
import re
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import torch
import transformers
from cases import SUITES
from oracle import Oracle, kind, record
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

VERSION = "5.23.0"
HERE = Path(__file__).resolve().parent
STORYTELLER = HERE.parents[1] / "examples" / "models" / "storyteller"


# ---- checkpoints ----------------------------------------------------------------------------------------------------

ROPE_LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
GPT2 = dict(model_type="gpt2", vocab_size=101, n_embd=36, n_head=3, n_layer=2, n_positions=64, bos_token_id=100, eos_token_id=100)
LLAMA = dict(
    model_type="llama", vocab_size=112, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_parameters=ROPE_LLAMA3, bos_token_id=1,
    eos_token_id=[2, 3],
)  # fmt: skip
LLAMA_TIED = dict(
    model_type="llama", vocab_size=105, hidden_size=36, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=3, max_position_embeddings=64, rms_norm_eps=1e-6, attention_bias=True, mlp_bias=True,
    tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0), bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
QWEN2 = dict(
    model_type="qwen2", vocab_size=110, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=1,
    eos_token_id=2, rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
)  # fmt: skip
QWEN2_WINDOW = QWEN2 | dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=False, use_sliding_window=True,
    sliding_window=6, max_window_layers=1,
)  # fmt: skip
GEMMA2 = dict(
    model_type="gemma2", vocab_size=107, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=20, sliding_window=8, attn_logit_softcapping=4.0,
    final_logit_softcapping=9.0, max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)  # fmt: skip
GPT2_INVERSE = GPT2 | dict(n_embd=24, scale_attn_by_inverse_layer_idx=True)
NEOX = dict(
    model_type="gpt_neox", vocab_size=103, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
    max_position_embeddings=64, layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=2,
    rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.5),
)  # fmt: skip
OPT = dict(
    model_type="opt", vocab_size=104, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=2, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
BLOOM = dict(model_type="bloom", vocab_size=106, hidden_size=24, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2, pad_token_id=3)
FALCON = dict(
    model_type="falcon", vocab_size=108, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_hidden_size=60,
    max_position_embeddings=64, bos_token_id=2, eos_token_id=2, rope_parameters=dict(rope_type="default", rope_theta=1000.0),
)  # fmt: skip
PHI = dict(
    model_type="phi", vocab_size=109, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.5),
)  # fmt: skip
STABLELM = dict(
    model_type="stablelm", vocab_size=111, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.25),
)  # fmt: skip
STARCODER2 = dict(
    model_type="starcoder2", vocab_size=113, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, sliding_window=6, bos_token_id=0, eos_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=1000.0),
)  # fmt: skip
ROPE_SLOW = dict(rope_parameters=dict(rope_type="default", rope_theta=10.0, partial_rotary_factor=0.5))

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)  # fmt: skip
MISTRAL = SMALL | dict(model_type="mistral", vocab_size=104, head_dim=12, sliding_window=6)
QWEN3 = SMALL | dict(
    model_type="qwen3", vocab_size=106, head_dim=12, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
)  # fmt: skip
GEMMA = SMALL | dict(model_type="gemma", vocab_size=103, head_dim=12, num_key_value_heads=1, bos_token_id=2, eos_token_id=1)
GEMMA3 = SMALL | dict(
    model_type="gemma3_text", vocab_size=107, head_dim=12, num_hidden_layers=3, query_pre_attn_scalar=20, sliding_window=8,
    sliding_window_pattern=3, bos_token_id=2, eos_token_id=1,
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=100.0),
        full_attention=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    ),
)  # fmt: skip
PHI3 = SMALL | dict(
    model_type="phi3", vocab_size=109, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=96,
    original_max_position_embeddings=24,
    rope_parameters=dict(
        rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75,
        short_factor=[1.0, 1.05, 1.1, 1.2, 1.4, 1.6], long_factor=[1.3, 1.8, 2.5, 4.0, 8.0, 16.0],
    ),
)  # fmt: skip
LLAMA_DYNAMIC = SMALL | dict(
    model_type="llama", vocab_size=102, max_position_embeddings=24,
    rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0),
)  # fmt: skip
SMOLLM3 = SMALL | dict(
    model_type="smollm3", vocab_size=105, num_hidden_layers=3, no_rope_layer_interval=2, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=2000000.0),
)  # fmt: skip
OLMO2 = SMALL | dict(model_type="olmo2", vocab_size=108)
MIXTRAL = SMALL | dict(
    model_type="mixtral", vocab_size=104, intermediate_size=20, num_local_experts=5, num_experts_per_tok=2,
    rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
)  # fmt: skip
QWEN3_MOE = SMALL | dict(
    model_type="qwen3_moe", vocab_size=101, num_hidden_layers=3, head_dim=8, intermediate_size=40, num_experts=5,
    num_experts_per_tok=3, moe_intermediate_size=16, mlp_only_layers=[1], norm_topk_prob=False,
)  # fmt: skip

READER = dict(
    d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=2, encoder_ffn_dim=36,
    decoder_ffn_dim=28, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
T5 = dict(
    model_type="t5", vocab_size=103, d_model=24, d_kv=10, d_ff=36, num_layers=2, num_decoder_layers=2, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
T5_GATED = T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=1)
MT5 = T5 | dict(model_type="mt5", feed_forward_proj="gated-gelu", vocab_size=101)
UMT5 = T5 | dict(model_type="umt5", feed_forward_proj="gated-gelu", vocab_size=104)
BART = READER | dict(model_type="bart", vocab_size=105)
MBART = READER | dict(model_type="mbart", vocab_size=106, scale_embedding=True, forced_eos_token_id=2)
MARIAN = READER | dict(
    model_type="marian", vocab_size=107, activation_function="swish", scale_embedding=True, pad_token_id=106, bos_token_id=None,
    eos_token_id=0, decoder_start_token_id=106, forced_eos_token_id=0,
)  # fmt: skip
MARIAN_APART = MARIAN | dict(
    share_encoder_decoder_embeddings=False, vocab_size=102, decoder_vocab_size=103, pad_token_id=101, decoder_start_token_id=101
)
PEGASUS = READER | dict(model_type="pegasus", vocab_size=101, activation_function="relu", scale_embedding=True, pad_token_id=0,
                        bos_token_id=None, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
M2M_100 = READER | dict(model_type="m2m_100", vocab_size=108)

# What a family's random parameters look like: name pattern -> (mean, standard deviation). Matrices that no pattern
# names get 1.6 / sqrt(inputs), so that activations keep their size and every layer matters.
SCALES = {
    "gpt2": [
        (r"wte", 0, 0.3), (r"wpe", 0, 1.0), (r"ln_f.weight", 1.5, 0.2), (r"bias", 0, 0.1), (r"c_(attn|fc).weight", 0, 0.33),
        (r"attn.c_proj.weight", 0, 0.5), (r"mlp.c_proj.weight", 0, 0.08),
    ],
    "llama": [(r"embed_tokens", 0, 0.7), (r"lm_head", 0, 0.5)],
    "llama-tied": [(r"embed_tokens", 0, 0.5)],
    "qwen2": [(r"embed_tokens", 0, 0.5)],
    "qwen2-window": [(r"embed_tokens", 0, 0.7), (r"lm_head", 0, 0.5)],
    "gemma2": [
        (r"embed_tokens", 0, 0.18), (r"post_.*norm.weight", 4.0, 0.5), (r"model.norm.weight", 2.2, 0.2), (r"norm.weight", 0.0, 0.2),
    ],
    "gemma": [(r"embed_tokens", 0, 0.18), (r"model.norm.weight", 0.6, 0.2), (r"norm.weight", 0.0, 0.2)],
    "gemma3": [
        (r"embed_tokens", 0, 0.18), (r"post_.*norm.weight", 3.0, 0.5), (r"model.norm.weight", 1.5, 0.2), (r"norm.weight", 0.0, 0.2),
    ],
    "olmo2": [(r"embed_tokens", 0, 0.7), (r"lm_head", 0, 0.5), (r"[qk]_norm.weight", 1.3, 0.3)],
}  # fmt: skip
CLASSIC = [
    (r"embed_tokens|embed_in|word_embeddings.weight", 0, 0.3), (r"(query_key_value|[qkv]_proj).weight", 0, 0.6),
    (r"(dense|o(ut)?_proj|4h_to_h|fc2|down_proj|c_proj).weight", 0, 0.6), (r"embed_positions", 0, 0.7),
    (r"(lm_head|embed_out).weight", 0, 0.5),
]  # fmt: skip
SCALES |= {"gpt2-inverse": SCALES["gpt2"]} | dict.fromkeys(
    [
        "gpt_neox", "gpt_neox-serial", "opt", "opt-post", "bloom", "bloom-normed", "falcon", "falcon-new", "falcon-new-norm",
        "falcon-alibi", "phi", "phi-norms", "stablelm", "stablelm-parallel", "stablelm-norms", "starcoder2",
    ],
    CLASSIC,
)  # fmt: skip
READS = [(r"shared|embed_tokens", 0, 0.4), (r"embed_positions", 0, 0.5), (r"layernorm_embedding.weight", 1.0, 0.2), (r"lm_head", 0, 0.5)]
SCALES |= dict.fromkeys(["bart", "mbart", "marian", "marian-apart", "pegasus", "m2m_100"], READS) | {
    "t5": [(r"relative_attention_bias", 0, 1.5), (r"shared", 0, 1.4)],
}
SCALES |= dict.fromkeys(
    ["t5-gated", "mt5", "umt5"],
    [(r"relative_attention_bias", 0, 1.0), (r"shared", 0, 0.7), (r"lm_head", 0, 0.4), (r"\.[qk]\.weight", 0, 0.15), (r"wo.weight", 0, 0.1)],
)
USUAL = [(r"embed_tokens", 0, 0.7), (r"lm_head", 0, 0.5)]
EVERYWHERE = [(r"(norm|ln_\w+|norms\.\d+).weight", 1.0, 0.2), (r"bias", 0.0, 0.3)]

# folder -> how it is made: `config`, whose weights `of` another folder it has, `dtype` of the file, `old` for a
# config.json with the keys of 4.x, `shards`, `pickled` weights, `published` names, the `suite` of requests, generation_config `file`,
# the `attention` of the oracle, and `matters`: settings of config.json that change the logits if replaced.
FOLDERS = {
    "gpt2": dict(config=GPT2, suite="full", published=True, matters=dict(n_head=6)),
    "gpt2-bf16": dict(of="gpt2", dtype=torch.bfloat16),
    "gpt2-bin": dict(of="gpt2", dtype=torch.bfloat16, pickled=True),
    "gpt2-bin-sharded": dict(of="gpt2", dtype=torch.float16, pickled=True, shards="40KB"),
    "llama": dict(
        config=LLAMA, suite="full",
        matters=dict(rope_parameters=dict(rope_type="default", rope_theta=500.0), rms_norm_eps=1e-1),
    ),
    "llama-bf16": dict(of="llama", dtype=torch.bfloat16),
    "llama-sharded": dict(of="llama", shards="50KB"),
    "llama-4x": dict(of="llama", dtype=torch.bfloat16, old=True),
    "llama-tied": dict(
        config=LLAMA_TIED,
        matters=dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0), attention_bias=False, mlp_bias=False),
    ),
    "llama-tied-4x": dict(of="llama-tied", dtype=torch.bfloat16, old=True),
    "qwen2": dict(config=QWEN2, suite="full", matters=dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "qwen2-bf16": dict(of="qwen2", dtype=torch.bfloat16),
    "qwen2-window": dict(
        config=QWEN2_WINDOW, suite="sampling_file",
        file=dict(do_sample=True, repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20, eos_token_id=[2, 3], pad_token_id=0),
        matters=dict(sliding_window=7, layer_types=["full_attention"] * 3),
    ),
    "gemma2": dict(
        config=GEMMA2, suite="full",
        matters=dict(
            attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=9, query_pre_attn_scalar=12,
            layer_types=["full_attention"] * 3, hidden_activation="silu", rope_parameters=dict(rope_type="default", rope_theta=100.0),
        ),
    ),
    "gemma2-bf16": dict(of="gemma2", dtype=torch.bfloat16),
    "gemma2-4x": dict(of="gemma2", dtype=torch.bfloat16, old=True, file=dict(cache_implementation="hybrid")),
    "gpt2-inverse": dict(config=GPT2_INVERSE, dtype=torch.bfloat16, matters=dict(scale_attn_by_inverse_layer_idx=False)),
    "gpt_neox": dict(config=NEOX, suite="varied", old=True, matters=dict(use_parallel_residual=False, **ROPE_SLOW)),
    "gpt_neox-serial": dict(
        suite="varied", config=NEOX | dict(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_fast"),
        matters=dict(use_parallel_residual=True),
    ),
    "opt": dict(config=OPT, suite="varied", dtype=torch.bfloat16, matters=dict(activation_function="gelu", _remove_final_layer_norm=True)),
    "opt-post": dict(
        suite="varied", config=OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=20), published=True,
        dtype=torch.bfloat16, matters=dict(do_layer_norm_before=True),
    ),
    "bloom": dict(
        config=BLOOM, suite="far", dtype=torch.bfloat16, published=True, matters=dict(apply_residual_connection_post_layernorm=True)
    ),
    "bloom-normed": dict(
        suite="varied", config=BLOOM | dict(n_head=4, apply_residual_connection_post_layernorm=True),
        matters=dict(apply_residual_connection_post_layernorm=False),
    ),
    "falcon": dict(suite="varied", config=FALCON, old=True, matters=ROPE_SLOW),
    "falcon-new": dict(
        suite="varied", config=FALCON | dict(num_attention_heads=6, num_kv_heads=2, new_decoder_architecture=True), matters=ROPE_SLOW
    ),
    "falcon-new-norm": dict(
        suite="varied",
        config=FALCON | dict(num_attention_heads=6, num_kv_heads=3, new_decoder_architecture=True, num_ln_in_parallel_attn=1),
    ),
    "falcon-alibi": dict(
        config=FALCON | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True),
        attention="sdpa", suite="far", matters=dict(alibi=False),
    ),
    "phi": dict(suite="varied", dtype=torch.bfloat16, config=PHI, matters=ROPE_SLOW),
    "phi-norms": dict(
        suite="varied", dtype=torch.bfloat16, config=PHI | dict(num_key_value_heads=4, qk_layernorm=True),
        matters=dict(qk_layernorm=False),
    ),
    "stablelm": dict(suite="varied", dtype=torch.bfloat16, config=STABLELM, old=True, matters=ROPE_SLOW),
    "stablelm-parallel": dict(
        suite="varied", dtype=torch.bfloat16, config=STABLELM | dict(use_parallel_residual=True, use_qkv_bias=True),
        matters=dict(use_qkv_bias=False),
    ),
    "stablelm-norms": dict(
        suite="varied", dtype=torch.bfloat16, config=STABLELM | dict(qk_layernorm=True), matters=dict(qk_layernorm=False)
    ),
    "starcoder2": dict(suite="varied", config=STARCODER2, matters=dict(sliding_window=7, use_bias=False, hidden_act="relu", **ROPE_SLOW)),
    "mistral": dict(config=MISTRAL, dtype=torch.bfloat16, matters=dict(sliding_window=7)),
    "qwen3": dict(config=QWEN3, dtype=torch.bfloat16),
    "gemma": dict(config=GEMMA, dtype=torch.bfloat16, matters=dict(hidden_act="silu")),
    "gemma3": dict(
        config=GEMMA3, dtype=torch.bfloat16,
        matters=dict(
            sliding_window=9, query_pre_attn_scalar=12, hidden_activation="silu",
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "phi3": dict(config=PHI3, dtype=torch.bfloat16, suite="crossing", matters=dict(original_max_position_embeddings=48)),
    "llama-dynamic": dict(config=LLAMA_DYNAMIC, dtype=torch.bfloat16, suite="crossing", matters=dict(max_position_embeddings=32)),
    "smollm3": dict(config=SMOLLM3, dtype=torch.bfloat16, matters=dict(no_rope_layers=[1, 1, 1])),
    "olmo2": dict(config=OLMO2, dtype=torch.bfloat16),
    "mixtral": dict(config=MIXTRAL, dtype=torch.bfloat16, matters=dict(num_experts_per_tok=3)),
    "qwen3_moe": dict(config=QWEN3_MOE, dtype=torch.bfloat16, matters=dict(num_experts_per_tok=2, norm_topk_prob=True)),
    "t5": dict(
        config=T5, suite="sources_full", dtype=torch.bfloat16, published=True,
        matters=dict(relative_attention_max_distance=60, scale_decoder_outputs=False),
    ),
    "t5-gated": dict(
        config=T5_GATED, suite="sources", dtype=torch.bfloat16, shards="20KB", matters=dict(dense_act_fn="relu", scale_decoder_outputs=True)
    ),
    "mt5": dict(config=MT5, suite="sources", dtype=torch.float16, matters=dict(dense_act_fn="relu")),
    "umt5": dict(config=UMT5, suite="sources", dtype=torch.bfloat16, matters=dict(relative_attention_max_distance=60)),
    "bart": dict(config=BART, suite="sources_full", dtype=torch.bfloat16, matters=dict(activation_function="relu", scale_embedding=True)),
    "bart-legacy": dict(
        of="bart", suite="sources_file", dtype=torch.bfloat16, pickled=True,
        legacy=dict(
            num_beams=3, length_penalty=2.0, min_length=6, max_length=11, no_repeat_ngram_size=2, early_stopping=True,
            forced_bos_token_id=0, forced_eos_token_id=2,
        ),
    ),
    "mbart": dict(
        config=MBART, suite="sources_forced", dtype=torch.bfloat16, file=dict(forced_eos_token_id=2), matters=dict(scale_embedding=False)
    ),
    "marian": dict(
        config=MARIAN, suite="sources_forced", dtype=torch.bfloat16, pickled=True, published=True,
        file=dict(forced_eos_token_id=0, bad_words_ids=[[106]], num_beams=1, max_length=32),
        matters=dict(activation_function="relu", scale_embedding=False),
    ),
    "marian-apart": dict(config=MARIAN_APART, suite="sources", dtype=torch.bfloat16),
    "pegasus": dict(config=PEGASUS, suite="sources", dtype=torch.bfloat16, matters=dict(scale_embedding=False)),
    "m2m_100": dict(config=M2M_100, suite="sources", dtype=torch.bfloat16, matters=dict(scale_embedding=False)),
}  # fmt: skip


def make_checkpoint(name):
    recipe = FOLDERS[name]
    base = recipe.get("of", name)
    settings = dict(FOLDERS[base]["config"])
    config = AutoConfig.for_model(settings.pop("model_type"), **copy.deepcopy(settings))
    model = kind(config).from_config(config, dtype=torch.float32)
    fill(model, base)
    dtype = recipe.get("dtype", torch.float32)
    model.to(dtype)
    model.config.dtype = dtype
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    special = {key: settings[key] for key in special if key in settings}
    model.generation_config = GenerationConfig(**(special | recipe.get("file", {})))

    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=recipe.get("shards", "1GB"))
    if recipe.get("published"):
        publish(folder, model)
    if recipe.get("pickled"):
        pickle(folder)
    if recipe.get("old"):
        age(folder / "config.json")
    if legacy := recipe.get("legacy"):
        (folder / "generation_config.json").unlink()
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | legacy, indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def fill(model, base):
    generator = torch.Generator().manual_seed(zlib.crc32(base.encode()))
    scales = SCALES.get(base, USUAL) + EVERYWHERE
    with torch.no_grad():
        computed = model.config.model_type in ("marian", "pegasus")  # positions
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if computed and "embed_positions" in name or not name.endswith((".weight", ".bias", "_bias")):
                continue
            inputs = parameter.shape[0 if "c_" in name else -1]  # GPT-2's Conv1D has its inputs first
            mean, deviation = next((scale[1:] for scale in scales if re.search(scale[0], name)), (0, 1.6 / math.sqrt(inputs)))
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))


def publish(folder, model):
    """The file as it is published: no prefix, or OPT's shorter one, and the causal masks that old versions of GPT-2 stored."""
    path = folder / "model.safetensors"
    if model.config.model_type == "t5":
        tensors = load_file(path)
        for stack in ["encoder", "decoder"]:
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 3)  # means nothing
        return save_file(tensors, path, metadata={"format": "pt"})
    if model.config.model_type == "marian":
        tensors = load_file(path)
        for stack in ["encoder", "decoder"]:
            tensors[f"model.{stack}.embed_tokens.weight"] = tensors["model.shared.weight"].clone()
            tensors[f"model.{stack}.embed_positions.weight"] = getattr(model.model, stack).embed_positions.weight.detach().clone()
        tensors["lm_head.weight"] = tensors["model.shared.weight"].clone()
        return save_file(tensors, path, metadata={"format": "pt"})
    prefix = "model." if model.config.model_type == "opt" else "transformer."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    if model.config.model_type == "gpt2":
        positions = model.config.n_positions
        for layer in range(model.config.n_layer):
            tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions)
    save_file(tensors, path, metadata={"format": "pt"})


def pickle(folder):
    """The tensors as torch.save writes them, with the buffers that old versions stored; the first of several shards in the
    form that it had before version 1.6, with its tensors in one storage."""
    paths = sorted(folder.glob("model*.safetensors"))
    for path in paths:
        tensors = collections.OrderedDict(load_file(path))
        old = path == paths[0] and len(paths) > 1
        if old:
            joined, at = torch.cat([tensor.flatten() for tensor in tensors.values()]), 0
            for name, tensor in tensors.items():
                tensors[name] = joined[at : at + tensor.numel()].view(tensor.shape)
                at += tensor.numel()
        elif path == paths[0] and "transformer.h.0.ln_1.weight" in tensors:
            tensors["transformer.h.0.attn.bias"] = torch.tril(torch.ones(4, 4, dtype=torch.bool)).view(1, 1, 4, 4)
            tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=not old)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def age(path):
    """config.json with the keys of 4.x: nothing nested for plain rotary positions, `type` for scaled ones."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"rope_type" if kind == "llama3" else "type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.43.0"
    config.pop("layer_types", None)
    if config["model_type"] == "llama":
        config.pop("head_dim")
        if config["num_key_value_heads"] == config["num_attention_heads"]:
            config.pop("num_key_value_heads")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def sensitive(folder, oracle):
    """Each setting in `matters` must change the logits, or the fixture could not tell whether it is honoured."""
    ids = torch.tensor([random.Random(folder).choices(range(4, oracle.vocab - 1), k=40)])
    more = dict(decoder_input_ids=ids.flip(1)) if oracle.reads else {}
    with torch.no_grad():
        logits = oracle.model(ids, **more).logits
        for key, value in FOLDERS[folder].get("matters", {}).items():
            config = AutoConfig.from_pretrained(HERE / folder)
            setattr(config, key, value)
            other = kind(config).from_config(config, dtype=torch.float32, attn_implementation=oracle.attention).eval()
            other.load_state_dict(oracle.model.state_dict(), strict=False)
            change = (other(ids, **more).logits - logits).abs().max().item()
            assert change > 0.01, f"{folder}: {key} = {value} changes logits by {change}"


def make(folder):
    if folder == "storyteller":
        (HERE / folder).mkdir(exist_ok=True)
        oracle = Oracle(STORYTELLER, AutoTokenizer.from_pretrained(STORYTELLER))
        suite = SUITES["story"]
    else:
        make_checkpoint(folder)
        oracle = Oracle(HERE / folder, attention=FOLDERS[folder].get("attention", "eager"))
        sensitive(folder, oracle)
        suite = SUITES[FOLDERS[folder].get("suite", "short")]
    family = FOLDERS.get(folder, {}).get("of", folder)
    lines = [record(oracle, family, case) for case in suite()]
    (HERE / folder / "cases.jsonl").write_text("".join(line + "\n" for line in lines))
    print(f"{folder}: {len(lines)} cases")


def main(folders):
    if transformers.__version__ != VERSION:
        sys.exit(f"transformers {VERSION} is the reference, this is {transformers.__version__}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for folder in folders or [*FOLDERS, "storyteller"]:
        make(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
