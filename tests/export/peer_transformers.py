"""What `transformers` computes with GGUF files: run in the environment of `make golden-env`.

    .golden-env/bin/python tests/export/peer_transformers.py TOKENS.npy OUT.npz FILE.gguf...

TOKENS.npy holds ids `[n]`; OUT.npz gets their logits `[n, vocab]`, an array a file. The files are
read by `transformers` and the `gguf` package; nothing of slm_jax is imported. A model with experts,
which its reader of GGUF does not know, is put together here from llama.cpp's names.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers


def mixtral(path: Path) -> transformers.PreTrainedModel:
    """MixtralForCausalLM with the tensors of a `llama` file that has experts."""
    reader = gguf.GGUFReader(path)

    def number(key: str) -> float:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    experts = number("expert_count")
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=number("vocab_size"),
            hidden_size=number("embedding_length"),
            num_hidden_layers=number("block_count"),
            intermediate_size=number("feed_forward_length"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=number("attention.key_length"),
            num_local_experts=experts,
            num_experts_per_tok=number("expert_used_count"),
            rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
            sliding_window=None,
        )
    )
    tensors = {
        t.name: torch.tensor(gguf.quants.dequantize(np.asarray(t.data), t.tensor_type))
        for t in reader.tensors
    }

    def halves(w: torch.Tensor, n: int) -> torch.Tensor:
        """Rows for rope on halves of a head instead of adjacent pairs."""
        return w.reshape(n, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    state = {
        "model.embed_tokens.weight": tensors.pop("token_embd.weight"),
        "model.norm.weight": tensors.pop("output_norm.weight"),
        "lm_head.weight": tensors.pop("output.weight"),
    }
    for i in range(number("block_count")):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        for short, long in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate_inp", "mlp.gate"),
        ):
            state[f"{theirs}{long}.weight"] = tensors.pop(f"{ours}{short}.weight")
        for letter, n in (("q", heads), ("k", kv_heads)):
            w = tensors.pop(f"{ours}attn_{letter}.weight")
            state[f"{theirs}self_attn.{letter}_proj.weight"] = halves(w, n)
        gate, up, down = (tensors.pop(f"{ours}ffn_{n}_exps.weight") for n in ("gate", "up", "down"))
        state[f"{theirs}mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{theirs}mlp.experts.down_proj"] = down
    assert not tensors, tensors.keys()
    model.load_state_dict(state, strict=True)
    return model


def load(path: Path) -> transformers.PreTrainedModel:
    """The model of a file in float32."""
    if "llama.expert_count" in gguf.GGUFReader(path).fields:
        return mixtral(path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


def main(tokens: str, out: str, *files: str) -> None:
    """Writes the logits of every file."""
    ids = torch.tensor(np.load(tokens)[None].astype(np.int64))
    logits = {}
    for file in map(Path, files):
        with torch.no_grad():
            logits[file.stem] = load(file).eval()(ids).logits[0].numpy()
    np.savez(out, **logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
