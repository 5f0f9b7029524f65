"""The pass over keys in parts of even cost."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels.alpha_entmax.backward_launches as backward_launches
from kernels.alpha_entmax.column_plan import parts_of
from tests.kernels.helpers import DEVICE, MIXED, check_float32, draw_qkv, needs_triton

pytestmark = needs_triton

N_TOKENS = 300  # 5 tiles


def with_sink(n_queries: int = N_TOKENS, batch: int = 1) -> tuple[Tensor, ...]:
    """Two query heads to a key head; every query weighs key 3, as a trained model's its first token, and few others."""
    q, k, v, weight = draw_qkv(4, 2, n_queries, N_TOKENS, batch=batch, size=2.0)
    q, k = q.detach().clone(), k.detach().clone()
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, 3, 0] = 12.0
    return q.requires_grad_(), k.requires_grad_(), v, weight


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each pass over keys was planned as."""
    found: list[dict[str, Any]] = []
    plan = backward_launches._Backward._plan

    def spy(self: Any, *given: Any) -> dict[str, Any]:
        found.append(plan(self, *given))
        return found[-1]

    monkeypatch.setattr(backward_launches._Backward, "_plan", spy)
    monkeypatch.setattr(backward_launches, "SHARES_PER_PROGRAM", 16)  # the interpreter has two programs
    monkeypatch.setattr(backward_launches, "ITEMS_PER_PART", 1)
    return found


def check_plan(plan: dict[str, Any]) -> None:
    """Parts follow one another within their item, from step 0 on, and the sums of all have a place."""
    n_parts = plan["p_n_parts"].item()
    parts, cuts = plan["p_parts"][:n_parts].tolist(), plan["p_cuts"].tolist()
    assert n_parts <= plan["p_sums"].shape[0]
    assert n_parts == sum(count for _, count in cuts)
    place = 0
    for item, (first, count) in enumerate(cuts):
        if count:
            assert first == place and count > 1
            mine = parts[first : first + count]
            assert [part[0] for part in mine] == [item] * count
            assert [part[1] for part in mine] == [0] + [part[2] for part in mine[:-1]]
            assert all(start < stop for _, start, stop in mine)
            place += count


@pytest.mark.parametrize("longest", [0, 1 << 15], ids=["tiles", "keys"])
@pytest.mark.parametrize("alpha", [1.5, MIXED], ids=str)
def test_a_sink_is_cut(longest: int, alpha: Any, plans: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.alpha_entmax.results.LONGEST_KEY_LIST", longest)
    monkeypatch.setattr(backward_launches, "SHORTEST_PLAN", 0)
    inputs = with_sink()
    check_float32(inputs, alpha)
    (plan,) = plans
    check_plan(plan)
    n_tiles = plan["p_cuts"].shape[0] // 2
    assert plan["p_cuts"].view(2, n_tiles, 2)[:, 0, 1].tolist() != [0, 0]  # the sink's tile
    tiles, queries = (plan[name][: 4 * n_tiles].view(4, n_tiles) for name in ("p_tile_counts", "p_query_counts"))
    if longest:
        assert (queries[:, 0] > 0.9 * N_TOKENS).all()
    assert (tiles[:, 0] == n_tiles).all()


@pytest.mark.parametrize("options", [{}, dict(causal=False), dict(window=100)], ids=str)
def test_documents_windows_and_batches_are_planned(options: dict, plans: list) -> None:
    check_float32(with_sink(batch=2), MIXED, **options)
    check_float32(with_sink(100), MIXED, kv_lens=torch.tensor([250], dtype=torch.int32, device=DEVICE), **options)
    documents = torch.tensor([0, 5, 5, 210, N_TOKENS], dtype=torch.int32, device=DEVICE)
    check_float32(with_sink(), MIXED, cu_seqlens=documents, **options)
    assert len(plans) == 3
    for plan in plans:
        check_plan(plan)


def test_parts_are_no_shorter_than_asked(plans: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a share would be shorter than LEAST_STEPS nothing is cut."""
    monkeypatch.setattr(backward_launches, "LEAST_STEPS", 1000)
    check_float32(with_sink(), MIXED)
    assert plans[0]["p_n_parts"].item() == 0


@pytest.mark.parametrize(
    ("steps", "share", "parts"), [(31, 16, 0), (32, 16, 2), (289, 16, 17), (1032, 16, 61), (0, 1, 0)]
)
def test_no_part_is_empty(steps: int, share: int, parts: int) -> None:
    found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    _parts[(1,)](torch.tensor([steps], dtype=torch.int32, device=DEVICE), share, found)
    assert found.item() == parts
    if parts:
        length = -(-steps // parts)
        assert (parts - 1) * length < steps <= parts * length


@triton.jit
def _parts(p_steps, share, p_parts):
    i = tl.arange(0, 1)
    tl.store(p_parts + i, parts_of(tl.load(p_steps + i), share))


@pytest.mark.parametrize("items_per_part", [2, 5, 10])
def test_parts_are_no_more_than_there_is_memory_for(
    items_per_part: int, plans: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares are doubled until they are."""
    monkeypatch.setattr(backward_launches, "ITEMS_PER_PART", items_per_part)
    check_float32(with_sink(), MIXED)
    check_plan(plans[0])


def test_a_short_pass_has_no_plan(plans: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.alpha_entmax.results.LONGEST_KEY_LIST", 0)  # lists of tiles, which need none
    check_float32(with_sink(), MIXED)
    assert not plans
