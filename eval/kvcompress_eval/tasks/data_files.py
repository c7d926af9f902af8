"""Data sets as files: from a local folder as they ship, or through `datasets` where the network is allowed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress_eval.tasks.fields import Reader

Record = dict[str, Any]


@dataclass(frozen=True)
class DataSource:
    """Where data sets come from. Nothing is downloaded unless `network` is set."""

    folder: Path | None = None
    network: bool = False

    def read(self, task: str, names: Sequence[str], url: str, fields: Mapping[str, Reader], most: int) -> list[Record]:
        """The first records of a data set.

        Args:
            names: file names to look for in the folder and in its `data` folder, first match wins.
            url: the same file on the Hugging Face hub, as `datasets` spells it.
            fields: what each record must have, and how each field is read.
            most: records wanted.

        Raises:
            ValueError: no such file, not the data set's format, or a download that is not allowed or fails.
        """
        path = self._find(names)
        if path is not None:
            records, where = read_records(path, most), str(path)
        elif self.network:
            records, where = _download(url, most), url
        elif self.folder is not None:
            raise ValueError(
                f"{task} needs {' or '.join(names)}, and {self.folder} has none; expected the data set's own file"
            )
        else:
            raise ValueError(
                f"{task} needs {' or '.join(names)}: name its folder with --data, or allow a download with "
                "--allow-network"
            )
        if not records:
            raise ValueError(f"{where} holds no records")
        return [_checked(record, fields, f"record {at} of {where}") for at, record in enumerate(records, start=1)]

    def _find(self, names: Sequence[str]) -> Path | None:
        if self.folder is None:
            return None
        if not self.folder.is_dir():
            raise ValueError(f"no folder at {self.folder}; --data names a folder of data set files")
        places = [self.folder / part / name for name in names for part in ("", "data")]
        return next((path for path in places if path.is_file()), None)


def _checked(record: Record, fields: Mapping[str, Reader], where: str) -> Record:
    missing = [name for name in fields if name not in record]
    if missing:
        raise ValueError(
            f"{where} has no field {missing[0]!r}; expected {', '.join(fields)}, as the data set ships them"
        )
    found = {}
    for name, read in fields.items():
        try:
            found[name] = read(record[name])
        except ValueError as error:
            raise ValueError(f"{where}, field {name!r}: {error}") from None
    return found


def read_records(path: Path, most: int) -> list[Record]:
    """The first records of a .jsonl file, or of a .json file that holds one list.

    Raises:
        ValueError: not JSON, or not records.
    """
    try:
        if path.suffix == ".json":
            records = json.loads(path.read_text("utf-8-sig"))[:most]
        else:
            records = []
            with path.open(encoding="utf-8-sig") as lines:
                for line in lines:
                    if len(records) == most:
                        break
                    if line.strip():
                        records.append(json.loads(line))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is not a file of JSON records: {error}") from error
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} holds something else than JSON objects; expected one per record")
    return list(records)


def _download(url: str, most: int) -> list[Record]:
    """Records of a file on the hub. The files are read as they ship: no code of a repository is run."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("a download needs the datasets library: pip install datasets, or name a folder") from error
    try:
        found = datasets.load_dataset("json", data_files=url, split="train")
    except Exception as error:  # the library raises its own, pyarrow's, fsspec's and the network's errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{url} could not be loaded: {reason}") from error
    return [dict(record) for record in found.select(range(min(most, len(found))))]
