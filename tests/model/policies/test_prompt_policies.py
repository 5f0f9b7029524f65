"""What each policy of prompts selects, against its definition computed plainly or planted in the input, and what all
share."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.policies.blocks import block_means, line_weights, top_count, top_share
from model.policies.double_p import DoubleP
from model.policies.families import FAMILIES, policy_at
from model.policies.flexprefill import FlexPrefill, js_distance
from model.policies.lm_infinite import LMInfinite
from model.policies.minference import BlockSparse, Lines, VerticalSlash
from model.policies.patterns import Fixed
from model.policies.policy import Attended, SequenceView, SparsePolicy, masked_attention, use_policy
from model.policies.quest import Quest
from model.policies.selection import TokenSelection
from model.policies.snapkv import SnapKV
from model.policies.sparge import SpargeAttention, cosine_similarity
from model.policies.topk import OracleTopK
from model.policies.window import StreamingLLM
from tests.model.policies.policy_inputs import SLOPES, draw, mask_of, view_of, weights_of
from tests.model.test_transformer import make, tiny, tokens


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_attention_over_a_selection_is_renormalised_softmax() -> None:
    """In several blocks of queries, against weights that are cut and divided by their sum."""
    q, k, v = draw(150, 190)
    view = view_of(150, 190, SLOPES)
    mask = torch.rand(4, 150, 190, generator=torch.Generator().manual_seed(3)) < 0.2
    mask[:, torch.arange(150), torch.arange(40, 190)] = True
    p = weights_of(q, k, view) * mask
    expected = (p / p.sum(-1, keepdim=True)) @ v.double().repeat_interleave(2, 0)
    attended = masked_attention(q, k, v, view, TokenSelection(mask))
    torch.testing.assert_close(attended.out.double(), expected, atol=1e-5, rtol=1e-4)
    kept = mask & view.visible(slice(0, 150), 190, q.device)
    assert attended.kept.tolist() == kept.sum((1, 2)).tolist()
    assert attended.visible == sum(range(41, 191)) and attended.total_tiles == 2 + 3 + 3


@pytest.mark.parametrize("policy", [OracleTopK(3, 16), LMInfinite(20, 5), Fixed(24, 4)], ids=lambda policy: policy.name)
def test_small_blocks_of_queries_change_nothing(policy: SparsePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(200, 200)
    whole = policy.attend(q, k, v, view_of(200, 200, SLOPES))
    monkeypatch.setitem(__import__("model.policies.policy", fromlist=["x"]).SCORES_AT_ONCE, "cpu", 1)
    parts = policy.attend(q, k, v, view_of(200, 200, SLOPES))
    torch.testing.assert_close(parts.out, whole.out)
    assert parts.kept.tolist() == whole.kept.tolist() and parts.live_tiles.tolist() == whole.live_tiles.tolist()


def test_autocast_does_not_reach_the_selection() -> None:
    """Scores stay float32, computed from the model's bfloat16 queries and keys."""
    seen = []

    class Watched(StreamingLLM):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SequenceView) -> Attended:
            scores = view.scores(q, k, slice(0, q.shape[1]), k.shape[1])
            seen.append((q.dtype, scores.dtype, (q[:1].float() @ k[0].float().T).dtype))
            expected = q[0].double() @ k[0].double().T * view.scale
            shown = scores[0] > -torch.inf
            torch.testing.assert_close(scores[0][shown].double(), expected[shown], atol=1e-5, rtol=1e-5)
            return super().attend(q, k, v, view)

    model = make(tiny("softmax", "nope"))
    with torch.autocast("cpu", dtype=torch.bfloat16), use_policy(model, Watched(4, 1000)), torch.no_grad():
        out = model(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        dense = model(tokens())
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * 2
    assert (out - dense).abs().max() < 0.1 * dense.abs().max()


def test_streaming_llm_sees_sinks_and_window() -> None:
    q, k, _ = draw(20, 30)
    mask = mask_of(StreamingLLM(2, 3), q, k, view_of(20, 30))
    assert mask[0, 5].nonzero().flatten().tolist() == [0, 1, 13, 14, 15]
    cut = mask_of(StreamingLLM(2, 3), q, k, view_of(20, 30, key_start=1))
    assert cut[0, 5].nonzero().flatten().tolist() == [0, 13, 14, 15]


def test_the_oracle_keeps_the_heaviest_blocks() -> None:
    """For each block of queries no other set of as many blocks, its own among them, holds more weight."""
    q, k, _ = draw(96, 128)
    view = view_of(96, 128, SLOPES)
    mask = mask_of(OracleTopK(3, 32), q, k, view)
    mass = weights_of(q, k, view).unflatten(1, (3, 32)).unflatten(3, (4, 32)).sum((2, 4))  # [H, 3, 4]
    for block in range(3):
        mass[:, block, block + 1] = torch.inf  # own
        chosen = mask[:, 32 * block + 31, ::32]
        expected = torch.zeros(4, 4).scatter(1, mass[:, block].topk(3).indices, 1).bool()
        expected[:, block + 2 :] = False
        assert (chosen == expected).all()


def test_vertical_slash_finds_planted_lines() -> None:
    """Head 0 looks at key 37 from everywhere, head 1 back over 60 keys (the keys' second and third channels are a slow
    circle; the query turns it by 60 steps)."""
    n = 128
    angle = torch.arange(n) * 2 * math.pi / 200
    k = torch.zeros(1, n, 8)
    k[0, 37, 0] = 1
    k[0, :, 1], k[0, :, 2] = angle.cos(), angle.sin()
    q = torch.zeros(2, n, 8)
    q[0, :, 0] = 200
    q[1, :, 1], q[1, :, 2] = 5000 * (angle - angle[60]).cos(), 5000 * (angle - angle[60]).sin()
    lines = VerticalSlash(31, 31, 32).select(q, k, view_of(n, n))  # one line more than those that are always there
    assert isinstance(lines, Lines)
    assert lines.columns[0].nonzero().flatten().tolist() == [*range(30), 37]
    assert lines.distances[1].nonzero().flatten().tolist() == [*range(30), 60]
    mask = lines.mask(slice(0, n), n)
    assert mask[0, 37:, 37].all() and mask[1, torch.arange(60, n), torch.arange(n - 60)].all()


def test_line_weights_are_sums_over_columns_and_diagonals() -> None:
    q, k, _ = draw(5, 12)
    p = weights_of(q, k, view_of(5, 12)).float()
    by_key, by_distance = line_weights(p)
    torch.testing.assert_close(by_key, p.sum(1))
    for distance in range(12):
        expected = sum(p[:, i, 7 + i - distance] for i in range(5) if 7 + i >= distance)
        torch.testing.assert_close(by_distance[:, distance], expected)


def test_block_sparse_ranks_mean_scores() -> None:
    q, k, _ = draw(64, 80)
    mask = mask_of(BlockSparse(2, 16), q, k, view_of(64, 80))
    means = [x.unflatten(1, (-1, 16)).mean(2) for x in (q, k)]
    scores = means[0] @ means[1].repeat_interleave(2, 0).transpose(1, 2)
    for block in range(4):
        scores[:, block, block + 1], scores[:, block, block + 2 :] = torch.inf, -torch.inf
        expected = torch.zeros(4, 5).scatter(1, scores[:, block].topk(2).indices, 1).bool()
        assert (mask[:, 16 * block + 15, ::16] == expected).all()


def test_flexprefill_heads_choose_their_pattern() -> None:
    """Keys alike within blocks: pooling estimates their attention exactly, and head 0 takes the pooled blocks. One far
    key that mean keys hide: head 1 keeps its block as a vertical line."""
    n, size = 128, 16
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, n // size, 1, 8, generator=generator).expand(2, -1, size, 8).reshape(2, n, 8).clone()
    q = torch.randn(2, 1, 8, generator=generator).expand(2, n, 8).clone()
    k[1] = 0
    k[1, 40] = 400 * q[1, 0]
    k[1, 41:48] = -400 * q[1, 0] / 7
    view = view_of(n, n)
    p = weights_of(q.repeat_interleave(2, 0)[[0, 0, 2, 2]], k, view)[[0, 2]]
    blocks = p[:, -size:].sum(1).unflatten(1, (-1, size)).sum(2) / size
    estimate = (q.mean(1, keepdim=True) @ block_means(k, size).transpose(1, 2))[:, 0] * 8**-0.5
    assert js_distance(estimate.softmax(-1).double(), blocks)[1] > 0.3
    policy = FlexPrefill(0.5, 0.1, 2 * size, size)  # two lines of blocks each, the first of which are always there
    mask = mask_of(policy, q, k, view)
    assert mask[1, 48:, 32:48].all()  # the block of key 40
    assert not mask[1, 96:, 16:32].any()
    pooled = (block_means(q, size) @ block_means(k, size).transpose(1, 2))[0] * 8**-0.5
    pooled = pooled.masked_fill(~torch.ones(8, 8).tril().bool(), -torch.inf).softmax(-1)
    heaviest = pooled.flatten().argmax()
    assert mask[0, size * (heaviest // 8) + size - 1, size * (heaviest % 8)]
    assert mask[:, :, 0].all()  # the first block always


def test_js_distance() -> None:
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    torch.testing.assert_close(js_distance(p, q), torch.tensor([math.sqrt(math.log(2)), 0.0]))


def test_sparge_first_filter_judges_blocks_that_are_alike() -> None:
    q, k, _ = draw(64, 64)
    alike, unlike = (
        SpargeAttention(0.3, similarity=0.0, query_block=16, key_block=8),
        SpargeAttention(0.3, similarity=1.0),
    )
    assert mask_of(unlike, q, k, view_of(64, 64)).sum() == 4 * 64 * 65 / 2  # nothing is judged
    mask = mask_of(alike, q, k, view_of(64, 64))
    means = [q.unflatten(1, (-1, 16)).mean(2), k.unflatten(1, (-1, 8)).mean(2).repeat_interleave(2, 0)]
    scores = means[0] @ means[1].transpose(1, 2) * 8**-0.5
    for block in range(4):
        scores[:, block, 2 * block + 2 :] = -torch.inf
    for head, block in ((0, 3), (3, 2)):
        p = scores[head, block].softmax(-1)
        order, expected = p.argsort(descending=True), torch.zeros(8, dtype=torch.bool)
        for place in order.tolist():
            if p[expected].sum() < 0.3:
                expected[place] = True
        expected[2 * block : 2 * block + 2] = True
        assert (mask[head, 16 * block + 15, ::8] == expected).all()


def test_cosine_similarity_is_the_mean_over_pairs() -> None:
    _, k, _ = draw(1, 21)
    found = cosine_similarity(k, 8)
    for block in range(3):
        rows = torch.nn.functional.normalize(k[:, 8 * block : 8 * block + 8], dim=-1)
        torch.testing.assert_close(found[:, block], (rows @ rows.transpose(1, 2)).mean((1, 2)))


def test_sparge_second_filter_is_the_online_softmax() -> None:
    """Against the algorithm block by block: running maximum, denominator with all weights, values left out."""
    q, k, v = draw(40, 64, size=4.0)
    policy = SpargeAttention(1.0, margin=-3.0, query_block=16, key_block=8, warp_rows=4)
    view = view_of(40, 64)
    attended = policy.attend(q, k, v, view)
    scores = view.scores(q, k, slice(0, 40), 64).double()
    values = v.double().repeat_interleave(2, 0)
    skipped = 0
    for head in range(4):
        for warp in range(0, 40, 4):
            rows = slice(warp, warp + 4)
            top, out, total = (
                torch.full((4, 1), -torch.inf).double(),
                torch.zeros(4, 8).double(),
                torch.zeros(4, 1).double(),
            )
            for start in range(0, 64, 8):
                part = scores[head, rows, start : start + 8]
                local = part.amax(1, keepdim=True)
                if not (local > -torch.inf).any():
                    continue
                before, top = top, torch.maximum(top, local)
                p = (part - top).exp()
                out, total = out * (before - top).exp(), total * (before - top).exp() + p.sum(1, keepdim=True)
                if (local - top).amax() < -3:
                    skipped += int((part > -torch.inf).sum())
                else:
                    out = out + p @ values[head, start : start + 8]
            torch.testing.assert_close(attended.out[head, rows].double(), out / total, atol=1e-4, rtol=1e-4)
    assert skipped > 100 and int(attended.kept.sum()) == 4 * int(attended.visible) - skipped


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 50))
@settings(max_examples=30)
def test_top_share_is_the_smallest_set(share: float, seed: int) -> None:
    p = torch.rand(3, 20, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    kept = top_share(p, share)
    sums = (p * kept).sum(-1)
    assert (sums >= share - 1e-6).all()
    least = p.masked_fill(~kept, torch.inf).amin(-1)
    assert (p.masked_fill(kept, -torch.inf).amax(-1) <= least).all()
    assert share >= 1 or (sums - least < share + 1e-6).all()


def test_top_count_takes_numbers_of_rows() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert top_count(x, 2).tolist() == [[True, False, True], [False, True, True]]
    assert top_count(x, torch.tensor([0, 1])).tolist() == [[False] * 3, [False, False, True]]


def test_density_rises_with_the_level() -> None:
    """Of every family, on one prompt and one token behind it."""
    q, k, v = draw(128, 128)
    for name in FAMILIES:
        densities = []
        for level in (0.1, 0.4, 0.7, 1.0):
            policy, view = policy_at(name, level, 128), view_of(128, 128, SLOPES)
            if "prefill" not in policy.phases:
                policy.observe(q[:, :127], k[:, :127], view_of(127, 127, SLOPES, memory=view.memory))
                view = replace(view, decoding=True, query_start=127)
            attended = policy.attend(q[:, -1:] if view.decoding else q, k, v, view)
            densities.append(float(attended.read.float().mean() / attended.visible))
        assert densities == sorted(densities) and densities[0] < 0.5 and densities[-1] == 1, (name, densities)


def test_settings_that_mean_nothing_are_errors() -> None:
    for wrong, said in (
        (lambda: OracleTopK(2, 48), "block is 48: expected a divisor of 64"),
        (lambda: Quest(0), "pages is 0"),
        (lambda: VerticalSlash(1, 0), "slashes is 0"),
        (lambda: BlockSparse(0), "blocks is 0"),
        (lambda: FlexPrefill(1.2), "coverage is 1.2: expected a share"),
        (lambda: FlexPrefill(0.5, tau=-1), "tau is -1"),
        (lambda: SnapKV(4, pooled=2), "pooled is 2: expected an odd"),
        (lambda: DoubleP(0.5, 0.6), "exact is 0.6: expected at most coverage"),
        (lambda: SpargeAttention(0.5, margin=1), "margin is 1: expected a negative"),
        (lambda: SpargeAttention(0.5, warp_rows=48), "warp_rows is 48: expected a divisor"),
        (lambda: policy_at("windows", 0.5, 9), "policy is 'windows': expected one of window"),
        (lambda: policy_at("window", 0, 9), r"level is 0: expected a number in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
