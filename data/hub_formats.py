"""What `data.corpora.Hub` needs of datasets: formats of a data set's files, JSON as text, errors of reading."""

from collections.abc import Iterator
from typing import Any

from data import records
from data.documents import Document, TextField, documents_of_lines


def has_format(builder: Any, name: str) -> bool:
    """Whether a builder of datasets reads files of this format: "csv", "json" or "parquet"."""
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    return isinstance(builder.config, {"csv": CsvConfig, "json": JsonConfig, "parquet": ParquetConfig}[name])


def json_documents(builder: Any, path: str, split: str, streaming: bool, field: TextField) -> Iterator[Document]:
    """Documents of a data set of JSON files as the files have them: datasets' own reader turns texts into numbers and
    dates. Raises ValueError for a split that is not there."""
    from datasets.download import DownloadConfig, DownloadManager, StreamingDownloadManager
    from datasets.utils.file_utils import xopen

    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(f"data set {path} has no split {split!r} (it has: {', '.join(map(str, files))})")
    kind = StreamingDownloadManager if streaming else DownloadManager
    config = DownloadConfig(token=builder.token, extract_on_the_fly=True)
    manager = kind(dataset_name=builder.dataset_name, download_config=config, base_path=builder.base_path)
    for origin in files[split]:
        single = not str(origin).endswith((".tar.gz", ".tgz", ".zip", ".tar"))  # datasets unpacks archives only
        names = manager.iter_files(manager.download(origin) if single else manager.download_and_extract(origin))
        for name in names:
            with xopen(name, "rb") as file, records.reading(str(origin)):
                content = records.decompressed(file, str(origin)) if single else file
                yield from documents_of_lines(content, str(origin), field, "error")


def reading_errors() -> tuple[type[Exception], ...]:
    """What comes through datasets from damaged files."""
    import datasets
    import pyarrow

    return (datasets.exceptions.DatasetsError, pyarrow.ArrowException, EOFError, *records.DECOMPRESSION_ERRORS)
