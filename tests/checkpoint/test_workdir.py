"""The output folder: whole or not at all, resumable, and never someone else's."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.atomic import TEMPORARY_SUFFIX, atomic_file, atomic_write, check_free_space
from kvcompress.checkpoint.workdir import WorkDir, check_output, remove_published_leftover

INPUTS = {"recipe": {"stages": [{"rank": 1}, {"bits": 4}]}, "seed": 0}


def put(work: WorkDir, relative: str, data: bytes = b"data") -> None:
    work.commit(relative, {relative: atomic_write(work.path(relative), data)}, {"size": len(data)})


def run(out: Path, *steps: Callable[[WorkDir], object]) -> None:
    """A whole run: open, do the steps, leave."""
    with WorkDir.open(out, INPUTS) as work:
        for step in steps:
            step(work)


def put_a(work: WorkDir) -> None:
    put(work, "a")


def failing(error: BaseException) -> Callable[[WorkDir], object]:
    def step(_: WorkDir) -> None:
        raise error

    return step


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_publish_leaves_the_files_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with WorkDir.open(out, INPUTS) as work:
        put(work, "a")
        put(work, "sub/b")
        atomic_write(work.scratch("state/hidden"), b"x")
        assert not out.exists()
        work.publish()
    assert names(tmp_path) == ["new", "new/out", "new/out/a", "new/out/sub", "new/out/sub/b"]


def test_publish_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
        work.publish()
    assert names(tmp_path) == ["out", "out/a"]


def test_resume_keeps_what_was_committed_and_drops_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with WorkDir.open(out, INPUTS) as work:
        put(work, "a")
        work.path("sub/uncommitted").write_bytes(b"half")
        work.path(f".b{TEMPORARY_SUFFIX}").write_bytes(b"half")
        work.scratch("kept").write_bytes(b"state")
        work.scratch(f".x{TEMPORARY_SUFFIX}").write_bytes(b"half")
    with WorkDir.open(out, INPUTS, resume=True) as work:
        assert work.done("a")
        assert work.files("a").keys() == {"a"}
        assert work.data("a") == {"size": 4}
        assert not work.done("b")
        assert names(tmp_path / "out.partial") == ["journal.jsonl", "scratch", "scratch/kept", "tree", "tree/a"]
        work.publish()
    assert names(tmp_path) == ["out", "out/a"]


def test_resume_without_an_earlier_run_starts_one(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS, resume=True) as work:
        put(work, "a")
        work.publish()
    assert names(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"DATA"), Path.unlink])
def test_a_unit_whose_file_changed_is_not_done(tmp_path: Path, damage: Any) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
        put(work, "b")
        damage(work.path("a"))
    with WorkDir.open(tmp_path / "out", INPUTS, resume=True) as work:
        assert not work.done("a")
        assert work.done("b")
        put(work, "a", b"again")
        assert work.done("a")
    with WorkDir.open(tmp_path / "out", INPUTS, resume=True) as work:
        assert work.done("a")
        assert work.data("a") == {"size": 5}


def test_every_cut_of_the_journal_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill can leave any prefix; whole lines count, the torn one does not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them, slow on a real disk
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
        put(work, "b")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    tree = tmp_path / "out.partial" / "tree"
    raw = journal.read_bytes()
    for cut in range(len(raw) + 1):
        journal.write_bytes(raw[:cut])
        tree.mkdir(exist_ok=True)
        (tree / "a").write_bytes(b"data")
        (tree / "b").write_bytes(b"data")
        with WorkDir.open(tmp_path / "out", INPUTS, resume=True) as work:
            whole_lines = raw[:cut].count(b"\n")
            assert (work.done("a"), work.done("b")) == (whole_lines > 1, whole_lines > 2)
            put(work, "b", b"new")
            assert names(tree) == (["a", "b"] if whole_lines > 1 else ["b"])


def test_damage_within_the_journal_is_refused(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
        put(work, "b")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"unit":"a"', b'"unit":"a'))
    with pytest.raises(ValueError, match=r"journal\.jsonl is damaged; delete .*out\.partial and start again"):
        WorkDir.open(tmp_path / "out", INPUTS, resume=True)


def test_resume_with_other_inputs_says_what_differs(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
    other = {"recipe": {"stages": [{"rank": 2}, {"bits": 4}]}, "seed": 1}
    with pytest.raises(ValueError, match=r"recipe\.stages\[0\]\.rank was 1, is 2, seed was 0, is 1\)"):
        WorkDir.open(tmp_path / "out", other, resume=True)
    with pytest.raises(ValueError, match=r"recipe\.stages was .*, is \[\], seed was 0, is null, x was null, is 1\)"):
        WorkDir.open(tmp_path / "out", {"recipe": {"stages": []}, "x": 1}, resume=True)
    with WorkDir.open(tmp_path / "out", INPUTS, resume=True) as work:
        assert work.done("a")


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
    with pytest.raises(ValueError, match=r"out\.partial is left from an unfinished run; continue it with --resume"):
        check_output(tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished run"):
        WorkDir.open(tmp_path / "out", INPUTS)


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="full exists and is not empty"):
        WorkDir.open(tmp_path / "full", INPUTS)
    with pytest.raises(ValueError, match="file is a file"):
        WorkDir.open(tmp_path / "file", INPUTS)
    with pytest.raises(ValueError, match="which is a file"):
        WorkDir.open(tmp_path / "file" / "out", INPUTS)
    with pytest.raises(ValueError, match="/ is a mount point"):
        WorkDir.open("/", INPUTS)
    assert names(tmp_path) == ["file", "full", "full/x"]


def test_a_folder_of_someone_else_is_never_adopted(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"out\.partial was not made by kvcompress"):
        WorkDir.open(tmp_path / "out", INPUTS, resume=True)
    assert names(tmp_path) == ["out.partial", "out.partial/thesis.txt"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
        with pytest.raises(ValueError, match=r"another process is writing .*out\.partial"):
            WorkDir.open(tmp_path / "out", INPUTS, resume=True)
        assert work.done("a")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_names_cannot_leave_the_output(tmp_path: Path, name: str) -> None:
    work = WorkDir.open(tmp_path / "out", INPUTS)
    for place in (work.path, work.scratch):
        with pytest.raises(ValueError, match="not a path inside"):
            place(name)
    work.discard()
    assert names(tmp_path) == []


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 9 is too large"):
        run(tmp_path / "new" / "out", failing(ValueError("rank 9 is too large")))
    assert names(tmp_path) == []


def test_no_refusal_deletes_what_was_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"layer 3 is not finite; what was finished is kept in .*out.partial"
    ) as caught:
        run(out, put_a, failing(ValueError("layer 3 is not finite")))
    assert "--resume" in str(caught.value)
    with WorkDir.open(out, INPUTS, resume=True) as work:
        assert work.done("a")


def test_a_refusal_within_a_stage_is_told_once(tmp_path: Path) -> None:
    def stage(outer: WorkDir) -> None:
        with WorkDir.open(outer.scratch("stage"), INPUTS) as inner:
            put(inner, "b", b"b")
            raise ValueError("no space")

    with pytest.raises(ValueError, match="no space") as caught:
        run(tmp_path / "out", put_a, stage)
    assert str(caught.value).count("what was finished") == 1
    assert f"{tmp_path / 'out'}.partial:" in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), OSError(errno.EIO, "disk")])
def test_other_errors_leave_the_folder_for_resume(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run(tmp_path / "out", put_a, failing(error))
    with WorkDir.open(tmp_path / "out", INPUTS, resume=True) as work:
        assert work.done("a")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_sentence_and_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ValueError, match=r"writing .*out failed: .*; free some space"):
        run(tmp_path / "new" / "out", put_a, lambda _: monkeypatch.setattr(os, "fsync", full), put_a)
    monkeypatch.undo()
    with WorkDir.open(tmp_path / "new" / "out", INPUTS, resume=True) as work:
        assert work.done("a")


def test_full_disk_while_starting_is_a_value_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="no space left on device"):
        WorkDir.open(tmp_path / "new" / "out", INPUTS)
    assert names(tmp_path) == []


def test_a_write_the_system_refuses_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A real failing write, through the limit on file sizes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(_: WorkDir) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(ValueError, match=r"writing .* failed: file too large"):
            run(tmp_path / "out", put_a, limit, lambda work: put(work, "b", bytes(1_000_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("b", ".b"))]


def test_leftover_of_a_kill_after_the_rename_is_removed(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "out", INPUTS) as work:
        put(work, "a")
    remove_published_leftover(tmp_path / "out")
    assert (tmp_path / "out.partial" / "tree" / "a").exists()
    os.rename(tmp_path / "out.partial" / "tree", tmp_path / "out")
    remove_published_leftover(tmp_path / "out")
    assert names(tmp_path) == ["out", "out/a"]


def test_a_file_that_was_not_committed_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="stray"):
        run(tmp_path / "out", lambda work: work.path("stray").touch(), WorkDir.publish)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    first = atomic_write(path, b"old")
    assert atomic_write(path, lambda file: file.write(b"old") and None) == first

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_free_space_is_checked_where_the_output_will_be(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        ValueError, match=r"not enough disk space for .*/not/yet: 1,000,000,.* bytes needed, [\d,]+ free"
    ):
        check_free_space(tmp_path / "not" / "yet", 10**24)
