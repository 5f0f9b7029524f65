#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0 (CPU or CUDA). Guess: gradient checkpointing trades time for memory: the loss of a batch is the same with
# and without it. Seen: not for packed rows, whose documents only position_ids that begin anew tell apart (sdpa and eager attention).
# transformers keeps such documents apart where it has no cache, and checkpointing turns the cache off. With a config's default, use_cache=True,
# a training step without checkpointing makes an empty cache first, and each document then attends to those before it in its row; nothing
# warns of that. An attention_mask of ones beside the position_ids, as tokenizers return it, joins the documents too, without a cache as well.
# Output seen (a second document's logits in its row against its logits alone, largest difference, and the row's loss):
#   as it comes:          6.25, loss 5.2626
#   checkpointed:         0.00, loss 4.9175
#   use_cache=False:      0.00, loss 4.9175
#   and a mask of ones:   6.25, loss 5.2626
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat >"$folder/run.py" <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.3, attn_implementation="sdpa",
)
model = LlamaForCausalLM(config).train()
first, second = torch.randint(64, (1, 6)), torch.randint(64, (1, 8))
row = torch.cat([first, second], dim=1)
positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
alone = model(second, use_cache=False).logits
mask = torch.ones_like(row)


def step(name, **options):
    out = model(row, position_ids=positions, labels=row, **options)
    difference, loss = (out.logits[:, 6:] - alone).abs().max().item(), out.loss.item()
    print(f"{name + ':':<21} {difference:.2f}, loss {loss:.4f}")
    return difference < 1e-4, loss


plain = step("as it comes")
model.activation_checkpointing_enable()
checkpointed = step("checkpointed")
model.activation_checkpointing_disable()
without_cache = step("use_cache=False", use_cache=False)
masked = step("and a mask of ones", use_cache=False, attention_mask=mask)
apart = [result[0] for result in (plain, checkpointed, without_cache, masked)]
assert apart == [False, True, True, False], f"the behaviour has changed: {apart}"
assert abs(plain[1] - checkpointed[1]) > 0.1, "the behaviour has changed: the losses are equal"
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
