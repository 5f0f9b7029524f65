"""A study with made-up numbers: of a sparse run and of a dense one."""

from eval.common.metrics import Series
from eval.held_out.analysis import choose_baseline, pair, summarise
from eval.held_out.attention_profile import LayerProfile
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import Measurement
from eval.held_out.multi_needle import MultiNeedleCell
from eval.held_out.needle import NeedleCell
from eval.held_out.perplexity import PerplexityPlan, PerplexityResult, Sums, Window
from eval.held_out.report import Study

CONFIG = EvalConfig(lengths=[1, 2])
PLAN = PerplexityPlan(
    8, [Window(0, 0, 8), Window(1, 0, 8)], 4, 32, [0, 1, 2, 3, 4, 5], [1, 2], [0, 4, 16], ["8x was dropped."]
)


def measurement(label: str, kind: str, scale: float) -> Measurement:
    def sums(tokens: int) -> Sums:
        losses = [scale * tokens, 1.5 * scale * tokens] * 3
        return Sums([0, 1, 2, 3, 4, 5], losses, [tokens] * 6, [2 * tokens, 3 * tokens] * 3)

    sparse, dense = (
        [
            LayerProfile(m, i, support, live, alpha, None, [0.5 * m, 1.5], [0.25, 0.75], [0.1 * i, 0.5])
            for m in (1, 2)
            for i in (0, 1)
        ]
        for support, live, alpha in (([3.0, 5.0], [0.5, 0.25], [1.5, 1.4]), ([4.5, 4.5], [1.0, 1.0], None))
    )
    cells = [NeedleCell(m, d, [m, 4], [4, 4]) for m in (1, 2) for d in (0.0, 1.0)]
    return Measurement(
        label=label, checkpoint=f"runs/{label}/checkpoints/step-00000005", step=5, training={"tokens": 1000},
        model={"attention": {"kind": kind}}, parameters=4_000_000, policy="", training_length=8, precision="float32",
        hardware="test", date="2026-01-01", seconds={"perplexity": 1.0}, plan=PLAN,
        perplexity=PerplexityResult(sums(8), {1: sums(16), 2: sums(16)}, [[scale * 4, 12.0]] * 6, [4, 12]),
        needles=[*cells, NeedleCell(1, None, [0, 1], [4, 4])], needle_notes=[],
        multi_needles=[MultiNeedleCell("multi_key", 1, [4, 2], [4, 4])],
        attention=sparse if kind == "asentmax" else dense,
    )  # fmt: skip


def study(measurements: list[Measurement]) -> Study:
    baseline = choose_baseline(measurements)
    metrics = {"train/loss": Series([0, 1, 2], [5.0, 4.0, 3.5]), "val/loss": Series([2], [3.6])}
    alphas = {
        "alpha/layer_00/head_00": Series([0, 2], [1.5, 1.4]),
        "alpha/layer_01/head_00": Series([0, 2], [1.5, 1.6]),
    }
    return Study(
        config=CONFIG, measurements=measurements, runs=[summarise(one) for one in measurements],
        pairs=[pair(one, baseline) for one in measurements if one is not baseline], seeds=[],
        settings={one.label: {"kind": one.label, "seed": "1"} for one in measurements},
        metrics={one.label: {**metrics, **(alphas if one.label == "sparse" else {})} for one in measurements},
        base_length=8, data="prepared/x", data_fingerprint="f" * 64, code_version="abc", command="python -m eval.run x",
        hardware="test machine", date="2026-01-01", notes=PLAN.notes, seconds=2.0,
    )  # fmt: skip


TWINS = [measurement("sparse", "asentmax", 1.0), measurement("dense", "softmax", 1.25)]
