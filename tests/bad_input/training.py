"""train.py and training.memory."""

from tests.bad_input.cases import Case


def train(*options: str) -> list[str]:
    """A tiny run into {tmp}/new."""
    return ["train.py", "--config", "{tiny}", "--run_dir", "{tmp}/new", *options]


def memory(*options: str) -> list[str]:
    return ["-m", "training.memory", "--config", "{tiny}", *options]


CASES = [
    Case("no options", ["train.py"], ["run_dir", "required"]),
    Case("misspelt option", train("--model.network.n_layerz", "2"), ["model.network.n_layerz"]),
    Case("a word for a number", train("--model.network.n_layers", "three"), ["n_layers", "three"]),
    Case("no config there", train("--config", "{tmp}/none.yaml"), ["{tmp}/none.yaml"]),
    Case("max_steps 0", train("--trainer.max_steps", "0"), ["trainer.max_steps is 0", "at least 1"]),
    Case("heads that do not divide", train("--model.network.n_kv_heads", "3"), ["n_kv_heads", "3"]),
    Case("zero_stage 4", train("--parallel.zero_stage", "4"), ["zero_stage", "0, 1, 2, 3", "4"]),
    Case("no corpus there", train("--data.sources", '[{"path": "{tmp}/none"}]'), ["{tmp}/none"]),
    Case(
        "no GPU", train("--trainer.accelerator", "gpu"), ["trainer.accelerator is 'gpu'", "--trainer.accelerator cpu"]
    ),
    Case(
        "a small vocabulary",
        train("--model.network.vocab_size", "100"),
        ["model.network.vocab_size is 100", "384 pieces", "at least"],
    ),
    Case("memory of no config", ["-m", "training.memory", "--config", "{tmp}/none.yaml"], ["{tmp}/none.yaml"]),
]
