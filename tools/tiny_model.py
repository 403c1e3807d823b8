"""Write a tiny language model with random weights, for tests of what is around a model; it knows nothing.

    tiny_model.py FILE [SEED]

Half a megabyte in llama.cpp's format: two layers over the bytes. Its output is biased towards what a tool call
begins with and what ends a text, so that it calls tools now and then; the server's grammar makes the calls that
follow fit their schema. Run by the Python that has ``gguf``.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

WIDTH, HEADS, LAYERS, HIDDEN, CONTEXT = 64, 4, 2, 128, 32768
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
BIAS = {"<|im_end|>": 5.0, "<tool_call>": 6.5, "Ċ": 3.0, '"': 4.0}


def byte_names() -> list[str]:
    """The names that byte-level vocabularies give to the 256 bytes (the table of GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names, more = {byte: chr(byte) for byte in plain}, 0
    for byte in range(256):
        if byte not in names:
            names[byte] = chr(256 + more)
            more += 1
    return [names[byte] for byte in range(256)]


def main() -> None:
    """Write the file."""
    path, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
    chance = np.random.default_rng(seed)
    tokens = [*byte_names(), "Ġt", *SPECIAL]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny-random")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)) + [gguf.TokenType.CONTROL] * 3
    writer.add_token_types([*kinds, gguf.TokenType.USER_DEFINED, gguf.TokenType.USER_DEFINED])
    writer.add_token_merges(["Ġ t"])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)

    def tensor(name: str, *shape: int, scale: float = 0.2) -> None:
        writer.add_tensor(name, (chance.standard_normal(shape) * scale).astype(np.float32))

    tensor("token_embd.weight", len(tokens), WIDTH, scale=1.0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    tensor("output.weight", len(tokens), WIDTH, scale=0.25)
    bias = np.full(len(tokens), -1.0, np.float32)
    for name, value in BIAS.items():
        bias[tokens.index(name)] = value
    for name in ("<|endoftext|>", "<|im_start|>", "</tool_call>"):
        bias[tokens.index(name)] = -20.0
    writer.add_tensor("output.bias", bias)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for part in ("attn_q", "attn_k", "attn_v"):
            tensor(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
            writer.add_tensor(f"blk.{layer}.{part}.bias", np.zeros(WIDTH, np.float32))
        tensor(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
        tensor(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
