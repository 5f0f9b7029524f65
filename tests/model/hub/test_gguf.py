"""A GGUF file as llama.cpp's converter writes a small Llama: the same logits and ids as transformers reads of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

import model.hub.convert
from data.tokenizer import load_tokenizer
from model.loading import load_model
from tests.hub_tokenizers import END, LINES, byte_level
from tests.model.hub.test_architecture import config

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-hub.txt: GGUF files are read by gguf")

LAYERS, WIDTH, HEADS, KV_HEADS = 2, 64, 4, 2
NAMES = {  # of transformers' weights in a GGUF file
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def rotated_in_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of q and k in llama.cpp's order, which rotates neighbours where transformers rotates halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write(path: Path, kind: Any, tied: bool) -> Any:
    """A Llama of random weights, matrices as `kind`, and a byte-level tokenizer. Returns transformers' model."""
    torch.manual_seed(3)
    tokenizer = json.loads(byte_level([END]).to_str())
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    network = AutoModelForCausalLM.from_config(
        config(
            "llama", vocab_size=len(pieces), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=tied,
            rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=5000.0),
        )
    )  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if piece == END else normal for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary[END])
    writer.add_eos_token_id(vocabulary[END])
    for name, parameter in network.named_parameters():
        values = parameter.data.add_(0.1 * torch.randn_like(parameter)).numpy()
        if "q_proj" in name or "k_proj" in name:
            values = rotated_in_pairs(values, HEADS if "q_proj" in name else KV_HEADS)
        if values.ndim == 1:  # norms stay float32, as in llama.cpp
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return network.eval()


@pytest.mark.parametrize(("kind", "tied"), [("F32", False), ("F16", True), ("Q8_0", False), ("Q4_1", True)])
@torch.no_grad()
def test_a_gguf_file_becomes_the_same_model(kind: str, tied: bool, tmp_path: Path) -> None:
    file, run = tmp_path / "tiny.gguf", tmp_path / "run"
    written = write(file, gguf.GGMLQuantizationType[kind], tied)
    assert model.hub.convert.main([str(file), "--output", str(run), "--lossy"]) == 0
    loaded = load_model(run)
    assert loaded.config.tie_embeddings == tied and loaded.config.rope_base == 5000.0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = load_tokenizer(loaded.tokenizer_path)
    for text in (*LINES[:3], "  two spaces\n\nand 42 größer"):
        ids = ours.encode(text)
        assert ids == tokenizer(text, add_special_tokens=False).input_ids and len(ids) > 3
        tokens = torch.tensor([ids[:64]])
        found, expected = loaded.model.logits(loaded.model(tokens)), theirs(tokens).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.std()
        if kind == "F32":
            assert (found - written(tokens).logits).abs().max() <= 1e-4 * expected.std()
    assert (ours.bos, ours.eos) == (END, END)


def test_a_refused_tokenizer_is_named_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF file has no tokenizer.json beside it."""
    file = tmp_path / "tiny.gguf"
    write(file, gguf.GGMLQuantizationType.F32, tied=True)
    assert model.hub.convert.main([str(file), "--output", str(tmp_path / "run"), "--bos", "<x>"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: --bos is '<x>', which is no token of {file}; set --bos to the text of one"), line
