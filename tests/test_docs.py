"""Pages that a reader can follow: links lead somewhere, commands parse, and the first two pages stay short."""

import importlib
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from common import exits
from model.config import ModelConfig
from tests.training.conftest import ROOT, child_environment
from tests.training.warm import warm_interpreter

PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "exp", "runs", "node_modules"} & {*path.parts})
GUIDES = [ROOT / "README.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def commands_of(page: Path) -> list[str]:
    """The python commands in the fenced blocks of a page that are written out whole."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python ") and "..." not in line]


COMMANDS = {f"{page.relative_to(ROOT)}: {line[:60]}": line for page in GUIDES for line in commands_of(page)}
TRAINING = {name: line for name, line in COMMANDS.items() if line.startswith("python train.py")}
OTHERS = {name: line for name, line in COMMANDS.items() if name not in TRAINING}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match[1] for match in LINK.finditer(page.read_text()) if "://" not in match[1]]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_first_two_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200
    assert len((ROOT / "RESULTS.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", TRAINING)
def test_training_commands_parse(name: str, tmp_path: Path) -> None:
    network = tmp_path / "network.yaml"  # as model.hub.convert writes one
    network.write_text(yaml.safe_dump({"model": {"network": asdict(ModelConfig(positions="rope"))}}))
    arguments = [str(network) if one.endswith("/network.yaml") else one for one in shlex.split(TRAINING[name])[1:]]
    ended = warm_interpreter("train", "training.cli").run([*arguments, "--print_config"], child_environment(), 100)
    assert ended.returncode == 0 and "model:" in ended.stdout, ended.stderr


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_parse(name: str) -> None:
    _, dash, module, *arguments = shlex.split(OTHERS[name])
    assert dash == "-m"
    package = ROOT.joinpath(*module.split(".")).is_dir()
    command = importlib.import_module(f"{module}.command" if package else module)
    if "--" in arguments:
        arguments, stages = command.split(arguments)
        for options in stages:
            attention = ["--config", "configs/attention/softmax.yaml", "--run_dir", "runs/x"]
            printed = [*attention, *options, "--print_config"]
            ended = warm_interpreter("train", "training.cli").run(["train.py", *printed], child_environment(), 100)
            assert ended.returncode == 0, ended.stderr
    command._parser().parse_args(arguments)  # every documented command has one: else it could not fail here


def test_there_are_commands_of_all_kinds() -> None:
    modules = {line.split()[2] for line in OTHERS.values()}
    assert len(TRAINING) >= 2 and {"data.prepare", "eval.run", "eval.tasks", "eval.generate"} <= modules


def test_every_exit_code_is_explained() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    codes = [value for name, value in vars(exits).items() if name.isupper()]
    assert len(codes) >= 5 and all(f"\n| {code} | " in page for code in [0, *codes])


def test_the_tested_pairs_are_those_of_the_requirements() -> None:
    pins = dict(re.findall(r"^(torch|triton)==([\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.M))
    pair = f"torch {pins['torch'].removesuffix('.0')} with Triton {pins['triton']}, as in requirements.txt"
    assert pair in (ROOT / "README.md").read_text()


def test_no_two_evaluations_of_tasks_write_to_one_folder() -> None:
    outputs = [re.findall(r"--output (\S+)", line) for line in COMMANDS.values() if " eval.tasks " in line]
    assert len(outputs) >= 2 and len({output for (output,) in outputs}) == len(outputs)
