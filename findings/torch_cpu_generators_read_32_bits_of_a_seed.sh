#!/usr/bin/env bash
# torch 2.13.0. Guess: Generator.manual_seed takes 64 bits, gives them back (initial_seed) and all of them count; so streams
# of layers, ranks or workers may be told apart in the upper half, seed + (rank << 32). Seen: on the CPU only the lower 32 bits do: such
# seeds give the same numbers, though initial_seed tells them apart. (numpy's PCG64 hashes all bits of a seed.)
# Output seen:
#   seeds 1, 1 + 2 ** 32, 1 + 2 ** 63: 1 sequence in torch, 3 in numpy
#   initial_seed: 1, 4294967297, 9223372036854775809
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import numpy as np
import torch

SEEDS = [1, 1 + 2**32, 1 + 2**63]


def ours(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(64, generator=generator, dtype=torch.float64).tolist(), torch.randperm(64, generator=generator).tolist()
    return str(drawn)


in_torch = {ours(seed) for seed in SEEDS}
in_numpy = {str(np.random.default_rng(seed).random(64).tolist()) for seed in SEEDS}
print(f"seeds 1, 1 + 2 ** 32, 1 + 2 ** 63: {len(in_torch)} sequence in torch, {len(in_numpy)} in numpy")
kept = [torch.Generator().manual_seed(seed).initial_seed() for seed in SEEDS]
print("initial_seed:", ", ".join(str(seed % 2**64) for seed in kept))
assert (len(in_torch), len(in_numpy)) == (1, 3) and len(set(kept)) == 3, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/run.py"
