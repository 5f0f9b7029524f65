"""An estimate of peak memory per device for the same configs and options as train.py, part by part.

    python -m training.memory --config configs/models/1b.yaml --config configs/attention/asentmax.yaml \
        --config configs/data/source_tree.yaml --config configs/stages/extend_128k.yaml \
        --config configs/cluster/ulysses.yaml

It needs no GPU and no data: parameters are counted on the meta device, the rest follows from shapes. What CUDA itself
takes (context, libraries, NCCL; 1 to 2 GiB) and the allocator's fragmentation are not in it.

Counted by hand, not measured on fake tensors: both were compared with peaks measured on GPUs, of which
tests/training/memory/test_peaks.py holds this count to 5.5 %. Eager steps on
fake tensors were within 0.4 % (this count: 2 %), compiled ones within 4 % (this: 4 %), but 12 to 15 % too high with
activation_checkpointing full (this: 2.5 %), because fake tensors do not see what Inductor fuses. They took 3 to 150 s a
case (this: 0.1 s) and need stand-ins for what runs on CUDA only where torch is built without it.

With activation_checkpointing a block keeps, a token: full its input (C r); offload that on the host; both also what
entmax by Triton found before its weighted sum: 12 bytes a head for thresholds (before their last step, and that step's
slope and length), 8 for the row's first and last key, N / 32,768 bytes a head for bits of tiles and, for inputs of
4,096 to 131,072 tokens in long documents, about N / 512 a head for bits of single keys. selective keeps full's,
attention's output (H D w) and its threshold or log-sum-exp (4 bytes a head); compiled blocks need the 12 bytes no
longer then.

With float8, weights that are multiplied with in FP8 have no cast copies. Eager blocks keep bfloat16 operands as without
it, and round the largest one through float32 (9 bytes an element). Compiled ones, but for "rowwise_with_gw_hp", keep
wo's operand and the second norm's output in FP8, and compute the feed-forward layer's product again.

A teacher (model.distill) is whole on each rank. Its forward pass ends before the student's begins, of which the last
hidden states are left.

Sizes in formulas: P parameters, W ranks, S ranks that share a sequence, N tokens of a micro-batch, n = N / S of a rank,
L layers, C width, F width of the feed-forward layer, H query heads, G key/value heads, D head dim, V vocabulary. r and
w: bytes of the residual stream and of matrix products (4 and 4 in float32; 4 and 2 under autocast; 2 and 2 where ZeRO
keeps weights in bfloat16).
"""
