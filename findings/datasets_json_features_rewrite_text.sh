#!/usr/bin/env bash
# datasets 5.2.0. Guess: load_dataset("json", features=Features({"text": Value("string")})) returns the strings of a JSON
# Lines file as they stand there; it is the obvious way to keep the reader from guessing types. Seen: types are guessed first
# and cast to strings afterwards. Strings that look like dates come back in another spelling, and where one record of the
# column holds a number, another record's string comes back with quotes around it.
# Output seen:
#   ['2020-01-01T00:00:00', '2021-02-03 04:05:06'] -> ['2020-01-01 00:00:00', '2021-02-03 04:05:06']
#   ['007', 7, 'x'] -> ['007', '7', '"x"']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cat >"$folder/run.py" <<'PY'
import json
import sys
from pathlib import Path

from datasets import Features, Value, load_dataset

seen = []
for number, texts in enumerate((["2020-01-01T00:00:00", "2021-02-03 04:05:06"], ["007", 7, "x"])):
    path = Path(sys.argv[1]) / f"{number}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    features = Features({"text": Value("string")})
    rows = load_dataset("json", data_files=str(path), split="train", streaming=True, features=features)
    seen.append([row["text"] for row in rows])
    print(texts, "->", seen[-1])
expected = [["2020-01-01 00:00:00", "2021-02-03 04:05:06"], ["007", "7", '"x"']]
assert seen == expected, "the behaviour has changed"
PY
HF_HOME="$folder/hub" "$folder/venv/bin/python" "$folder/run.py" "$folder"
