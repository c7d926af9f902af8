"""An output folder that appears whole or not at all, and can be resumed after the process was killed.

```
OUT.partial/
  journal.jsonl   first line: what the output depends on; then one line per finished unit of work, each fsynced
  tree/           becomes OUT, by one rename, when everything is done
  scratch/        intermediate state of the caller; never published
```

A unit is whatever its writer chooses, usually one file. A unit counts as done once its line is in the journal and its
files still have the recorded sha256; files of unfinished units are removed on resume. So a resumed run repeats exactly
the missing units, and as units are deterministic the published folder has the same bytes as after a run in one go.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.atomic import (
    MAX_NAME_BYTES,
    TEMPORARY_SUFFIX,
    disk_full_as_value_error,
    disk_full_error,
    fsync_folder,
    is_disk_full,
)
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.paths import check_relative, quote

JOURNAL_FILE = "journal.jsonl"
TREE_FOLDER = "tree"
SCRATCH_FOLDER = "scratch"
PARTIAL_SUFFIX = ".partial"
MAX_SHOWN_DIFFERENCES = 3


def check_output(out: str | Path, *, resume: bool = False, finished: bool = False) -> Path:
    """Check, before any work, that `out` can be written. Returns it as an absolute path without links.

    Args:
        resume: an unfinished run may be there.
        finished: so may a finished one.

    Raises:
        ValueError: `out` holds something already, is a mount point, or was started before and `resume` is off.
    """
    path = _absolute(out)
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which cannot be renamed into place; name a new folder inside it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; expected a new folder for the output")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"the output {path} is inside {above}, which is a file; choose another output folder")
    if not finished and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not empty; name a new folder, or remove this one")
    partial = _partial(path)
    if not resume and partial.is_dir() and any(partial.iterdir()):
        raise ValueError(f"{partial} is left from an unfinished run; continue it with --resume, or delete it")
    return path


class UnfinishedError(ValueError):
    """A refusal in the midst of work; `partial` has what was finished before."""

    def __init__(self, error: ValueError, partial: Path) -> None:
        self.reason: ValueError = error.reason if isinstance(error, UnfinishedError) else error
        super().__init__(f"{self.reason}; what was finished is kept in {partial}: go on with --resume, or delete it")


class WorkDir:
    """The unfinished output folder. Use as a context manager:

    ```python
    with WorkDir.open(out, fingerprint, resume=resume) as work:
        if not work.done("config"):
            work.commit("config", {"config.json": atomic_write(work.path("config.json"), data)})
        work.publish()
    ```

    When the block ends with a ValueError (bad input, full disk) before any unit was finished, the partial folder is
    removed. In all other cases it stays, for `resume`: nothing that was finished is ever deleted.
    """

    def __init__(self, out: Path, journal: BinaryIO, created: list[Path]) -> None:
        self.out = out
        self._journal = journal
        self._created = created
        self._units: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()

    @classmethod
    def open(cls, out: str | Path, fingerprint: Mapping[str, Any], *, resume: bool = False) -> WorkDir:
        """Start an output folder, or continue one.

        Args:
            out: where the result will appear; must not exist, or be empty.
            fingerprint: JSON-able; everything the output's bytes depend on (recipe, seed, hashes, versions).
            resume: continue `<out>.partial` if there is one.

        Raises:
            ValueError: as `check_output`; another process is at work there; the disk is full; or the unfinished run
                was started with another fingerprint (the message says what differs).
        """
        path = check_output(out, resume=resume)
        partial = _partial(path)
        with disk_full_as_value_error(path):
            created = _make_folders(partial.parent)
            _make_folders(partial)
            _check_ours(partial)
            work = cls(path, _open_journal(partial), created)
            try:
                work._start(json.loads(json_file.canonical(fingerprint)))
            except BaseException as error:
                work._journal.close()
                if is_disk_full(error):
                    work.discard()
                raise
            return work

    def path(self, relative: str) -> Path:
        """Where to write a file of the output; its folders are made. Raises ValueError if `relative` leads outside."""
        path = self._partial / TREE_FOLDER / check_relative(relative, "the output")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def scratch(self, relative: str) -> Path:
        """Where to keep intermediate state that a resumed run may want; never published, never checked."""
        path = self._partial / SCRATCH_FOLDER / check_relative(relative, "the scratch folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def done(self, unit: str) -> bool:
        """Whether a unit was finished, now or before a kill, and its files still have the recorded sha256."""
        entry = self._units.get(unit)
        if entry is None:
            return False
        if unit not in self._checked:
            for relative, sha256 in entry["files"].items():
                path = self.path(relative)
                if not path.is_file() or sha256_file(path) != sha256:
                    del self._units[unit]
                    return False
            self._checked.add(unit)
        return True

    def files(self, unit: str) -> dict[str, str]:
        """sha256 of each file of a finished unit, by relative path."""
        return dict(self._units[unit]["files"])

    def data(self, unit: str) -> Any:
        """What `commit` was given as `data` for a finished unit."""
        return self._units[unit]["data"]

    def commit(self, unit: str, files: Mapping[str, str], data: Any = None) -> None:
        """Record a unit as finished.

        Args:
            unit: its name; committing it again replaces the record.
            files: sha256 of each file it wrote, by path relative to the output; each must be complete and fsynced.
            data: JSON-able; returned by `data`, also after a resume.
        """
        for relative in files:
            assert self.path(relative).is_file(), relative
        entry = {"unit": unit, "files": dict(files), "data": data}
        self._append(entry)
        self._units[unit] = entry
        self._checked.add(unit)

    def publish(self) -> None:
        """Make the output appear at `out`, by one rename, and remove the working folder."""
        tree = self._partial / TREE_FOLDER
        recorded = {relative for entry in self._units.values() for relative in entry["files"]}
        found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
        assert found == recorded, f"files and journal disagree: {sorted(found ^ recorded)}"
        check_output(self.out, resume=True)
        for folder in (tree, *(path for path in tree.rglob("*") if path.is_dir())):
            fsync_folder(folder)
        os.rename(tree, self.out)
        fsync_folder(self.out.parent)
        self._created = []
        self.discard()

    def discard(self) -> None:
        """Remove the working folder, and the parent folders that were made for it."""
        self._journal.close()
        with suppress(OSError):
            _remove(self._partial)
        for folder in reversed(self._created):
            with suppress(OSError):
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._journal.close()
        error = value
        if isinstance(error, OSError) and is_disk_full(error):
            error = disk_full_error(self.out, error)
        if not isinstance(error, ValueError):
            return
        if not self._units:
            self.discard()
        else:
            error = UnfinishedError(error, self._partial)
        if error is not value:
            raise error from value

    @property
    def _partial(self) -> Path:
        return _partial(self.out)

    def _start(self, fingerprint: Any) -> None:
        """Read what an earlier run recorded, drop the rest, and write the first line of a new journal."""
        recorded = self._load()
        if recorded is None:
            for folder in (TREE_FOLDER, SCRATCH_FOLDER):
                shutil.rmtree(self._partial / folder, ignore_errors=True)
            self._append({"fingerprint": fingerprint})
        elif recorded != fingerprint:
            found = _differences(recorded, fingerprint)
            shown = ", ".join(found[:MAX_SHOWN_DIFFERENCES]) + (", ..." if len(found) > MAX_SHOWN_DIFFERENCES else "")
            raise ValueError(
                f"cannot resume {self._partial}: it was started with other inputs ({shown}); "
                "use the same ones, or delete it and start again"
            )
        (self._partial / TREE_FOLDER).mkdir(exist_ok=True)
        self._sweep()
        fsync_folder(self._partial)

    def _load(self) -> Any:
        """Read the journal into `_units`, cut off a line torn by a kill, and return the fingerprint, if any."""
        self._journal.seek(0)
        raw = self._journal.read()
        whole_bytes = raw.rfind(b"\n") + 1
        self._journal.truncate(whole_bytes)
        try:
            lines = [json_file.parse_object(line, JOURNAL_FILE) for line in raw[:whole_bytes].splitlines()]
            self._units = {line["unit"]: {"files": dict(line["files"]), "data": line["data"]} for line in lines[1:]}
            return lines[0]["fingerprint"] if lines else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._journal.name} is damaged; delete {self._partial} and start again") from error

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        self._journal.write(json_file.compact(line) + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _sweep(self) -> None:
        """Remove what unfinished units left: output files the journal does not name, and temporary files."""
        tree = self._partial / TREE_FOLDER
        recorded = {relative for entry in self._units.values() for relative in entry["files"]}
        for path in sorted(tree.rglob("*"), reverse=True):  # children before their folders
            if path.is_dir():
                with suppress(OSError):
                    path.rmdir()
            elif str(path.relative_to(tree)) not in recorded:
                path.unlink()
        for path in (self._partial / SCRATCH_FOLDER).rglob(f"*{TEMPORARY_SUFFIX}"):
            path.unlink()


def remove_published_leftover(out: str | Path) -> None:
    """Finish a `publish` that was killed between its rename and its clean-up; does nothing otherwise."""
    path = _absolute(out)
    partial = _partial(path)
    if path.is_dir() and partial.is_dir():
        left = {entry.name for entry in partial.iterdir()}
        if not left or (JOURNAL_FILE in left and TREE_FOLDER not in left):
            _remove(partial)


def _absolute(out: str | Path) -> Path:
    try:
        path = Path(out).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a user without a home folder, a path too long
        raise ValueError(f"{quote(str(out))} cannot be an output folder: {error}; choose another one") from error
    if not path.name:
        raise ValueError(f"{path} is a mount point and cannot be an output folder; name a new folder inside it")
    if len(os.fsencode(path.name + PARTIAL_SUFFIX)) > MAX_NAME_BYTES:
        raise ValueError(
            f"the output's name {quote(path.name)} has {len(os.fsencode(path.name))} bytes; expected at most "
            f"{MAX_NAME_BYTES - len(PARTIAL_SUFFIX)}"
        )
    return path


def _partial(out: Path) -> Path:
    return out.with_name(out.name + PARTIAL_SUFFIX)


def _remove(partial: Path) -> None:
    """Remove a working folder; the journal, which says that it is ours, goes last."""
    for name in (TREE_FOLDER, SCRATCH_FOLDER):
        shutil.rmtree(partial / name, ignore_errors=True)
    (partial / JOURNAL_FILE).unlink(missing_ok=True)
    partial.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}; choose another output folder") from error
    return missing


def _check_ours(partial: Path) -> None:
    """Never adopt, and later delete, a folder that something else made."""
    if not (partial / JOURNAL_FILE).is_file() and any(partial.iterdir()):
        raise ValueError(f"{partial} was not made by kvcompress; choose another output folder, or move it away")


def _open_journal(partial: Path) -> BinaryIO:
    """Open the journal, locked: the lock ends with the process, however it ends."""
    journal = open(partial / JOURNAL_FILE, "a+b")  # noqa: SIM115  closed by WorkDir
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        journal.close()
        raise ValueError(f"another process is writing {partial}; wait for it, or stop it") from error
    except OSError:  # a file system without locks
        return journal
    return journal


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What two JSON values disagree on, as `seed was 0, is 1`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [text for key in keys for text in _differences(before.get(key), now.get(key), f"{where}.{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [text for i in range(len(now)) for text in _differences(before[i], now[i], f"{where}[{i}]")]
    if before == now:
        return []
    return [f"{where.lstrip('.')} was {_shown(before)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    text = json_file.compact(value).decode()
    return text if len(text) <= 40 else text[:37] + "..."
