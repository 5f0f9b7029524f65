"""A pattern for each head: what is selected, how it is found, and its file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.loading import model_fingerprint
from model.policies.head_patterns import (
    A_SHAPE,
    BLOCK_SPARSE,
    VERTICAL_SLASH,
    Calibration,
    Candidate,
    HeadPatterns,
    RecallCollector,
    best_patterns,
    candidates,
    load_patterns,
    raised,
    read_patterns,
    save_patterns,
)
from model.policies.minference import BlockSparse, VerticalSlash
from model.policies.policy import use_policy
from model.policies.window import StreamingLLM
from tests.model.policies.policy_inputs import draw, mask_of, view_of, weights_of
from tests.model.test_transformer import make, tiny, tokens

MIXED = HeadPatterns(
    "mixed", torch.tensor([[A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE, VERTICAL_SLASH]]),
    torch.tensor([[[3, 9], [40, 35], [2, 0], [35, 50]]]),
)  # fmt: skip
CALIBRATION = Calibration("fingerprint", "runs/x", 7, 0.1, 512, 2, None, None, 0.5, 0.1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("n_queries", [200, 70])
def test_each_head_has_its_own_pattern(n_queries: int) -> None:
    q, k, _ = draw(n_queries, 200)
    view = view_of(n_queries, 200)
    found = mask_of(MIXED, q, k, view)
    alone = [StreamingLLM(3, 9), VerticalSlash(40, 35), BlockSparse(2), VerticalSlash(35, 50)]
    for head, policy in enumerate(alone):
        expected = mask_of(policy, q, k, view)
        assert (found[head] == expected[min(head, len(expected) - 1)]).all(), policy
    assert len({tuple(head.flatten().tolist()) for head in found}) == 4


def test_candidates_read_about_as_much_as_each_other() -> None:
    """Their pairs over all visible ones, on random scores."""
    q, k, _ = draw(512, 512, size=0.1)
    shares = []
    for one in candidates(0.25, 512):
        mask = mask_of(HeadPatterns.everywhere(one, 1, 4), q, k, view_of(512, 512))
        shares.append(float(mask.float().mean()) * 2)
    assert max(shares) < 2 * min(shares) and min(shares) > 0.15 and max(shares) < 0.45, shares


def planted(n: int) -> tuple[Tensor, Tensor]:
    """Heads that look at six keys; at one distance; at the block of their topic; at their last keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(4, n, 64), torch.zeros(4, n, 64)
    q[0, :, 0] = 60.0
    k[0, [70, 111, 200, 260, 333, 401], 0] = 8.0
    angle = torch.arange(n)[:, None] * torch.rand(32, generator=generator) * 3
    turn = lambda shift: torch.cat(((angle - shift).cos(), (angle - shift).sin()), -1)  # noqa: E731
    q[1], k[1] = 12 * turn(0), turn(-angle[100] + angle[0])
    block, seen = torch.arange(n) // 64, torch.tensor([0, 0, 0, 1, 0, 3, 1, 4])  # the earlier block that each looks at
    topics = torch.nn.functional.one_hot(block, 64).float()
    q[2], k[2] = 14 * topics[64 * seen[block]], 6 * topics
    q[3], k[3] = 12 * turn(0), turn(0)
    return q, k


def test_planted_patterns_are_found() -> None:
    q, k = planted(512)
    view = replace(view_of(512, 512), n_layers=1)
    tried = candidates(0.3, 512)
    collector = RecallCollector([HeadPatterns.everywhere(one, 1, 4) for one in tried], 1, 4)
    collector.observe(q, k, replace(view, scale=64**-0.5))
    found, recall, density = best_patterns(collector, tried, "")
    assert (recall == collector.recall.amax(0)).all() and density.max() < 0.5
    kinds, sizes = found.kinds[0].tolist(), found.sizes[0].tolist()
    assert kinds[:3] == [VERTICAL_SLASH, VERTICAL_SLASH, BLOCK_SPARSE] and kinds[3] != BLOCK_SPARSE
    assert sizes[0][0] > sizes[1][0] and collector.recall.amax(0).min() > 0.5


def test_recall_is_the_share_of_weight_over_several_texts() -> None:
    policies = [MIXED, HeadPatterns.everywhere(Candidate(A_SHAPE, (1, 30)), 1, 4)]
    collector, expected = RecallCollector(policies, 1, 4), torch.zeros(2, 4, dtype=torch.float64)
    pairs = torch.zeros(2, 4)
    for seed, n in ((0, 90), (1, 40)):
        q, k, _ = draw(n, n, seed)
        view = view_of(n, n)
        collector.observe(q, k, view)
        kept = [(weights_of(q, k, view) * mask_of(policy, q, k, view)).sum((-1, -2)) for policy in policies]
        expected += torch.stack(kept)
        pairs += torch.stack([mask_of(policy, q, k, view).sum((-1, -2)) for policy in policies])
    torch.testing.assert_close(collector.recall[:, 0], expected / 130, atol=1e-5, rtol=1e-5)
    assert (collector.density[:, 0] == pairs.double() / (90 * 91 // 2 + 40 * 41 // 2)).all()


def test_refinement_raises_what_keeps_too_little_and_ends() -> None:
    q, k, _ = draw(300, 300)
    view, policy, before = view_of(300, 300), MIXED, torch.zeros(1, 4)
    for _ in range(30):
        collector = RecallCollector([policy], 1, 4)
        collector.observe(q, k, view)
        recall = collector.recall[0]
        assert (recall >= before - 1e-9).all()
        more = raised(policy, recall, 0.99, 300)
        assert (more.sizes >= policy.sizes).all() and (more.sizes == policy.sizes)[recall >= 0.99].all()
        if (more.sizes == policy.sizes).all():
            break
        policy, before = more, recall
    assert (recall >= 0.99).all() and (policy.sizes > MIXED.sizes).any()


def test_levels_go_from_sparse_over_the_searched_density_to_dense() -> None:
    at = lambda level, length: MIXED.scaled(level, CALIBRATION, length).sizes  # noqa: E731
    assert (at(0.1, 512) == MIXED.sizes.clamp(min=1)).all() and at(0.1, 256)[0, 1].tolist() == [20, 18]
    levels = [at(level, 200) for level in (0.01, 0.05, 0.1, 0.3, 0.7, 1.0)]
    assert all((a <= b).all() for a, b in zip(levels, levels[1:], strict=False))
    blocks = HeadPatterns.everywhere(Candidate(BLOCK_SPARSE, (4, 0)), 1, 1)
    read = [int(blocks.scaled(level, CALIBRATION, 4096).sizes[0, 0, 0]) for level in (0.1, 0.2, 0.5, 1.0)]
    assert read == [32, 40, 52, 64]  # of 64: of 512 tokens 4 of 8 were found
    assert levels[0].tolist()[0][0] == [1, 1] and levels[-1][0, :, 0].tolist() == [200, 200, 4, 200]
    q, k, _ = draw(200, 200)
    assert mask_of(MIXED.scaled(1.0, CALIBRATION, 200), q, k, view_of(200, 200)).sum() == 4 * 200 * 201 / 2


def test_file_belongs_to_its_model(tmp_path: Path) -> None:
    path, model = tmp_path / "patterns.safetensors", make(tiny("softmax", "nape"))
    save_patterns(path, MIXED, CALIBRATION)
    policy, calibration = read_patterns(path)
    assert calibration == CALIBRATION and (policy.kinds == MIXED.kinds).all() and (policy.sizes == MIXED.sizes).all()
    with pytest.raises(ValueError, match=r"belongs to model fingerprint \(runs/x\).*eval.search_patterns"):
        load_patterns(path, model)
    with use_policy(model, RecallCollector([], 2, 4)), torch.no_grad():
        model(tokens())
    save_patterns(path, replace(MIXED, kinds=MIXED.kinds + 1), CALIBRATION)
    with pytest.raises(ValueError, match=r"has patterns of shape \(1, 4\) .* expected indices of a_shape"):
        read_patterns(path)
    fits = replace(CALIBRATION, model=model_fingerprint(model))
    save_patterns(path, MIXED, fits)  # one layer of two
    with pytest.raises(ValueError, match="belongs to model"):
        load_patterns(path, model)
    for wrong in (replace(CALIBRATION, density=1.0), replace(CALIBRATION, length=0)):
        save_patterns(path, MIXED, wrong)
        with pytest.raises(ValueError, match="was searched for density .* expected a share below 1 and a text"):
            read_patterns(path)
    save_patterns(path, MIXED, replace(CALIBRATION, block=32))
    with pytest.raises(ValueError, match=r"has format, block \(1, 32\), expected \(1, 64\): make it again"):
        read_patterns(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="holds no patterns of eval.search_patterns"):
        read_patterns(path)
    with pytest.raises(FileNotFoundError, match=r"python -m eval.search_patterns \.\.\."):
        read_patterns(tmp_path / "none")
