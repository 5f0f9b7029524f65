"""The Triton kernels as one registered operator: launches, shapes for tracing, autograd."""

from typing import Any

import torch
from torch import Tensor

from kernels.alpha_entmax.backward import entmax_backward_keys, entmax_backward_queries
from kernels.alpha_entmax.refine import entmax_refine
from kernels.alpha_entmax.scan import entmax_scan
from kernels.alpha_entmax.sum import entmax_sum
from kernels.common.derivatives import once
from kernels.common.launching import (
    bfloat16_as_float32,
    ceil_div,
    dot_precision,
    on_device,
    padded_head_dim,
    strides,
    unit_stride,
)
from kernels.common.tiles import BLOCK_FIELDS, LIST_CHUNK, Intervals, write_intervals
from kernels.common.tuning import launch_for, program_count
from kernels.common.visibility import TILE

# Largest step of the threshold (in units of z, at alpha <= 1.5) after which no further refinement is made. Outputs in
# 16 bits take the last step to first order; without gradients there is no such step, and float32 resolves more
TOLERANCE = {"gradient": 0.05, "inference": 3e-3, "float32": 3e-4}
MAX_STEPS = 20  # a bound only, for rows at the limit of float32

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
POWERS = {1.5: "linear", 2.0: "constant"}


def power_of(alpha: float | Tensor) -> str:
    """How the kernels take powers: numbers known before the launch can have their own instructions."""
    return "general" if isinstance(alpha, Tensor) else POWERS.get(float(alpha), "general")


def _shared(q: Tensor, k: Tensor, alibi_slopes: Tensor | None, intervals: Intervals, power: str) -> dict[str, Any]:
    head_dim = q.shape[3]
    return dict(
        heads=q.shape[1],
        repeat=q.shape[1] // k.shape[1],
        n_queries=q.shape[2],
        n_keys=k.shape[2],
        n_blocks=intervals.blocks.shape[1],
        n_words=ceil_div(k.shape[2], 32 * TILE),
        batch_step=int(intervals.rows.shape[1] > 1),
        stride_rows=intervals.rows.stride(0),
        p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        p_rows=intervals.rows,
        p_blocks=intervals.blocks,
        D=head_dim,
        BD=padded_head_dim(head_dim),
        LIST_CHUNK=LIST_CHUNK,
        FIELDS=BLOCK_FIELDS,
        BIAS=alibi_slopes is not None,
        POWER=power,
        PRECISION=dot_precision(q),
    )


def _forward_outputs(
    q: Tensor, k: Tensor, kv_lens: Tensor | None, gradient: bool, stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, n_queries, _ = q.shape
    n_blocks, n_words = ceil_div(n_queries, TILE), ceil_div(k.shape[2], 32 * TILE)
    interval_batch = 1 if kv_lens is None else batch
    out = torch.empty_like(q)
    slope_out = torch.empty_like(q, dtype=torch.float32) if gradient else q.new_empty(0, dtype=torch.float32)
    tau = q.new_empty((batch, heads, n_queries), dtype=torch.float32)
    bits = q.new_empty((batch, heads, n_blocks, n_words), dtype=torch.int32)
    support = q.new_empty((batch, heads, n_queries) if stats else 0, dtype=torch.int32)
    live = q.new_zeros((batch, heads) if stats else 0, dtype=torch.int64)
    passes = q.new_empty((batch, heads, n_blocks) if stats else 0, dtype=torch.int32)
    rows = q.new_empty((2, interval_batch, n_queries), dtype=torch.int32)
    blocks = q.new_empty((interval_batch, n_blocks, BLOCK_FIELDS), dtype=torch.int32)
    return out, slope_out, tau, bits, support, live, passes, rows, blocks


@bfloat16_as_float32(n_outputs=1)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    scale: float,
    power: str,
    causal: bool,
    cu_seqlens: Tensor | None,
    kv_lens: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    gradient: bool,
    stats: bool,
    skip_far: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as in `kernels.entmax_attention`; alpha float32 (H,).

    power: from `power_of`. gradient: keep what backward needs. skip_far: leave out tiles that position bias rules out.

    Returns: out (B, H, Tq, D); sum w v / sum w, its shape in float32 (delta, a difference of large sums where keys have
    much in common, needs it); tau float32 (B, H, Tq); bits int32 (B, H, query tiles, words), one bit per live tile;
    support int32 (B, H, Tq), live tiles int64 (B, H) and passes over listed tiles int32 (B, H, query tiles); rows and
    blocks of tiles.Intervals. What was not asked for is empty.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    outputs = _forward_outputs(q, k, kv_lens, gradient, stats)
    out, slope_out, tau, bits, support, live, passes, rows, blocks = outputs
    if out.numel() == 0 or k.shape[2] == 0:
        for output in (out, slope_out, support, passes):
            output.zero_()
        tau.fill_(torch.inf)
        return outputs
    intervals = Intervals(rows, blocks)
    shared = _shared(q, k, alibi_slopes, intervals, power)
    capacity = ceil_div(ceil_div(k.shape[2], TILE), 32) * 32
    skip_far = skip_far and alibi_slopes is not None
    launches = {name: launch_for(name, shared["BD"], q.dtype, q.device) for name in ("scan", "refine", "sum")}
    scan_tiles = launches["scan"].tiles
    n_tasks = {name: ceil_div(shared["n_blocks"], scan_tiles if name == "scan" else 1) for name in launches}
    n_tasks = {name: n * q.shape[0] * q.shape[1] for name, n in n_tasks.items()}
    n_programs = {name: program_count(x, q.device, n_tasks[name]) for name, x in launches.items()}
    # the three kernels run one after another and leave the flags at zero, so that they can share them
    n_flags = max(n_programs["scan"] * scan_tiles, n_programs["refine"], n_programs["sum"]) * capacity
    scratch = torch.zeros(16 + n_flags, dtype=torch.uint8, device=q.device)
    counters = scratch[:12].view(torch.int32)
    n_lists = max(n_programs.values())
    lists = torch.empty(n_lists * (capacity + capacity // 32 + 2), dtype=torch.int32, device=q.device)
    last = torch.empty(2, *tau.shape, dtype=torch.float32, device=q.device)
    same = dict(
        p_q=q,
        p_k=k,
        p_flags=scratch[16:],
        p_alpha=alpha.contiguous(),
        p_tau=tau,
        p_bits=bits,
        scale=scale,
        capacity=capacity,
        **strides("q", q),
        **strides("k", k),
        **shared,
    )
    with on_device(q):
        write_intervals(intervals, k.shape[2], causal, cu_seqlens, kv_lens, window)
        launch = launches["scan"]
        entmax_scan[(n_programs["scan"],)](
            p_key_norms=torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).amax(-1) if skip_far else None,
            p_counter=counters,
            n_tasks=n_tasks["scan"],
            TILE=TILE,
            ROWS=scan_tiles * TILE,
            SPAN=launch.span,
            FOLD=launch.fold,
            CHUNK=32 // launch.span,
            SKIP_FAR=skip_far,
            STAGES=launch.stages,
            **launch.options,
            **same,
        )

        def run(kernel: Any, name: str, **arguments: Any) -> None:
            kernel[(n_programs[name],)](
                p_list=lists,
                p_marks=lists[n_lists * capacity :],
                p_last=last,
                stride_last=last.stride(0),
                n_tasks=n_tasks[name],
                BM=TILE,
                STATS=stats,
                STAGES=launches[name].stages,
                **launches[name].options,
                **same,
                **arguments,
            )

        exact = stats or q.dtype == torch.float32
        run(
            entmax_refine,
            "refine",
            p_counter=counters[1:],
            p_passes=passes,
            tolerance=TOLERANCE["float32" if exact else "gradient" if gradient else "inference"],
            MAX_STEPS=MAX_STEPS,
        )
        run(
            entmax_sum,
            "sum",
            p_counter=counters[2:],
            p_v=v,
            p_out=out,
            p_slope_out=slope_out,
            p_support=support,
            p_live=live,
            GRADIENT=gradient,
            **strides("v", v),
            **strides("o", out),
            **strides("s", slope_out if gradient else out),
        )
    return outputs


entmax_attention_triton = torch.library.custom_op("longsplash::entmax_triton", _forward, mutates_args=())


@entmax_attention_triton.register_fake
def _(q, k, v, alpha, scale, power, causal, cu_seqlens, kv_lens, alibi_slopes, window, gradient, stats, skip_far):
    return _forward_outputs(unit_stride(q), k, kv_lens, gradient, stats)


@bfloat16_as_float32(n_outputs=3)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    slope_out: Tensor,
    tau: Tensor,
    bits: Tensor,
    rows: Tensor,
    blocks: Tensor,
    scale: float,
    power: str,
    alibi_slopes: Tensor | None,
    with_dalpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v; dalpha float32 (H,), 0 unless with_dalpha."""
    q, k, v, grad = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(grad)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), torch.zeros_like(alpha)
    batch, heads, n_queries, _ = q.shape
    shared = _shared(q, k, alibi_slopes, Intervals(rows, blocks), power)
    n_blocks, n_key_blocks = shared["n_blocks"], ceil_div(k.shape[2], TILE)
    delta = torch.empty_like(tau)
    dalpha = tau.new_empty((batch, heads, n_blocks) if with_dalpha else 0)
    counters = torch.zeros(2, dtype=torch.int32, device=q.device)
    alpha = alpha.contiguous()
    same = dict(
        p_q=q,
        p_k=k,
        p_v=v,
        p_do=grad,
        p_tau=tau,
        p_delta=delta,
        p_alpha=alpha,
        p_bits=bits,
        scale=scale,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", grad),
        **shared,
    )

    def run(kernel: Any, name: str, n_tasks: int, capacity: int, counter: Tensor, **arguments: Any) -> None:
        launch = launch_for(name, shared["BD"], q.dtype, q.device)
        n_programs = program_count(launch, q.device, n_tasks)
        kernel[(n_programs,)](
            p_list=torch.empty(n_programs * capacity, dtype=torch.int32, device=q.device),
            p_counter=counter,
            n_tasks=n_tasks,
            capacity=capacity,
            BM=TILE,
            STEP=launch.step,
            STAGES=launch.stages,
            **launch.options,
            **same,
            **arguments,
        )

    with on_device(q):
        run(
            entmax_backward_queries,
            "backward_queries",
            batch * heads * n_blocks,
            n_key_blocks,
            counters,
            p_slope_out=slope_out,
            p_dq=dq,
            p_dalpha=dalpha,
            DALPHA=with_dalpha,
            **strides("s", slope_out),
            **strides("d", dq),
        )
        run(
            entmax_backward_keys,
            "backward_keys",
            batch * k.shape[1] * n_key_blocks,
            n_blocks,
            counters[1:],
            p_dk=dk,
            p_dv=dv,
            n_key_blocks=n_key_blocks,
            TRANSPOSED=launch_for("backward_keys", shared["BD"], q.dtype, q.device).transposed,
            **strides("d", dk),
            **strides("e", dv),
        )
    return dq, dk, dv, dalpha.sum((0, 2)) if with_dalpha else torch.zeros_like(alpha)


backward_operator = torch.library.custom_op("longsplash::entmax_triton_backward", _backward, mutates_args=())


@backward_operator.register_fake
def _(grad, q, k, v, alpha, *_):
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), alpha.new_empty(alpha.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, alpha, scale, power, _, _, _, alibi_slopes, _, gradient, _, _ = inputs
    _, slope_out, tau, bits, support, live, passes, rows, blocks = output
    ctx.save_for_backward(q, k, v, alpha, slope_out, tau, bits, rows, blocks, alibi_slopes)
    ctx.scale, ctx.power, ctx.gradient = scale, power, gradient
    ctx.mark_non_differentiable(slope_out, tau, bits, support, live, passes, rows, blocks)
    ctx.set_materialize_grads(False)  # or zeros as large as slope_out are made for backward


def _gradients(backward, ctx, grad):
    if not ctx.gradient:
        raise RuntimeError("entmax_triton was called with gradient=False, so it kept nothing to differentiate with")
    *saved, alibi_slopes = ctx.saved_tensors
    with torch.no_grad():
        gradients = backward(grad, *saved, ctx.scale, ctx.power, alibi_slopes, ctx.needs_input_grad[3])
    return *once(gradients, grad, *saved[:4]), *(None,) * 10


torch.library.register_autograd(
    "longsplash::entmax_triton",
    lambda ctx, grad, *_: _gradients(backward_operator, ctx, grad),
    setup_context=_setup_context,
)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher's layers, which cost the host 0.4 ms for forward and backward."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, *_):
        return _gradients(_backward, ctx, grad)


def intercepted(*tensors: Tensor) -> bool:
    """Whether something traces or intercepts operators: torch.compile, dispatch modes, tensor subclasses."""
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return traced or any(type(x) not in PLAIN_TENSORS for x in tensors)


def run_attention(*inputs: Any) -> tuple[Tensor, ...]:
    """entmax_attention_triton with all its arguments by position: as the registered operator where something intercepts
    it, directly elsewhere."""
    return entmax_attention_triton(*inputs) if intercepted(*inputs[:4]) else _Eager.apply(*inputs)
