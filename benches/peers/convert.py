"""Turns a checkpoint into a peer's own format: convert.py openvino|ctranslate2|llama.cpp CHECKPOINT TARGET f32|bf16.

Runs in the peers' environment, which bench.py makes.
"""

import json
import sys
from pathlib import Path


def openvino(checkpoint: Path, target: Path, dtype: str) -> None:
    """An OpenVINO graph with a state for the cache; two-byte weights are f16 there."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    config = OVConfig(dtype="fp16" if dtype == "bf16" else "fp32")
    main_export(str(checkpoint), output=target, task="text-generation-with-past", ov_config=config, convert_tokenizer=True)


def ctranslate2(checkpoint: Path, target: Path, dtype: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(target), quantization="bfloat16" if dtype == "bf16" else None)


# The names of a layer's parts in a GGUF file.
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf(checkpoint: Path, target: Path, dtype: str) -> None:
    """A GGUF file without a tokenizer, as prompts are ids."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    family, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", config["hidden_size"] // heads)
    target.mkdir(parents=True)
    writer = gguf.GGUFWriter(target / "model.gguf", family)
    half = gguf.GGMLQuantizationType.BF16 if dtype == "bf16" else gguf.GGMLQuantizationType.F32
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        values = tensor.float().numpy()
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            renamed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        else:
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            part, kind = rest.rsplit(".", 1)
            renamed = f"blk.{layer}.{PARTS[part]}.{kind}"
            # Llama's queries and keys turn as neighbouring pairs there.
            count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(part)
            if family == "llama" and count:
                values = values.reshape(count, 2, width // 2, -1).swapaxes(1, 2).reshape(values.shape)
        kind = half if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(renamed, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    peer, checkpoint, target, dtype = sys.argv[1:]
    {"openvino": openvino, "ctranslate2": ctranslate2, "llama.cpp": gguf}[peer](Path(checkpoint), Path(target), dtype)
