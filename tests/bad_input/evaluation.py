"""The commands of eval/."""

from tests.bad_input.cases import Case


def run(*options: str) -> list[str]:
    """Compare {run} on {corpus} into {tmp}/report."""
    return ["-m", "eval.run", "{run}", "--data", "{corpus}", "--output", "{tmp}/report", *options]


def generate(*options: str) -> list[str]:
    return ["-m", "eval.generate", "--checkpoint", "{run}", "--prompt", "a", *options]


CASES = [
    Case("no runs", ["-m", "eval.run", "--data", "{corpus}", "--output", "{tmp}/report"], ["runs"]),
    Case("no run there", run("{tmp}/none"), ["{tmp}/none"]),
    Case("misspelt option", run("--lengthz", "128"), ["--lengthz"]),
    Case("no corpus there", run("--data", "{tmp}/none"), ["{tmp}/none"]),
    Case("generate without a checkpoint", ["-m", "eval.generate", "--prompt", "a"], ["checkpoint", "required"]),
    Case("generate from no run", generate("--checkpoint", "{tmp}/none"), ["{tmp}/none"]),
    Case("generate at a negative temperature", generate("--temperature", "-1"), ["temperature", "-1"]),
    Case(
        "tasks of no run", ["-m", "eval.tasks", "{tmp}/none", "--tasks", "piqa", "--output", "{tmp}/t"], ["{tmp}/none"]
    ),
    Case(
        "ruler of a length that is a word",
        ["-m", "eval.ruler", "--tokenizer", "{corpus}", "--output", "{tmp}/ruler", "--lengths", "long"],
        ["lengths", "long"],
    ),
    Case("calibrate on no run", ["-m", "eval.calibrate", "{tmp}/none", "--data", "{corpus}"], ["{tmp}/none"]),
    Case(
        "length generalisation of no run",
        ["-m", "eval.length_generalisation", "{tmp}/none", "--output", "{tmp}/report"],
        ["{tmp}/none"],
    ),
    Case(
        "sparse frontier of no runs",
        ["-m", "eval.sparse_frontier", "--softmax", "{tmp}/none", "--entmax", "{run}", "--data", "{corpus}"],
        ["{tmp}/none"],
    ),
    Case("twins without options for train.py", ["-m", "eval.twins", "--output", "{tmp}/twins"], ["no --", "train.py"]),
]
