"""The measurements of eval.sparse_frontier on one checkpoint, kept one by one, so that an interrupted one goes on."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.common import provenance
from eval.common.results import result_key, reuse
from eval.common.scoring import Runtime, Scores
from eval.common.subjects import Subject, choose_autocast, file_fingerprint
from eval.held_out.texts import HeldOut
from eval.ruler.files import FrozenTask
from eval.sparse_frontier.config import PHASES, Cell, FrontierConfig, PrefillTime, RulerCell
from eval.sparse_frontier.ruler_answers import write_answers
from eval.sparse_frontier.tasks import Scorer, Tasks, entmax_density, make_tasks, set_density, time_prefill
from model.loading import load_model
from model.policies.bsfa import BlockSparseFlash, load_policy
from model.policies.families import calibrated_densities, policy_at
from model.policies.head_patterns import HeadPatterns, load_patterns
from model.policies.policy import Phase, SparsePolicy
from model.policies.thresholds import read_thresholds
from model.transformer import Transformer

Place = tuple[str, Phase, int, float | None]  # method, phase, multiple; density it is set to, None of a model as it is
BSFA, MINFERENCE = BlockSparseFlash.name, HeadPatterns.name


TEXT = ("seed", "max_documents", "row_tokens")  # which held-out text is read, and how
DECODING = ("decode_tokens", "chunk_tokens")
NEEDLES = ("needle_samples", "needle_tokens", "needle_depths", "needle_digits", "needle_count")


@dataclass(frozen=True)
class CellSettings:
    """All that decides one kept result, besides checkpoint, data and code. precision: as Measuring has it. longest: of
    the lengths in multiples, which decides the documents and windows; None where no held-out text is read. config: of
    FrontierConfig's settings those that matter."""

    what: str
    method: str
    phase: str
    multiple: int
    wanted: float | None
    precision: str
    longest: int | None
    config: dict[str, Any]


def deciding(what: str, phase: str, wanted: float | None) -> tuple[str, ...]:
    """The settings of FrontierConfig that decide a result: "cell", "prefill-time" or "ruler-TASK"."""
    decoding = DECODING if phase == "decode" else ()
    if what == "cell":
        return (*TEXT, *decoding, *NEEDLES)
    if what == "prefill-time":
        return (*TEXT, "timed_runs")
    # policies are set to their density on held-out text; models as they are read the frozen samples alone
    return decoding if wanted is None else (*TEXT, *decoding)


class Measuring:
    """All that is measured of one checkpoint: read where it is kept in output/results, else with the model, which is
    loaded then.

    Attributes: subject. precision: as the report shows it. beside: places that this command's processes have measured,
    which said what they reused.
    """

    def __init__(
        self, subject: Subject, held_out: HeldOut, output: Path, config: FrontierConfig, device: torch.device
    ) -> None:
        self.subject, self.held_out, self.output, self.config = subject, held_out, output, config
        autocast = choose_autocast(config.precision, subject, device)
        self.runtime = Runtime(device, autocast, config.row_tokens)
        self.precision = "float32" if autocast is None else "bfloat16 autocast"
        self.entmax = subject.checkpoint.architecture.attention.is_entmax
        self._model: Transformer | None = None
        self._found: dict[tuple[str, Phase, int, float], SparsePolicy] = {}
        self.beside: set[Place] = set()
        self.ks: list[int] = []  # that bsfa was calibrated for
        if config.thresholds is not None and not self.entmax:
            path = Path(config.thresholds)
            self.ks = read_thresholds(path)[1].ks
            self.fingerprint_of_thresholds = file_fingerprint(path)
            # refuses another model's before anything is measured
            self.bsfa = load_policy(path, self.ks[0], self.model)
        self.patterns: HeadPatterns | None = None
        if config.patterns is not None and not self.entmax:
            path = Path(config.patterns)
            self.patterns, self.searched = load_patterns(path, self.model)
            self.fingerprint_of_patterns = file_fingerprint(path)

    @property
    def model(self) -> Transformer:
        if self._model is None:
            self._model = load_model(self.subject.checkpoint.path, self.runtime.device).model
        return self._model

    def release(self) -> None:
        self._model = None

    def as_they_are(self) -> list[Cell]:
        """The model without a policy, in each phase and at each length."""
        method = "entmax" if self.entmax else "dense"
        return [self._cell((method, phase, m, None)) for phase in PHASES for m in self.held_out.plan.multiples]

    def under_policies(self, own: Mapping[tuple[Phase, int], float]) -> list[Cell]:
        """Each policy in its phases. own: as of `places`."""
        return [self._cell(place) for place in self.places(own)]

    def places(self, own: Mapping[tuple[Phase, int], float]) -> list[Place]:
        """Of the cells of `under_policies`. own: a further density of each phase and length, the entmax model's."""
        return [
            (name, phase, multiple, wanted)
            for phase in PHASES
            for multiple in self.held_out.plan.multiples
            for policy, name, densities in self._policies(multiple, own.get((phase, multiple)))
            if phase in policy.phases
            for wanted in densities
        ]

    def measure_place(self, place: Place, sets: Sequence[FrozenTask]) -> None:
        """A cell and what it has of RULER, which are kept."""
        self.on_ruler([self._cell(place)], sets)

    def is_kept(self, place: Place, sets: Sequence[FrozenTask]) -> bool:
        """Whether `measure_place` would find all of it."""
        context = place[2] * self.held_out.base_length
        files = [self._cell_file(place), *(self._ruler_file(place, one) for one in sets if one.length == context)]
        return all(file.is_file() for file in files)

    def on_ruler(self, cells: Sequence[Cell], sets: Sequence[FrozenTask]) -> list[RulerCell]:
        """The files of each cell's length under its attention. cells: of this checkpoint."""
        return [self._ruler_cell(cell, one) for cell in cells for one in sets if one.length == cell.context]

    def times(self, own: Mapping[tuple[Phase, int], float]) -> list[PrefillTime]:
        """Prefill times of the model as it is, and of policies whose attention skips what it does not keep."""
        found = []
        config = self.subject.checkpoint.architecture
        for multiple in self.held_out.plan.multiples:
            found.append(self._time("entmax" if self.entmax else "dense", multiple, None))
            for policy, name, densities in self._policies(multiple, own.get(("prefill", multiple))):
                if "prefill" in policy.phases and policy.faster(self.runtime.device, config):
                    found += [self._time(name, multiple, wanted) for wanted in densities]
        return found

    def _policies(self, multiple: int, own: float | None) -> list[tuple[SparsePolicy, str, list[float]]]:
        """Each policy that is compared, at some sparse setting, its name, and the densities it is set to at this
        length."""
        if self.entmax:
            return []
        wanted = sorted({*self.config.densities, *([own] if own else [])})
        context = multiple * self.held_out.base_length
        found = [(policy_at(name, 0.5, context), name, wanted) for name in self.config.policies]
        if self.ks:
            found.append((self.bsfa, BSFA, list(calibrated_densities(self.ks, context))))
        if self.patterns is not None:
            found.append((self.patterns, MINFERENCE, wanted))
        return found

    def _kept(
        self,
        what: str,
        method: str,
        phase: str,
        multiple: int,
        wanted: float | None,
        frozen: FrozenTask | None = None,
    ) -> Path:
        alone = frozen is not None and wanted is None  # without held-out text
        config = {name: getattr(self.config, name) for name in deciding(what, phase, wanted)}
        longest = None if alone else self.held_out.plan.multiples[-1]
        settings = CellSettings(what, method, phase, multiple, wanted, self.precision, longest, config)
        kind = provenance.hardware(self.runtime.device)
        base, path = self.held_out.base_length, self.subject.checkpoint.path
        read = "" if alone else self.held_out.fingerprint
        if method == BSFA:
            read += self.fingerprint_of_thresholds
        if method == MINFERENCE:
            read += self.fingerprint_of_patterns
        if frozen is not None:
            read += f"{frozen.sha256}:{len(frozen.samples)}"
        key = result_key(path, read, settings, base, kind, (__name__,))
        return self.output / "results" / f"{self.subject.label}-{what}-{method}-{phase}-{multiple}x-{key}.json"

    def _cell_file(self, place: Place) -> Path:
        return self._kept("cell", *place)

    def _ruler_file(self, place: Place, frozen: FrozenTask) -> Path:
        return self._kept(f"ruler-{frozen.task}", *place, frozen)

    def _cell(self, place: Place) -> Cell:
        return reuse(self._cell_file(place), Cell, lambda: self._measure(*place), quiet=place in self.beside)

    def _measure(self, method: str, phase: Phase, multiple: int, wanted: float | None) -> Cell:
        started = time.monotonic()
        tasks = make_tasks(self.held_out, multiple, phase, self.config.decode_tokens)
        scorer = self._scorer(method, phase, multiple, wanted)
        policy = None if wanted is None else self._policy(method, scorer, tasks, wanted)
        scores, record = scorer([context for windows in tasks.text for context in windows], policy)
        of_document = [index for index, windows in enumerate(tasks.text) for _ in windows]
        loss, tokens = [0.0] * len(tasks.text), [0] * len(tasks.text)
        for index, one in zip(of_document, scores, strict=True):
            loss[index] += float(one.loss.sum())
            tokens[index] += len(one.loss)
        tiles: torch.Tensor | None
        if record is not None:
            density, tiles = record.density(phase), record.tile_density(phase)
        elif self.entmax:
            density, tiles = entmax_density(self.model, tasks, self.runtime)
        else:
            density = tiles = torch.ones(self.model.config.n_layers, self.model.config.n_heads)
        needles, record = scorer(tasks.needles, policy)
        return Cell(
            label=self.subject.label,
            method=method,
            phase=phase,
            multiple=multiple,
            context=tasks.context,
            wanted=wanted,
            policy="" if policy is None else str(policy),
            density=density.tolist(),
            tile_density=None if tiles is None else tiles.tolist(),
            needle_density=None if record is None or not tasks.needles else float(record.density(phase).mean()),
            loss=loss,
            tokens=tokens,
            needles=outcomes(needles),
            several={kind: outcomes(scorer(contexts, policy)[0]) for kind, contexts in tasks.several.items()},
            controls=outcomes(scorer(tasks.controls, None)[0]) if policy is None else [],
            hardware=provenance.hardware(self.runtime.device),
            date=provenance.now(),
            seconds=round(time.monotonic() - started, 2),
        )

    def _ruler_cell(self, cell: Cell, frozen: FrozenTask) -> RulerCell:
        place = (cell.method, cell.phase, cell.multiple, cell.wanted)

        def answer() -> RulerCell:
            started = time.monotonic()
            scorer, policy = self._scorer(*place), None
            if cell.wanted is not None:
                tasks = make_tasks(self.held_out, cell.multiple, cell.phase, self.config.decode_tokens)
                policy = self._policy(cell.method, scorer, tasks, cell.wanted)
            answers = write_answers(scorer, self.held_out.tokenizer, frozen, policy)
            return RulerCell(
                cell.label, cell.method, cell.phase, cell.multiple, cell.context, cell.wanted,
                "" if policy is None else str(policy), frozen.task, frozen.sha256, answers.density, answers.scores,
                answers.texts,
                hardware=provenance.hardware(self.runtime.device), date=provenance.now(),
                seconds=round(time.monotonic() - started, 2),
            )  # fmt: skip

        return reuse(self._ruler_file(place, frozen), RulerCell, answer, quiet=place in self.beside)

    def _scorer(self, method: str, phase: Phase, multiple: int, wanted: float | None) -> Scorer:
        label = f"{self.subject.label}: {method}" + (f" at {wanted:g}" if wanted else "") + f", {phase}, {multiple}x"
        return Scorer(self.model, phase, self.runtime, self.config.chunk_tokens, label)

    def _policy(self, name: str, scorer: Scorer, tasks: Tasks, wanted: float) -> SparsePolicy:
        """Set to the wanted density on the first context, once; bsfa as it was calibrated."""
        key = (name, tasks.phase, tasks.context, wanted)
        if key not in self._found:
            self._found[key] = self._set_policy(name, scorer, tasks, wanted)
        return self._found[key]

    def _set_policy(self, name: str, scorer: Scorer, tasks: Tasks, wanted: float) -> SparsePolicy:
        if name == BSFA:
            path = Path(str(self.config.thresholds))
            return load_policy(path, calibrated_densities(self.ks, tasks.context)[wanted], self.model)
        text = tasks.text[0][:1]

        def density_of(policy: SparsePolicy) -> float:
            record = scorer(text, policy)[1]
            assert record is not None
            return float(record.density(tasks.phase).mean())

        return set_density(lambda level: self._at(name, level, tasks.context), density_of, wanted)

    def _at(self, name: str, level: float, context: int) -> SparsePolicy:
        if name == MINFERENCE and self.patterns is not None:
            return self.patterns.scaled(level, self.searched, context)
        return policy_at(name, level, context)

    def _time(self, method: str, multiple: int, wanted: float | None) -> PrefillTime:
        path = self._kept("prefill-time", method, "prefill", multiple, wanted)

        def time_it() -> PrefillTime:
            tasks = make_tasks(self.held_out, multiple, "prefill", self.config.decode_tokens)
            scorer = Scorer(self.model, "prefill", self.runtime, self.config.chunk_tokens, f"{method}: timing")
            policy = None if wanted is None else self._policy(method, scorer, tasks, wanted)
            seconds = time_prefill(self.model, tasks.text[0][0], policy, self.runtime, self.config.timed_runs)
            text = "" if policy is None else str(policy)
            return PrefillTime(self.subject.label, method, tasks.context, wanted, text, seconds)

        return reuse(path, PrefillTime, time_it)


def outcomes(scores: Sequence[Scores]) -> list[tuple[int, int]]:
    """Hits and tokens of each sample."""
    return [(int(one.hit.sum()), len(one.hit)) for one in scores]
