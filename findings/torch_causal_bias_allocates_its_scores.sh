#!/usr/bin/env bash
# torch 2.13.0. Guess: causal_lower_right(queries, keys), which stands for a mask "without materializing" it, holds two sizes. Seen: CausalBias is
# a Tensor whose constructor takes (variant, queries, keys) for a shape: it allocates 2 * queries * keys float32 values in host memory, which
# nothing reads. Their pages are never touched, so that small ones go unseen; 65,536 queries of 2,097,152 keys end in an error of the allocator.
# A bias made for 1 x 1 that is told its sizes afterwards gives the same attention.
# Output seen:
#   causal_lower_right(1024, 4096): shape (2, 1024, 4096), 33,554,432 bytes
#   causal_lower_right(65536, 2097152): can't allocate memory: you tried to allocate 1099511627776 bytes
#   told its sizes afterwards: 8 bytes, equal to a boolean mask
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/run.py" <<'PY'
import re

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

bias = causal_lower_right(1024, 4096)
size = bias.untyped_storage().nbytes()
print(f"causal_lower_right(1024, 4096): shape {tuple(torch.Tensor.size(bias))}, {size:,} bytes")
if size != 2 * 1024 * 4096 * 4:
    raise SystemExit("the behaviour has changed")
try:
    causal_lower_right(65536, 2097152)
except RuntimeError as error:
    print(f"causal_lower_right(65536, 2097152): {re.search(r'can.t allocate memory: .* bytes', str(error))[0]}")
else:
    print("causal_lower_right(65536, 2097152): this machine lends a TiB")
small = causal_lower_right(1, 1)
small.seq_len_q, small.seq_len_kv = 5, 9
q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
ours, expected = (scaled_dot_product_attention(q, k, v, attn_mask=one) for one in (small, mask))
if not torch.equal(ours, expected):
    raise SystemExit("the behaviour has changed")
print(f"told its sizes afterwards: {small.untyped_storage().nbytes()} bytes, equal to a boolean mask")
PY
"$folder/venv/bin/python" "$folder/run.py" 2>/dev/null
