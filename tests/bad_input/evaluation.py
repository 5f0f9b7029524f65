"""The commands of eval/."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.bad_input.cases import TOO_LONG, Case, Place

HUGE = "1" + "0" * 15  # fits 64 bits


def run(*options: str, of: tuple[str, ...] = ("{run}",)) -> list[str]:
    """Compare runs on {corpus} into {tmp}/report."""
    fitting = ["--base_length", "128", "--lengths", "1", "--needle_digits", "2", "--device", "cpu"]
    return ["-m", "eval.run", *of, "--data", "{corpus}", "--output", "{tmp}/report", *fitting, *options]


def generate(*options: str, of: str = "{run}") -> list[str]:
    return ["-m", "eval.generate", of, "--prompt", "a", "--device", "cpu", *options]


def from_file(*options: str) -> list[str]:
    return ["-m", "eval.generate", "{run}", "--device", "cpu", *options]


def tasks(*options: str) -> list[str]:
    return ["-m", "eval.tasks", "{run}", "--output", "{tmp}/tasks", "--device", "cpu", *options]


def ruler(*options: str) -> list[str]:
    return ["-m", "eval.ruler", "--tokenizer", "{corpus}", "--output", "{tmp}/ruler", *options]


def calibrate(*options: str) -> list[str]:
    named = ["--data", "{corpus}", "--output", "{tmp}/thresholds", "--length", "128", "--samples", "2"]
    return ["-m", "eval.calibrate", "{run}", *named, "--device", "cpu", *options]


def lengths(*options: str) -> list[str]:
    return ["-m", "eval.length_generalisation", "{run}", "--output", "{tmp}/report", "--device", "cpu", *options]


def frontier(*options: str) -> list[str]:
    named = ["--softmax", "{run}", "--entmax", "{run}", "--data", "{corpus}", "--output", "{tmp}/report"]
    return ["-m", "eval.sparse_frontier", *named, "--device", "cpu", *options]


def twins(*options: str, behind: tuple[str, ...] = ("--config", "{tiny}")) -> list[str]:
    return ["-m", "eval.twins", "--data", "{corpus}", "--output", "{tmp}/twins", *options, "--", *behind]


def write(name: str, content: str | bytes) -> Callable[[Place], None]:
    """A damage that writes a file below {tmp}."""

    def damage(place: Place) -> None:
        path = place.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut_tokenizer(place: Place) -> None:
    path = place.corpus / "tokenizer.model"
    (place.tmp / "tokenizer.model").write_bytes(path.read_bytes()[:1000])


def remove_marker_key(place: Place) -> None:
    for path in Path(place.run).rglob("complete.json"):
        content = json.loads(path.read_text())
        del content["tokenizer"]
        path.write_text(json.dumps(content))


EMPTY = (
    run("--output", ""),
    run("--data", " "),
    run(of=("",)),
    generate(of=""),
    from_file("--prompt_file", ""),
    generate("--thresholds", "", "--keep_blocks", "1"),
    calibrate("--output", ""),
    tasks("--tasks", "piqa", "--output", ""),
    tasks("--tasks", "ruler", "--ruler", ""),
    ruler("--output", ""),
    lengths("--output", ""),
    frontier("--output", ""),
    twins("--output", ""),
    ["-m", "model.export", "{run}", ""],
)

CASES = [
    Case("no runs", ["-m", "eval.run", "--data", "{corpus}", "--output", "{tmp}/report"], ["runs"]),
    Case("no run there", run(of=("{tmp}/none",)), ["{tmp}/none: no such folder"]),
    Case("a run that is a file", run(of=("{tiny}",)), ["{tiny}", "expected a run folder"]),
    Case("a folder that is no run", run(of=("{tmp}",)), ["{tmp} holds no complete checkpoint"]),
    Case(
        "a folder of runs",
        run(of=("{run}/..",)),
        ["holds no complete checkpoint, but runs, of which one is expected: run"],
    ),
    Case("a run twice", run(of=("{run}", "{run}")), ["given twice"]),
    Case("misspelt option", run("--lengthz", "128"), ["--lengthz"]),
    Case("no corpus there", run("--data", "{tmp}/none"), ["{tmp}/none"]),
    Case("a corpus that is a file", run("--data", "{tiny}"), ["{tiny}"]),
    Case("a corpus that is a run", run("--data", "{run}"), ["{run}", "prepare the corpus"]),
    Case("lengths that fall", run("--lengths", "2", "1"), ["lengths is [2, 1]", "rising order"]),
    Case("a length twice", run("--lengths", "1", "1"), ["lengths is [1, 1]", "different"]),
    Case("no length", run("--lengths", "0"), ["lengths is [0]", "positive"]),
    Case("half a length", run("--lengths", "0.5"), ["lengths", "0.5"]),
    Case("a length beyond all text", run("--lengths", "1000000000000"), ["the longest document has"]),
    Case("no base length", run("--base_length", "0"), ["base_length is 0: expected at least 8"]),
    Case("a base length beyond all text", run("--base_length", "1" + "0" * 15), ["the longest document has"]),
    Case("a context too short for a needle", run("--base_length", "16"), ["16 tokens cannot hold a needle"]),
    Case(
        "a text for a whole number or null",
        run("--dual_chunk", "abc"),
        ["dual_chunk", ": Expected int or null. Got value: abc (--help"],
    ),
    Case("one document", run("--max_documents", "1"), ["max_documents is 1: expected at least 2"]),
    Case("needles beyond all names", run("--needle_count", "33"), ["needle_count is 33: expected at most 32"]),
    Case("digits without end", run("--needle_digits", "1000000000"), ["needle_digits is 1000000000: expected at most"]),
    Case("needles without end", run("--needle_samples", HUGE), ["needle_samples is 1000", "expected at most 10000"]),
    Case("a negative seed", run("--seed", "-1"), ["seed is -1: expected at least 0"]),
    Case("rows of no tokens", run("--row_tokens", "0"), ["row_tokens is 0: expected at least 1"]),
    Case("a device that is not there", run("--device", "cuda:9"), ["device is 'cuda:9'", "0 CUDA devices"]),
    Case("a device of no kind", run("--device", "gpu"), ["device is 'gpu': expected auto, cpu, cuda or cuda:N"]),
    Case("a precision of no kind", run("--precision", "float16"), ["precision", "float16"]),
    Case("thresholds without their k", run("--thresholds", "{tiny}"), ["give both, or neither"]),
    Case(
        "a report in a run's folder", run("--output", "{run}"), ["--output {run} is a run's or a corpus's own folder"]
    ),
    Case("a report in a corpus", run("--output", "{corpus}"), ["own folder: choose another one"]),
    Case(
        "thresholds over another file",
        ["-m", "eval.calibrate", "{run}", "--data", "{corpus}", "--ks", "1", "--device", "cpu", "--output", "{tiny}"],
        ["--output {tiny} is a file of something else: choose another name"],
    ),
    Case("a report that is a file", run("--output", "{tiny}"), ["--output {tiny} is a file: expected a folder"]),
    Case("a report below a file", run("--output", "{tiny}/x"), ["--output {tiny}/x cannot be written"]),
    Case("a report of a long name", run("--output", TOO_LONG), ["cannot be written (File name too long)"]),
    Case("a config that is not there", run("--config", "{tmp}/none.yaml"), ["{tmp}/none.yaml"]),
    Case(
        "a config that is no YAML",
        run("--config", "{tmp}/x.yaml"),
        ["{tmp}/x.yaml", "line 1"],
        write("x.yaml", "a: [1"),
    ),
    Case("a mode of wandb", run("--wandb.mode", "on"), ["wandb.mode", "on"]),
    Case("a checkpoint without tokenizer", run(), ["complete.json", "lacks 'tokenizer'"], remove_marker_key),
    *(Case(f"nothing given, {number}", command, ["is empty: expected a path"]) for number, command in enumerate(EMPTY)),
    Case("generate without a checkpoint", ["-m", "eval.generate", "--prompt", "a"], ["run is needed", "add it"]),
    Case("generate from no run", generate(of="{tmp}/none"), ["{tmp}/none"]),
    Case("generate from nothing", from_file(), ["either --prompt or --prompt_file"]),
    Case("generate from two prompts", generate("--prompt_file", "{tiny}"), ["either --prompt or --prompt_file"]),
    Case("generate from a folder", from_file("--prompt_file", "{tmp}"), ["{tmp}: Is a directory"]),
    Case("generate from no file", from_file("--prompt_file", "{tmp}/none"), ["{tmp}/none: No such file"]),
    Case(
        "generate from another encoding",
        from_file("--prompt_file", "{tmp}/latin"),
        ["{tmp}/latin is not UTF-8"],
        write("latin", b"caf\xe9"),
    ),
    Case("generate at a negative temperature", generate("--temperature", "-1"), ["temperature", "-1"]),
    Case("generate at no temperature", generate("--temperature", ".nan"), ["temperature is nan: expected 0"]),
    Case("generate at any temperature", generate("--temperature", ".inf"), ["temperature is inf: expected 0"]),
    Case("generate from no probability", generate("--top_p", "0"), ["top_p is 0.0: expected a probability"]),
    Case("generate from a NaN", generate("--top_p", ".nan"), ["top_p is nan: expected a probability"]),
    Case("generate from negative ranks", generate("--top_k", "-1"), ["top_k is -1: expected at least 0"]),
    Case("generate from a negative seed", generate("--seed", "-1"), ["seed is -1: expected at least 0"]),
    Case("generate nothing", generate("--max_new_tokens", "0"), ["max_new_tokens is 0: expected at least 1"]),
    Case("generate a word", generate("--max_new_tokens", "many"), ["max_new_tokens", "many"]),
    Case("chunks of no tokens", generate("--chunk_tokens", "0"), ["chunk_tokens is 0: expected at least 1"]),
    Case("a prompt that is too long", generate("--max_prompt_tokens", "1"), ["has 2 tokens, max_prompt_tokens is 1"]),
    Case("generate without a tokenizer", generate("--tokenizer", "{tmp}/none"), ["{tmp}/none does not exist"]),
    Case("generate with a text for a tokenizer", generate("--tokenizer", "{tiny}"), ["{tiny}", "SentencePiece"]),
    Case(
        "generate with a damaged tokenizer",
        generate("--tokenizer", "{tmp}/tokenizer.model"),
        ["{tmp}/tokenizer.model"],
        cut_tokenizer,
    ),
    Case("generate by graphs on a CPU", generate("--cuda_graphs", "true"), ["cuda_graphs is true", "set it to false"]),
    Case(
        "generate under thresholds of a text",
        generate("--thresholds", "{tiny}", "--keep_blocks", "1"),
        ["{tiny}"],
    ),
    Case(
        "tasks of no run", ["-m", "eval.tasks", "{tmp}/none", "--tasks", "piqa", "--output", "{tmp}/t"], ["{tmp}/none"]
    ),
    Case("no tasks", tasks(), ["tasks is empty: name some"]),
    Case("a task of no name", tasks("--tasks", "pika"), ["tasks has pika"]),
    Case("no sample of a task", tasks("--tasks", "piqa", "--limit", "0"), ["limit is 0: expected at least 1"]),
    Case(
        "a window of one token", tasks("--tasks", "piqa", "--max_length", "1"), ["max_length is 1: expected at least 2"]
    ),
    Case("documents without end", tasks("--tasks", "piqa", "--limit", HUGE), ["limit is 1000", "expected at most"]),
    Case("examples without end", tasks("--tasks", "piqa", "--fewshot", HUGE), ["fewshot is 1000", "at most 100"]),
    Case("negative examples", tasks("--tasks", "piqa", "--fewshot", "-1"), ["fewshot is -1: expected at least 0"]),
    Case(
        "lengths without RULER", tasks("--tasks", "piqa", "--lengths", "512"), ["lengths is [512]", "no task of RULER"]
    ),
    Case("tasks from a file", tasks("--tasks", "piqa", "--source", "{tiny}"), ["{tiny}/piqa"]),
    Case("tasks into a file", tasks("--tasks", "piqa", "--output", "{tiny}"), ["--output {tiny} is a file"]),
    Case("RULER that is not there", tasks("--tasks", "ruler", "--ruler", "{tmp}/none"), ["RULER was not built there"]),
    Case(
        "a RULER manifest that is a list",
        tasks("--tasks", "ruler", "--ruler", "{tmp}"),
        ["manifest.json holds a list"],
        write("manifest.json", "[]"),
    ),
    Case(
        "a RULER manifest without files",
        tasks("--tasks", "ruler", "--ruler", "{tmp}"),
        ["manifest.json lacks 'files'"],
        write("manifest.json", '{"format": 1, "tokenizer": {"fingerprint": "x"}}'),
    ),
    Case(
        "a mark before the documents",
        tasks("--tasks", "piqa", "--source", "{tmp}"),
        ["{tmp}/piqa/test.jsonl, line 1", "byte order mark"],
        write("piqa/test.jsonl", "\ufeff{}\n"),
    ),
    Case(
        "a broken document",
        tasks("--tasks", "piqa", "--source", "{tmp}"),
        ["{tmp}/piqa/test.jsonl, line 2", "not valid JSON"],
        write("piqa/test.jsonl", "{}\n{\n"),
    ),
    Case("ruler of a length that is a word", ruler("--lengths", "long"), ["lengths", "long"]),
    Case("ruler of no length", ruler("--lengths", "0"), ["lengths is [0]", "from 512 on"]),
    Case("ruler without end", ruler("--lengths", "1000000000"), ["lengths is [1000000000]", "up to 16777216"]),
    Case("ruler for ever", ruler("--samples", HUGE), ["samples is 1000", "expected at most"]),
    Case("ruler of falling lengths", ruler("--lengths", "1024", "512"), ["lengths is [1024, 512]", "rising"]),
    Case("ruler of no task", ruler("--tasks", "niah"), ["tasks is ['niah']"]),
    Case("ruler of no samples", ruler("--samples", "-1"), ["samples is -1: expected at least 1"]),
    Case("ruler of no tokenizer", ruler("--tokenizer", "{tmp}/none"), ["{tmp}/none"]),
    Case("ruler of a text for a tokenizer", ruler("--tokenizer", "{tiny}"), ["{tiny}", "SentencePiece"]),
    Case("ruler of no essays", ruler("--essays", "{tmp}/none"), ["--essays {tmp}/none: expected a text file"]),
    Case(
        "ruler of essays in another encoding",
        ruler("--essays", "{tmp}/latin"),
        ["{tmp}/latin is not UTF-8"],
        write("latin", b"caf\xe9"),
    ),
    Case("ruler into a file", ruler("--output", "{tiny}"), ["--output {tiny} is a file"]),
    Case(
        "ruler over a damaged manifest",
        ruler(),
        ["manifest.json is not valid JSON"],
        write("ruler/manifest.json", "{"),
    ),
    Case("calibrate on no run", ["-m", "eval.calibrate", "{tmp}/none", "--data", "{corpus}"], ["{tmp}/none"]),
    Case("calibrate an entmax model", calibrate("--ks", "1"), ["kind is 'asentmax'"]),
    Case("calibrate into a folder", calibrate("--output", "{tmp}"), ["--output {tmp} is a folder"]),
    Case("calibrate on nothing", calibrate("--samples", "0"), ["samples is 0: expected at least 1"]),
    Case("calibrate on short texts", calibrate("--length", "64"), ["length is 64: expected at least 128"]),
    Case("calibrate by the median", calibrate("--estimator", "median"), ["estimator", "median"]),
    Case(
        "length generalisation of no run",
        ["-m", "eval.length_generalisation", "{tmp}/none", "--output", "{tmp}/report"],
        ["{tmp}/none"],
    ),
    Case("length generalisation of a text model", lengths(), ["was not trained on a task", "use python -m eval.run"]),
    Case("length generalisation to no length", lengths("--lengths", ".nan"), ["lengths is [nan]: expected"]),
    Case("length generalisation without end", lengths("--lengths", ".inf"), ["lengths is [inf]: expected"]),
    Case("length generalisation of any seed", lengths("--seed", "1" + "0" * 30), ["seed is 1000", "64 bits"]),
    Case("length generalisation for ever", lengths("--samples", HUGE), ["samples is 1000", "expected at most"]),
    Case("length generalisation of nothing", lengths("--samples", "0"), ["samples is 0: expected at least 1"]),
    Case(
        "sparse frontier of no runs",
        ["-m", "eval.sparse_frontier", "--softmax", "{tmp}/none", "--entmax", "{run}", "--data", "{corpus}"],
        ["{tmp}/none"],
    ),
    Case("sparse frontier of one run twice", frontier(), ["given twice"]),
    Case(
        "sparse frontier of no policy",
        frontier("--policies", "none"),
        ["policies is ['none']: expected different ones of"],
    ),
    Case(
        "sparse frontier of no density",
        frontier("--densities", ".nan"),
        ["densities is [nan]: expected different shares"],
    ),
    Case(
        "sparse frontier beyond dense", frontier("--densities", "2"), ["densities is [2.0]: expected different shares"]
    ),
    Case("sparse frontier of no RULER", frontier("--ruler_tasks", "vt"), ["ruler_tasks is ['vt']", "--ruler"]),
    Case("sparse frontier for ever", frontier("--timed_runs", HUGE), ["timed_runs is 1000", "expected at most 1000"]),
    Case("sparse frontier of no decoding", frontier("--decode_tokens", "0"), ["decode_tokens is 0"]),
    Case("twins without options for train.py", ["-m", "eval.twins", "--output", "{tmp}/twins"], ["no --", "train.py"]),
    Case("twins of no kind", twins("--kinds", "linear"), ["kinds is ['linear']: expected"]),
    Case("twins at no rate", twins("--lrs", ".nan"), ["lrs is [nan]: expected different positive numbers"]),
    Case("twins of two rates without steps", twins("--lrs", "1", "2"), ["sweep_steps is 0: expected at least 1"]),
    Case("twins of any seed", twins("--seeds", HUGE), ["seeds is [1000", "below 4294967296"]),
    Case("twins with a run folder", twins(behind=("--run_dir", "x")), ["--run_dir stands behind --"]),
    Case("twins on no corpus", twins("--data", "{tmp}/none"), ["{tmp}/none/manifest.json does not exist"]),
    Case("twins into a file", twins("--output", "{tiny}"), ["--output {tiny} is a file"]),
    Case(
        "export in another dtype",
        ["-m", "model.export", "{run}", "{tmp}/hf", "--dtype", "float16"],
        ["dtype", "float16"],
    ),
    Case("export into a file", ["-m", "model.export", "{run}", "{tiny}"], ["output {tiny} is a file"]),
    Case("export into a run", ["-m", "model.export", "{run}", "{run}"], ["output {run} is not empty"]),
    Case("export into checkpoints", ["-m", "model.export", "{run}", "{run}/checkpoints/x"], ["belongs to training"]),
    Case(
        "export of a long name", ["-m", "model.export", "{run}", TOO_LONG], ["cannot be written (File name too long)"]
    ),
]
