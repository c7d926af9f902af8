"""From a folder or hub id to a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.source import resolve


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"model\.gguf is a file; expected the folder"):
        resolve(tmp_path / "model.gguf")


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "a/b/c", "../up", "", "new\nline"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"no folder .*; expected the folder of a Hugging Face checkpoint") as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_hub_downloads_no_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name") == tmp_path
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "kvcompress/codec.safetensors"]
    wanted += ["chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab/words.txt"]
    unwanted = ["pytorch_model.bin", "model.pt", "original/consolidated.00.pth", "consolidated.safetensors", "x.py"]
    kept = filter_repo_objects(
        wanted + unwanted, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == wanted


def hub_error(name: str) -> Callable[[], Exception]:
    def make() -> Exception:
        from huggingface_hub import errors

        kind: type[Exception] = getattr(errors, name)
        return kind.__new__(kind)  # their constructors want a network response of the client's HTTP library

    return make


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error("RepositoryNotFoundError"), "the hub has no such model, or it is private; check the name"),
        (hub_error("GatedRepoError"), "terms to be accepted; accept them at https://huggingface.co/org/name"),
        (hub_error("LocalEntryNotFoundError"), "not in the local cache and the hub cannot be reached"),
        (lambda: RuntimeError("odd\nthing"), "the hub client says 'odd'"),
        (RuntimeError, "the hub client says 'RuntimeError'"),
    ],
)
def test_hub_errors_become_one_sentence(
    error: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ValueError) as caught:
        resolve("org/name")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_mode_uses_the_cache_only(tmp_path: Path, child_environment: dict[str, str]) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    environment = {**child_environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    code = """
from kvcompress.checkpoint.source import resolve
print(resolve("org/name"))
try:
    resolve("org/other")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, refused = done.stdout.splitlines()
    assert found == str(snapshot)
    assert refused.startswith("no folder 'org/other' here, and as a hub id: it is not in the local cache")
