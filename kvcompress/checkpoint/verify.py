"""Recompute every hash of a compressed checkpoint and name what differs."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from kvcompress.checkpoint.atomic import atomic_write
from kvcompress.checkpoint.digests import Digests, split_key, tensor_key
from kvcompress.checkpoint.documents import LOADED_FOLDERS, check_acceptable, is_document, is_loaded
from kvcompress.checkpoint.hashing import sha256_file, sha256_range
from kvcompress.checkpoint.manifest import MANIFEST_FILE, Accepted, Manifest, ManifestDamagedError
from kvcompress.checkpoint.paths import check_relative, inside
from kvcompress.checkpoint.reader import CONFIG_FILE
from kvcompress.checkpoint.safetensors_file import parse_header, read_header_bytes

CODEC_FILE = "kvcompress/codec.safetensors"
STATEMENT_FILE = "kvcompress/statement.json"
MAX_THREADS = 8
MISSING = "missing"


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not as the manifest says: a tensor key (`file::name`) or, for a whole file, its path."""

    tensor: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.tensor}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class VerifyReport:
    """`checked` counts the digests compared; `mismatches` has missing and unlisted things too, each once.

    `documents` are files that have changed and are no part of the model, such as its card: told, but no fault.
    """

    checked: int
    mismatches: list[Mismatch]
    documents: list[Mismatch] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.mismatches

    def to_json(self) -> dict[str, Any]:
        found = {"mismatches": self.mismatches, "documents": self.documents}
        return {"ok": self.ok, "checked": self.checked} | {
            name: [asdict(item) for item in items] for name, items in found.items()
        }


def verify(directory: str | Path, progress: Callable[[int], None] | None = None) -> VerifyReport:
    """Hash every file and tensor of a compressed checkpoint.

    Args:
        directory: the checkpoint.
        progress: called with the number of bytes hashed since the last call, from several threads but one at a time.

    Raises:
        ValueError: no manifest, or one of a newer format; a damaged manifest is a mismatch.
    """
    return _verify(Path(directory), lambda digests: digests, progress)


def verify_codec(
    directory: str | Path, verify_weights: bool = False, progress: Callable[[int], None] | None = None
) -> VerifyReport:
    """Hash what the codec is made of only: manifest, config.json, codec.safetensors and what the codec states.

    Args:
        directory: the checkpoint.
        verify_weights: check everything, as `verify` does.
        progress: as for `verify`.

    Raises:
        ValueError: as `verify`.
    """
    return verify(directory, progress) if verify_weights else _verify(Path(directory), _codec_only, progress)


def require_verified(report: VerifyReport, directory: str | Path) -> None:
    """Raises ValueError naming the first mismatch, if there is one; for callers that must not go on."""
    if not report.ok:
        more = f" ({len(report.mismatches)} mismatches in all)" if len(report.mismatches) > 1 else ""
        raise ValueError(f"{directory} is damaged: {report.mismatches[0]}{more}; {remedy(report, directory)}")


def remedy(report: VerifyReport, directory: str | Path) -> str:
    """What to do about mismatches: a new copy, or where all may be edits of the operator's, how to accept them."""
    names = [mismatch.tensor for mismatch in report.mismatches if mismatch.found != MISSING]
    try:
        for name in names:
            check_acceptable(name)
    except ValueError:
        names = []
    if len(names) < len(report.mismatches):
        return "get a new copy of it"
    options = " ".join(f"--accept {shlex.quote(name)}" for name in names)
    return (
        "get a new copy of it, or if the change is your own, accept it with "
        f"`kvcompress verify {shlex.quote(str(directory))} {options}`"
    )


def accept(directory: str | Path, names: Sequence[str]) -> list[str]:
    """Record changed, or added, side files in the manifest as they are now; hashes of all else stay as they were.

    The manifest keeps the digests from before and the time, and is replaced whole or not at all.

    Args:
        names: relative to the directory.

    Returns:
        Those that differed from what was recorded.

    Raises:
        ValueError: a file that is part of the compressed model or is not there, or a manifest that is missing or
            damaged; nothing is changed then.
    """
    folder = Path(directory)
    manifest = Manifest.load(folder)
    changed = []
    for name in dict.fromkeys(names):
        check_relative(name, "--accept")
        check_acceptable(name)
        path = inside(folder, name)
        if not path.is_file():
            raise ValueError(f"{folder / name} is missing; only a file that is there can be accepted")
        sha256 = sha256_file(path)
        before = manifest.files.get(name)
        if sha256 != before:
            manifest.accepted.append(Accepted(file=name, before=before, after=sha256, when=_now()))
            manifest.files[name] = sha256
            changed.append(name)
    if changed:
        atomic_write(folder / MANIFEST_FILE, manifest.to_bytes())
    return changed


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _codec_only(digests: Digests) -> Digests:
    return Digests(
        {key: sha256 for key, sha256 in digests.tensors.items() if split_key(key)[0] == CODEC_FILE},
        {file: sha256 for file, sha256 in digests.headers.items() if file == CODEC_FILE},
        {file: sha256 for file, sha256 in digests.files.items() if file in (CONFIG_FILE, STATEMENT_FILE)},
    )


def _verify(
    directory: Path, select: Callable[[Digests], Digests], progress: Callable[[int], None] | None
) -> VerifyReport:
    try:
        manifest = Manifest.load(directory)
    except ManifestDamagedError as error:
        return VerifyReport(1, [Mismatch(MANIFEST_FILE, error.expected, error.found)])
    digests = select(manifest.digests)
    checked = 1 + len(digests.files) + len(digests.headers) + len(digests.tensors)
    mismatches = _unlisted_files(directory, manifest.digests)
    if CONFIG_FILE not in digests.files:
        mismatches.append(Mismatch(CONFIG_FILE, "a digest in the manifest", "none"))
    jobs = [_Job(file, sha256, inside(directory, file), 0, None) for file, sha256 in digests.files.items()]
    tensors_of: dict[str, dict[str, str]] = {file: {} for file in digests.headers}
    for key, sha256 in digests.tensors.items():
        tensors_of.setdefault(split_key(key)[0], {})[key] = sha256
    for file, tensors in tensors_of.items():
        wrong, tensor_jobs = _check_header(directory, file, digests.headers.get(file), tensors)
        mismatches += wrong
        jobs += tensor_jobs
    mismatches += _run(jobs, progress)
    documents = [mismatch for mismatch in mismatches if is_document(mismatch.tensor)]
    return VerifyReport(checked, [mismatch for mismatch in mismatches if mismatch not in documents], documents)


@dataclass(frozen=True)
class _Job:
    """One digest to recompute; `nbytes` is None for a whole file."""

    key: str
    expected: str
    path: Path
    offset: int
    nbytes: int | None


def _unlisted_files(directory: Path, digests: Digests) -> list[Mismatch]:
    folders = (directory / name for name in LOADED_FOLDERS)
    found = (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()))
    names = [name for path in found if is_loaded(name := path.relative_to(directory).as_posix())]
    listed = digests.files.keys() | digests.headers.keys()
    return [Mismatch(name, MISSING, "not in the manifest") for name in names if name not in listed]


def _check_header(
    directory: Path, file: str, expected: str | None, tensors: dict[str, str]
) -> tuple[list[Mismatch], list[_Job]]:
    """Check one safetensors file up to its tensors, and list those: a header that differs cannot locate them."""
    path = inside(directory, file)
    if expected is None:
        return [Mismatch(file, "a digest in the manifest", "none")], []
    if not path.is_file():
        return [Mismatch(file, expected, MISSING)], []
    try:
        raw = read_header_bytes(path)
    except ValueError as error:
        return [Mismatch(file, expected, str(error))], []
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        return [Mismatch(file, expected, f"{found} (header)")], []
    header = parse_header(raw, str(path), file)
    here = {tensor_key(file, name): info for name, info in header.tensors.items()}
    wrong = [Mismatch(key, MISSING, "not in the manifest") for key in here if key not in tensors]
    wrong += [Mismatch(key, tensors[key], MISSING) for key in tensors if key not in here]
    if path.stat().st_size > header.file_bytes:
        wrong.append(Mismatch(file, f"{header.file_bytes} bytes", f"{path.stat().st_size} bytes"))
    jobs = [_Job(key, tensors[key], path, info.offset, info.nbytes) for key, info in here.items() if key in tensors]
    return wrong, jobs


def _run(jobs: Iterable[_Job], progress: Callable[[int], None] | None) -> list[Mismatch]:
    """Recompute digests in parallel (hashing releases the interpreter's lock); mismatches in the order of the jobs."""
    lock = Lock()

    def check(job: _Job) -> Mismatch | None:
        if not job.path.is_file():
            return Mismatch(job.key, job.expected, MISSING)
        if job.nbytes is None:
            found: str | None = sha256_file(job.path)
        else:
            found = sha256_range(job.path, job.offset, job.nbytes)
        if progress:
            with lock:
                progress(job.path.stat().st_size if job.nbytes is None else job.nbytes)
        if found == job.expected:
            return None
        return Mismatch(job.key, job.expected, found or "the file ends before it")

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return [mismatch for mismatch in pool.map(check, jobs) if mismatch]
