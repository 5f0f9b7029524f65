#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU or CUDA). Guess: without a cache a model's forward pass depends on its arguments alone, with
# rope_type "dynamic" on the length of the text: perplexities at several lengths may be measured in any order, and texts no longer than the
# model was trained for are read as ever. Seen: frequencies grow with the longest text so far, and go back only for a text that is shorter
# than max_position_embeddings. A text of just that length, the commonest one to measure at, is read with the frequencies of what came
# before, and so is a longer text that is shorter than one before. YaRN's frequencies are fixed, and remember nothing.
# Output seen (trained length 64; largest difference of a text's logits before and after one text of 256 tokens):
#   yarn:    63 tokens 0.00, 64 tokens 0.00, 96 tokens 0.00
#   dynamic: 63 tokens 0.00, 64 tokens 13.71, 96 tokens 14.08
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat >"$folder/run.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED, LONG = 64, 256
KINDS = {
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def model_with(kind):
    torch.manual_seed(0)
    longest = TRAINED if kind == "dynamic" else LONG
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, max_position_embeddings=longest, rope_parameters=KINDS[kind],
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def difference(kind, length):
    model = model_with(kind)
    text, long_text = torch.randint(64, (1, length)), torch.randint(64, (1, LONG))
    before = model(text, use_cache=False).logits
    model(long_text, use_cache=False)
    return (model(text, use_cache=False).logits - before).abs().max().item()


remembered = {}
for kind in KINDS:
    found = {length: difference(kind, length) for length in (TRAINED - 1, TRAINED, 96)}
    print(f"{kind + ':':<8}", ", ".join(f"{length} tokens {value:.2f}" for length, value in found.items()))
    remembered[kind] = [value > 1e-3 for value in found.values()]
expected = {"yarn": [False, False, False], "dynamic": [False, True, True]}
assert remembered == expected, f"the behaviour has changed: {remembered}"
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
