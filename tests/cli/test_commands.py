"""The commands as a user types them, run in this process."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import require, tiny
from tests.command import Run
from tests.compression import compress

MOST_MODULES = 300
"""That `kvcompress --help` may import; 217 are."""


@pytest.fixture(scope="module")
def compressed(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    compress(base_model, out)
    return out


def test_compress_inspect_verify_decompress(run: Run, base_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (
        "compress",
        base_model,
        "--recipe",
        recipe_file,
        "--out",
        out,
        "--samples",
        4,
        "--length",
        64,
        "--json",
    )
    code, stdout, _ = run(*arguments)
    assert code == 0
    assert json.loads(stdout)["bytes_per_token"]["ratio"] > 4
    code, stdout, _ = run("inspect", out, "--json")
    assert code == 0
    assert json.loads(stdout)["recipe"]["stages"][0]["method"] == "pca"
    code, stdout, _ = run("inspect", out)
    assert "24 ch x 2 bit" in stdout
    code, stdout, _ = run("verify", out, "--json")
    assert code == 0
    assert json.loads(stdout)["ok"]
    code, _, _ = run("decompress", out, "--out", tmp_path / "plain")
    assert code == 0


def test_plan(run: Run, base_model: Path, recipe_file: Path) -> None:
    code, stdout, _ = run("plan", base_model, "-r", recipe_file, "--json", "--memory", 0.5, "--context", 1000)
    made = json.loads(stdout)
    assert code == 0
    assert set(made) >= {
        "model",
        "recipe",
        "bytes_per_token",
        "weights_bytes",
        "peak_rss_bytes",
        "capacity_tokens",
        "layers",
    }
    per_token = made["bytes_per_token"]["compressed"]
    assert made["capacity_tokens"]["compressed"] == (1 << 29) // per_token
    assert made["layers"][3]["v"]["rank"] == 24
    code, stdout, _ = run("plan", base_model, "-r", recipe_file)
    assert code == 0
    assert "smaller cache" in stdout


def test_methods(run: Run) -> None:
    code, stdout, _ = run("methods", "--json")
    assert code == 0
    entries = {entry["name"]: entry for entry in json.loads(stdout)}
    assert entries["pca"]["kind"] == "basis"
    assert "rank" in entries["pca"]["parameters"]["properties"]
    code, stdout, _ = run("methods")
    assert "scalar" in stdout


def test_verify_names_the_tensor_with_exit_code_1(run: Run, compressed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed, damaged)
    path = damaged / "kvcompress" / "codec.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x10
    path.write_bytes(data)
    code, _, stderr = run("verify", damaged)
    assert code == 1
    *told, error = stderr.strip().splitlines()
    assert "kvcompress/codec.safetensors::layers." in error
    assert all(line.startswith("hashing: ") for line in told), "one line says what is wrong"


def test_verify_tells_of_documents_and_records_an_accepted_edit(run: Run, compressed: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(compressed, edited)
    (edited / "README.md").write_text("a better card")
    code, stdout, _ = run("verify", edited)
    assert code == 0
    assert "changed, not part of the model: README.md" in stdout
    (edited / "generation_config.json").write_text("{}")
    code, _, stderr = run("verify", edited)
    assert code == 1
    assert "--accept generation_config.json" in stderr
    code, stdout, _ = run("verify", edited, "--accept", "generation_config.json")
    assert code == 0
    assert "accepted: generation_config.json" in stdout
    assert run("verify", edited)[0] == 0
    code, _, stderr = run("verify", edited, "--accept", "config.json")
    assert code == 2
    assert "config.json is part of the compressed model" in stderr


def _pickle_only(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _truncated(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _escaping_index(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _edit_recipe(old: str, new: str) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        path = base.parent / "recipe.yaml"
        path.write_text(path.read_text().replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "not in the local cache|no folder"),
        (lambda base: (base / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda base: (base / "config.json").unlink(), "no config.json"),
        (lambda base: (base / "config.json").write_text("{"), "config.json"),
        (lambda base: (base / "tokenizer.json").unlink(), "tokenizer"),
        (_pickle_only, "pickle weights only"),
        (_truncated, "bytes"),
        (_escaping_index, r"\.\./x"),
        (_edit_config(architectures=["GPTJForCausalLM"]), "unknown architecture GPTJForCausalLM"),
        (_edit_config(kv_lora_rank=64), "latent attention"),
        (_edit_config(quantization_config={"quant_method": "gptq"}), "found quant_method gptq; supported are fp8"),
        (_edit_config(quantization_config={"quant_method": "fp8"}), "no tensor is; remove its quantization_config"),
        (_edit_config(quantization_config={"quant_method": "kvcompress"}), "already compressed"),
        (_edit_recipe("rank:", "rankk:"), "line 5: unknown key 'rankk'"),
        (_edit_recipe("k: 1.0", "k: 40"), "line 3: rank 40 is above head_dim 32"),
        (_edit_recipe("method: scalar\n    bits: {k: 4, v: 2}", "method: pca"), "second basis"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    damage: Callable[[Path], None], words: str, run: Run, base_model: Path, recipe_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_model, base)
    damage(base)
    before = set(tmp_path.rglob("*"))
    code, _, stderr = run("compress", base, "-r", recipe_file, "-o", tmp_path / "deep" / "out", "--samples", 2)
    assert code == 2, stderr
    errors = [line for line in stderr.splitlines() if not line.endswith((": started", ": done"))]
    assert len(errors) == 1, stderr
    assert errors[0].startswith("error: ")
    assert re.search(words, errors[0]), errors[0]
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "Missing argument"),
        (["plan", "--nope"], "No such option"),
        (["nope"], "No such command"),
        (["compress", "x", "-r", "none.yaml", "-o", "y"], "no recipe file"),
        (["verify", "nowhere"], "nowhere"),
        (["inspect", "."], "no kvcompress/manifest.json"),
    ],
)
def test_usage_errors(
    arguments: list[str], words: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run(*arguments)
    assert code == 2
    assert words in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_existing_output_is_refused(run: Run, base_model: Path, recipe_file: Path, compressed: Path) -> None:
    code, _, stderr = run("compress", base_model, "-r", recipe_file, "-o", compressed)
    assert code == 2
    assert "not empty" in stderr


def test_serve_refuses_a_plain_checkpoint(run: Run, base_model: Path) -> None:
    code, _, stderr = run("serve", base_model, "--port", "1")
    assert code == 2
    assert "not compressed" in stderr


def test_serve_passes_its_own_options_on(run: Run, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompress_cli import serve

    from kvcompress.serving.loading import CANARY, KV_BITS, KV_RANK, canary_is_asked_for, kv_bits, kv_rank

    started: list[list[str]] = []

    def exec_instead(_: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setenv(KV_RANK, "1")
    monkeypatch.setenv(KV_BITS, "32")
    monkeypatch.setenv(CANARY, "1")
    monkeypatch.setattr(serve.os, "execv", exec_instead)
    monkeypatch.setattr(serve, "_server", lambda directory: ["server", directory])
    monkeypatch.setattr(serve.metadata, "entry_points", lambda group: [SimpleNamespace(name="kvcompress")])
    assert run("serve", compressed, "--kv-rank", "0.5", "--kv-bits", "4", "--port", "1")[0] == 0
    assert started[0][-3:] == [str(compressed), "--port", "1"]
    assert (kv_rank(), kv_bits()) == (0.5, 4)
    assert canary_is_asked_for()
    assert run("serve", compressed, "--no-canary", "--port", "1")[0] == 0
    assert started[1][-3:] == [str(compressed), "--port", "1"]
    assert not canary_is_asked_for()
    code, _, stderr = run("serve", compressed, "--kv-rank", "1.5")
    assert code == 2
    assert "found KV rank 1.5" in stderr
    code, _, stderr = run("serve", compressed, "--kv-bits", "5")
    assert code == 2
    assert "found KV bits 5; expected 32, 16, 8, 4 or 2" in stderr
    monkeypatch.setenv(KV_BITS, "5")
    with pytest.raises(ValueError, match="found KVCOMPRESS_KV_BITS=5"):
        kv_bits()
    monkeypatch.setenv(KV_RANK, "half")
    with pytest.raises(ValueError, match="found KVCOMPRESS_KV_RANK=half"):
        kv_rank()


def test_full_disk(run: Run, base_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    """A tmpfs of 1 MiB: refused before any work."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        require.missing("root", "mounting a tmpfs needs root; test_file_size_limit covers a disk that fills up")
    try:
        code, _, stderr = run("compress", base_model, "-r", recipe_file, "-o", disk / "out", "--samples", 2)
        assert code == 2
        assert "not enough disk space" in stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_file_size_limit(run: Run, base_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    """Space that runs out in the middle: one line, and nothing that was finished is lost."""
    out = tmp_path / "deep" / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        code, _, stderr = run("compress", base_model, "-r", recipe_file, "-o", out, "--samples", 2, "--length", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "space" in stderr.splitlines()[-1]
    assert not out.exists()
    code, _, _ = run("compress", base_model, "-r", recipe_file, "-o", out, "--samples", 2, "--length", 32, "--resume")
    assert code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_eval_hands_ruler_its_tasks_lengths_template_and_files(
    run: Run, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kvcompress_eval.evaluate
    import kvcompress_eval.report

    asked: dict[str, Any] = {}

    def evaluate(models: list[str], **options: Any) -> dict[str, Any]:
        asked.update(options)
        skipped = [{"task": "cwe", "length": 1024, "reason": "too short: the smallest prompt takes 1108 tokens"}]
        environment = {"engine": "vllm", "text_engine": "vllm", "computed_in": "float32", "template": "chat"}
        found = {"overall": [], "tasks": [], "perplexity": {}, "agreement": {}, "drift": {}, "skipped": skipped}
        return {**found, "environment": environment}

    monkeypatch.setattr(kvcompress_eval.evaluate, "run", evaluate)
    monkeypatch.setattr(kvcompress_eval.report, "write_report", lambda *parts: None)
    monkeypatch.setattr(kvcompress_eval.report, "write_table", lambda *parts: None)
    essay = tmp_path / "essay.txt"
    essay.write_text("One. Two.")
    command = ["eval", base_model, "-o", tmp_path / "out", "--suite", "ruler"]
    ruler = ["--tasks", "vt,niah_single_2", "--length", "4096", "--samples", "7", "--template", "chat"]
    code, stdout, stderr = run(*command, *ruler, "--essay", essay)
    assert code == 0, stderr
    assert "left out: cwe at 1024: too short: the smallest prompt takes 1108 tokens" in stdout
    assert (asked["tasks"], asked["lengths"], asked["samples"]) == (["vt", "niah_single_2"], [4096], 7)
    assert (asked["template"], asked["sources"].essay, asked["sources"].squad) == ("chat", essay, None)
    code, _, stderr = run(*command, "--squad", tmp_path / "gone.json")
    assert code == 2
    assert "gone.json, which --squad names" in stderr.splitlines()[-1]


def python(code: str, *arguments: object) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": "cli:eval:."}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_little_and_nothing_heavy() -> None:
    """What it takes is imports; benchmarks of seconds are not for machines that run other tests beside."""
    code = (
        "import sys; sys.argv = ['kvcompress', '--help']\n"
        "from kvcompress_cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'pydantic', 'kvcompress_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(len(sys.modules))\n"
    )
    *text, modules = python(code).splitlines()
    assert "compress" in "\n".join(text)
    assert int(modules) < MOST_MODULES


def test_plan_imports_no_torch(base_model: Path, recipe_file: Path) -> None:
    code = (
        "import sys; sys.argv = ['kvcompress', 'plan', sys.argv[1], '-r', sys.argv[2]]\n"
        "from kvcompress_cli.main import run\n"
        "try: run()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
    )
    python(code, base_model, recipe_file)


def test_every_command_help_has_an_example(run: Run) -> None:
    for command in ("plan", "compress", "verify", "inspect", "serve", "decompress", "methods", "eval"):
        code, stdout, _ = run(command, "--help")
        assert code == 0
        assert "Example: kvcompress" in stdout, command


def test_checkpoint_of_every_architecture_can_be_planned(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    for architecture in tiny.ARCHITECTURES:
        base = tiny.save_model(tmp_path / architecture, architecture)
        code, _, stderr = run("plan", base, "-r", recipe_file)
        assert code == 0, stderr
