"""train.py and training.memory."""

from collections.abc import Callable

from tests.bad_input.cases import TOO_LONG, Case, Place


def train(*options: str) -> list[str]:
    """A tiny run into {tmp}/new."""
    return ["train.py", "--config", "{tiny}", "--run_dir", "{tmp}/new", *options]


def memory(*options: str) -> list[str]:
    return ["-m", "training.memory", "--config", "{tiny}", *options]


def config(text: str) -> Callable[[Place], object]:
    """Writes {tmp}/more.yaml."""
    return lambda place: (place.tmp / "more.yaml").write_text(text)


def file_there(place: Place) -> None:
    (place.tmp / "new").write_text("a file")


NUMBERS = {
    "model.network.norm_eps": [-1, "nan"],
    "model.network.init_std": [-1],
    "model.network.head_dim": [0],
    "model.network.n_layers": ["null", 10**9],
    "model.network.d_model": [10**12],
    "model.network.attention.temperature_range": ["nan", "1e9"],
    "model.optimizer.lr": ["inf", "nan", "1e37", "1e-60"],
    "model.optimizer.weight_decay": ["inf", "1e300", "101"],
    "model.optimizer.warmup_steps": [10**22],
    "model.loss_chunk_tokens": [0],
    "watchdog.minutes": ["nan"],
    "watchdog.first_minutes": ["inf"],
    "interruption.grace_seconds": [-1, "nan"],
    "guard.spike_deviations": ["nan"],
    "stats.every_n_steps": [-1],
    "profile.steps": [-1],
    "parallel.timeout_minutes": [0],
    "data.sequence_length": [-1, 10**15],
    "data.num_workers": [-1],
    "data.seed": [10**22, -1],
    "seed_everything": [-1, 10**22],
    "checkpoint.keep_every_hours": ["1e30", "nan"],
    "trainer.max_steps": [10**22, 10**12],
    "model.optimizer.warmup_tokens": [-1, "1.5"],
    "trainer.max_time": ["foo", "{dayz: 3}", "{days: 300000000000}", "00:00:00:00"],
    "trainer.log_every_n_steps": [0],
    "trainer.gradient_clip_val": ["nan", -1],
    "trainer.num_nodes": [0],
}
REFUSED = {
    "trainer.limit_train_batches": "4",
    "trainer.overfit_batches": "2",
    "trainer.fast_dev_run": "true",
    "trainer.min_epochs": "2",
    "trainer.profiler": "simple",
    "trainer.max_epochs": "3",
}
# what a group of options is given, and what a file holds: none is a mapping of its options
FILES = {
    "model null": ("model: null\n", ["model is null", "expected a mapping of its options (model."]),
    "trainer 7": ("trainer: 7\n", ["trainer is 7", "expected a mapping of its options (trainer."]),
    "network null": ("model: {network: null}\n", ["model.network is null", "expected a mapping"]),
    "attention null": ("model: {network: {attention: null}}\n", ["model.network.attention is null"]),
    "checkpoint a list": ("checkpoint: [1]\n", ["checkpoint is [1]", "expected a mapping"]),
    "data null": ("data: null\n", ["data is null", "expected a mapping"]),
    "alias to itself": ("a: &a [*a]\n", ["a has an alias to itself (line 1)"]),
    "alias to itself in a mapping": ("model: &a {network: *a}", ["model.network has an alias to itself"]),
    "nested without end": ("model: " + "[" * 3000 + "]" * 3000, ["nested deeper"]),
    "empty": ("", ["expected options", "found an empty file"]),
    "only a comment": ("# lr: 3\n", ["expected options", "found no mapping"]),
    "a list": ("- 1\n- 2\n", ["expected options", "found no mapping"]),
    "an unknown key": ("model: {network: {attention: {kindd: entmax}}}\n",
                       ["the key model.network.attention.kindd is not an option", "model.network.attention.kind:"]),
    "an unknown group": ("modle: {compile: true}\n", ["the key modle is not an option", "nearest one is model:"]),
    "a key twice in one line": ("{data: {seed: 1, seed: 2}}", ["the key data.seed is there twice"]),
    "a number beyond 64 bits": (f"data: {{seed: {10**22}}}\n", [f"data.seed is {10**22}", "64 bits"]),
}  # fmt: skip
CALLBACKS = ("ModelCheckpoint", "GradientAccumulationScheduler", "SpikeDetection", "StochasticWeightAveraging")

CASES = [
    Case("no options", ["train.py"], ["--run_dir is needed", "add it"]),
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
    *(
        Case(f"{name} {value}", train(f"--{name}", str(value)), [name.rpartition(".")[2], "xpected"])
        for name, values in NUMBERS.items()
        for value in values
    ),
    *(Case(name, train(f"--{name}", value), [f"{name} is", "leave it out and use"]) for name, value in REFUSED.items()),
    Case("one callback that is refused", train("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=x"),
         ["trainer.callbacks has EarlyStopping", "leave it out and use"]),
    Case("devices two", train("--trainer.devices", "two"), ["trainer.devices is 'two'", "at least 1"]),
    Case("devices -2", train("--trainer.devices", "-2"), ["trainer.devices is", "-2", "at least 1"]),
    Case("accelerator tpu", train("--trainer.accelerator", "tpu"), ["trainer.accelerator is 'tpu'", "expected auto"]),
    Case("max_time nonsense", train("--trainer.max_time", "soon"), ["soon"]),
    Case("a window beside nsa's", train("--model.network.attention.kind", "nsa", "--model.network.window", "9"),
         ["window: expected none for attention.kind nsa: set attention.nsa.window, got 9"]),
    Case("sizes of nsa for another kind", train("--model.network.attention.nsa.window", "9"),
         ["attention.nsa: expected none for kind asentmax"]),
    Case("blocks of nsa between strides", train("--model.network.attention.kind", "nsa",
         "--model.network.attention.nsa.select_block", "24"),
         ["attention.nsa.select_block is 24: expected a multiple of compress_stride = 16"]),
    Case("a window beside dsa", train("--model.network.attention.kind", "dsa", "--model.network.window", "9"),
         ["window: expected none for attention.kind dsa, got 9"]),
    Case("sizes of dsa for another kind", train("--model.network.attention.dsa.select_tokens", "9"),
         ["attention.dsa: expected none for kind asentmax"]),
    Case("an unknown stage of dsa", train("--model.network.attention.kind", "dsa",
         "--model.network.attention.dsa.stage", "dense"),
         ["\"model.network.attention.dsa.stage\": Expected a", "'warmup', 'sparse'", "Got value: dense (--help"]),
    Case("index channels that rope cannot pair", train("--model.network.attention.kind", "dsa",
         "--model.network.attention.dsa.index_dim", "10"), ["attention.dsa.index_dim is 10: expected a multiple of 4"]),
    Case("frozen weights beside ZeRO", train("--model.network.attention.kind", "dsa",
         "--model.network.attention.dsa.stage", "warmup", "--parallel.zero_stage", "1"),
         ["parallel.zero_stage is 1: expected 0, since model.network.attention.dsa.freeze"]),
    Case("sizes of dms for another kind", train("--model.network.attention.dms.window", "9"),
         ["attention.dms: expected none for kind asentmax"]),
    Case("a compression that keeps all", train("--model.network.attention.kind", "dms",
         "--model.network.attention.dms.compression", "1"),
         ["attention.dms.compression is 1.0: expected a finite number above 1"]),
    Case("a window beside blocks", train("--model.network.attention.kind", "hierarchical", "--model.network.window",
         "9"),
         ["window: expected none for attention.kind hierarchical, got 9"]),
    Case("blocks for another kind", train("--model.network.attention.hierarchical.block", "32"),
         ["attention.hierarchical: expected none for kind asentmax"]),
    Case("blocks of no tokens", train("--model.network.attention.kind", "hierarchical",
         "--model.network.attention.hierarchical.block", "0"),
         ["attention.hierarchical.block is 0: expected a whole number at least 1"]),
    Case("backend cuda", train("--model.network.attention.backend", "cuda"), ["attention.backend", "cuda", "triton"]),
    Case("a network beyond memory", train("--model.network.n_layers", "1000", "--model.network.d_ff", "1000000",
         "--model.network.d_model", "8192"), ["model.network has about", "GiB of memory"]),
    *(Case(f"file: {name}", train("--config", "{tmp}/more.yaml"), ["{tmp}/more.yaml: ", *parts], damage=config(text))
      for name, (text, parts) in FILES.items()),
    Case("a group of no mapping", train("--config", '{"model": null}'), ["model is null", "expected a mapping"]),
    Case("a warm-up beyond the run", train("--trainer.max_steps", "4", "--model.optimizer.warmup_steps", "5"),
         ["model.optimizer.warmup_steps is 5, longer than trainer.max_steps 4", "expected at most 4"]),
    Case("a length in steps and tokens", train("--trainer.max_tokens", "1e6"),
         ["trainer.max_steps is 20 and trainer.max_tokens 1000000.0", "expected one of the two", "leave one out"]),
    *(Case(f"max_tokens {tokens}", train("--trainer.max_steps", "-1", "--trainer.max_tokens", tokens),
           ["trainer.max_tokens is", "expected"]) for tokens in ("0", "1.5", ".nan", "1e17")),
    Case("a warm-up in tokens beyond the run", train("--model.optimizer.warmup_tokens", "9000"),
         ["model.optimizer.warmup_tokens is", "(36 steps), longer than trainer.max_steps 20"]),
    Case("half precision on a CPU", train("--trainer.precision", "16-mixed"),
         ["trainer.precision is '16-mixed', which needs a CUDA device", "bf16-mixed"]),
    Case("half precision without scaling", train("--trainer.precision", "16-true"),
         ["trainer.precision is '16-true'", "expected one of 32-true"]),
    Case("an unknown precision", train("--trainer.precision", "fp7"), ["trainer.precision", "fp7"]),
    Case("FP8 on a CPU", train("--model.float8", "rowwise"),
         ["model.float8 is 'rowwise', which needs a CUDA device", "on cpu", "use model.float8 none"]),
    Case("an unknown kind of FP8", train("--model.float8", "e4m3"), ["model.float8", "e4m3", "rowwise"]),
    Case("a text for a number or null", train("--trainer.max_tokens", "NaN"),
         ["trainer.max_tokens", ": Expected int, float or null. Got value: NaN (--help"]),
    Case("memory of FP8 without a linear that fits", memory("--model.float8", "rowwise", "--model.network.d_model",
         "24", "--model.network.head_dim", "16", "--trainer.precision", "bf16-mixed"),
         ["model.float8 is 'rowwise', but no linear", "expected such a d_model"]),
    Case("memory of FP8 in float32", memory("--model.float8", "rowwise"),
         ["trainer.precision is '32-true'", "expected bf16-mixed", "or use model.float8 none"]),
    Case("memory of FP8 with odd tiles", memory("--model.float8", "tensorwise", "--trainer.precision", "bf16-mixed",
         "--model.mlp_tile_tokens", "40"), ["model.mlp_tile_tokens is 40", "expected a multiple of 16"]),
    Case("wandb without a key", train("--wandb.mode", "online"), ["wandb.mode is online", "wandb login"],
         environment={"NETRC": "/nowhere/netrc"}),
    Case("run_dir empty", ["train.py", "--config", "{tiny}", "--run_dir", ""], ["--run_dir is empty"]),
    Case("init_from empty", train("--init_from", ""), ["--init_from is empty"]),
    Case("a source without its path", train("--data.sources", "[{weight: 2}]"),
         ["data.sources lacks path", "give data.sources.path"]),
    Case("a task without end",
         train("--data.sources=[]", "--data.task.name=reverse", "--data.task.max_length=1000000000000"),
         ["max_length are 32 and 1000000000000", "<= 16777216"]),
    Case("run_dir a file", train(), ["{tmp}/new is a file", "expected a folder"], damage=file_there),
    Case("run_dir below a file", ["train.py", "--config", "{tiny}", "--run_dir", "{tiny}/x"], ["{tiny}/x", "another"]),
    Case("run_dir too long", ["train.py", "--config", "{tiny}", "--run_dir", "{tmp}/" + TOO_LONG],
         ["File name too long", "choose another folder"]),
    Case("run_dir nowhere to be written", ["train.py", "--config", "{tiny}", "--run_dir", "/proc/x"], ["/proc/x"]),
    Case("a key twice", train("--config", "{tmp}/more.yaml"), ["{tmp}/more.yaml: the key model.compile is there twice"],
         damage=config("model:\n  compile: false\n  compile: true\n")),
    Case("broken YAML", train("--config", "{tmp}/more.yaml"), ["{tmp}/more.yaml", "while parsing a flow node"],
         damage=config("model: {a: [\n")),
    Case("a job of two tasks without srun", train(), ["2 tasks without srun", "start it with srun"],
         environment={"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}),
    Case("two tasks of srun, one device", train(), ["srun started 2 tasks", "trainer.devices x trainer.num_nodes is 1"],
         environment={"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}),
    Case("an error beside loader workers", train("--data.num_workers", "1", "--data.val_sequences", "5",
         "--validation.every_n_steps", "5"), ["data.val_sequences 5 is not a multiple"]),
    Case("a profile of a rank that is not there", train("--profile.steps", "2", "--profile.rank", "3"),
         ["profile.rank is 3", "one of the 1 ranks"]),
    Case("CUDA graphs on a CPU", train("--model.cuda_graphs", "true"), ["cuda_graphs"]),
    Case("Liger's loss on a CPU", train("--model.loss_backend", "liger"), ["loss_backend is 'liger'"]),
    Case("memory of a length of -1", memory("--data.sequence_length", "-1"), ["data.sequence_length is -1"]),
    Case("memory of two lengths", memory("--trainer.max_tokens", "1000", "--trainer.max_steps", "4"),
         ["trainer.max_steps is 4 and trainer.max_tokens 1000"]),
    Case("memory of Muon with ZeRO", memory("--model.optimizer.name", "muon", "--parallel.zero_stage", "1"),
         ["model.optimizer.name is 'muon'", "parallel.zero_stage 1 divides", "use adamw"]),
    Case("Muon with ZeRO", train("--model.optimizer.name", "muon", "--parallel.zero_stage", "2"),
         ["model.optimizer.name is 'muon'", "parallel.zero_stage 2 divides", "use adamw"]),
    Case("an unknown optimizer", train("--model.optimizer.name", "sgd"), ["model.optimizer.name", "sgd", "muon"]),
    Case("memory of 0 steps", memory("--trainer.max_steps", "0"), ["trainer.max_steps is 0"]),
    Case("memory of a nan", memory("--model.network.norm_eps", "nan"), ["norm_eps", "nan"]),
]  # fmt: skip
