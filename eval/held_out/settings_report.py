"""The report's part on the runs: what they are, how they were trained, and in what they differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.held_out.measurement import Measurement
from eval.reporting.document import Block, Details, Heading, Paragraph, Table
from model.config import TRAINED_SPARSE, AttentionConfig, config_from_dict

MATTERING = {  # key of the resolved configuration -> what it is, with its unit
    "model.network.n_layers": "layers",
    "model.network.d_model": "width",
    "model.network.n_heads": "query heads",
    "model.network.n_kv_heads": "key/value heads",
    "model.network.positions": "positions",
    "model.network.attention.alpha": "alpha, at the start",
    "model.optimizer.lr": "learning rate, at its peak",
    "model.optimizer.schedule": "schedule",
    "data.global_batch_size": "sequences a step",
    "data.sources": "training data",
    "trainer.max_steps": "planned steps",
    "trainer.precision": "precision",
    "seed_everything": "seed",
}
OF_SPARSE = {f"model.network.attention.{kind}": kind for kind in TRAINED_SPARSE}
OF_ALPHA = ("alpha", "learn_alpha", "alpha_min", "alpha_max", "anneal_steps", "anneal_from")
OF_ADAPTIVE = ("temperature_offset", "temperature_range", "temperature_bias")
ONLY_FOR = {  # key -> the property of an AttentionConfig that has such a setting
    **{f"model.network.attention.{name}": "has_alpha" for name in OF_ALPHA},
    **{f"model.network.attention.{name}": "has_adaptive_temperature" for name in OF_ADAPTIVE},
    "model.network.attention.backend": "is_entmax",
    "model.optimizer.alpha_lr_factor": "has_alpha",
}
SOURCE = re.compile(r"'path': '([^']*)'")
NOT_ITS = "–"  # of a setting that a run does not have


def run_blocks(measurements: Sequence[Measurement], settings: Mapping[str, Mapping[str, str]]) -> list[Block]:
    """settings: resolved training configuration of each run by label, flattened to dotted keys."""
    labels = [one.label for one in measurements]
    attention = {one.label: config_from_dict(one.model).attention for one in measurements}
    known = [
        [name, *(_its(key, settings.get(label, {}).get(key, NOT_ITS), its) for label, its in attention.items())]
        for key, name in MATTERING.items()
    ]
    rows = [
        ["attention", *(its.kind for its in attention.values())],
        ["parameters", *(f"{one.parameters:,}" for one in measurements)],
        ["optimizer steps", *(f"{one.step:,}" for one in measurements)],
        ["tokens trained on", *(_count(one.training.get("tokens")) for one in measurements)],
        ["training length (tokens)", *(f"{one.training_length:,}" for one in measurements)],
        *(row for row in known if set(row[1:]) != {NOT_ITS}),
    ]
    blocks: list[Block] = [Heading("Runs"), Table(["", *labels], rows, numeric=False)]
    if len(labels) > 1:
        differences = [
            [key, *(_its(key, value, its) for value, its in zip(values, attention.values(), strict=True))]
            for key, *values in config_differences(settings)
            if key not in OF_SPARSE  # null for other kinds; what it holds has rows of its own
        ]
        blocks.append(Heading("What differs between the runs", 3))
        if differences:
            blocks.append(Table(["setting", *labels], differences, numeric=False))
        else:
            blocks.append(Paragraph("Their resolved configurations are the same."))
    made = [
        ["checkpoint", *(one.checkpoint for one in measurements)],
        ["trained with code", *(str(one.training.get("code_version", "unknown")) for one in measurements)],
        ["evaluated in", *(one.precision for one in measurements)],
        ["evaluation (s)", *(f"{sum(one.seconds.values()):.0f}" for one in measurements)],
        ["evaluated on", *(f"{one.hardware}, {one.date}" for one in measurements)],
    ]
    return [*blocks, Details("Checkpoints", [Table(["", *labels], made, numeric=False)])]


def _its(key: str, value: str, attention: AttentionConfig) -> str:
    """The value where a model with this attention has such a setting: softmax has no alpha."""
    if key == "data.sources":  # corpora as they are flattened to text; their paths say enough
        value = ", ".join(SOURCE.findall(value)) or value
    parent = key.rpartition(".")[0]
    if parent in OF_SPARSE:
        return value if OF_SPARSE[parent] == attention.kind else NOT_ITS
    return value if key not in ONLY_FOR or getattr(attention, ONLY_FOR[key]) else NOT_ITS


def config_differences(settings: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Rows [key, value of each run] of the keys whose values are not all the same."""
    keys = sorted({key for one in settings.values() for key in one})
    # run_dir differs always and is the runs' name.
    rows = [[key, *(one.get(key, "not set") for one in settings.values())] for key in keys if key != "run_dir"]
    return [row for row in rows if len(set(row[1:])) > 1]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"
