"""Build the text corpus from the running Python's own standard library (PSF licence).

Prose documents are the language reference topics that `help()` prints, docstrings and comment blocks; code documents
are the library's source files. Files and topics are held out whole, by a hash of their name, so that no held-out page
has a neighbour in training.

    python examples/reference_model/corpus.py --out build/corpus
"""

import argparse
import ast
import hashlib
import io
import json
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__", "pydoc_data", "config"}
HELDOUT_PERCENT = 4
HELDOUT_BYTES = 140_000
CALIBRATION_BYTES = 250_000


@dataclass(frozen=True)
class Document:
    """One text, `kind` prose or code, from the file or topic `name`."""

    name: str
    kind: str
    text: str
    heldout: bool


def is_heldout(name: str) -> bool:
    """Decide by name alone: stable across Python versions and machines."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def docstrings(tree: ast.Module) -> str:
    """All docstrings of a module in order, each definition's preceded by its name."""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                parts.append(text if isinstance(node, ast.Module) else f"{node.name}: {text}")
    return "\n\n".join(parts)


def comment_blocks(source: str) -> str:
    """Runs of at least three comment lines, joined to paragraphs."""
    blocks: list[list[str]] = []
    last_row = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            if token.start[0] != last_row + 1:
                blocks.append([])
            blocks[-1].append(token.string.lstrip("#!").strip())
            last_row = token.start[0]
    return "\n\n".join("\n".join(b) for b in blocks if len(b) >= 3)


def clean(text: str) -> str:
    """Normalise line ends and blank runs, and drop trailing spaces."""
    text = "\n".join(line.rstrip() for line in text.expandtabs(4).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def library_documents(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (name, kind, text) for every page of the library under `root`."""
    for topic in sorted(topics):
        yield f"topic:{topic}", "prose", topics[topic]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED & set(path.relative_to(root).parts) or name.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
            comments = comment_blocks(source)
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue
        yield name, "prose", docstrings(tree)
        yield name, "prose", comments
        yield name, "code", source


def collect(root: Path) -> list[Document]:
    """Clean, drop short pages and exact duplicates."""
    seen: set[str] = set()
    documents = []
    for name, kind, raw in library_documents(root):
        text = clean(raw)
        key = hashlib.sha256(text.encode()).hexdigest()
        if len(text) < 200 or key in seen:
            continue
        seen.add(key)
        documents.append(Document(name, kind, text, is_heldout(name)))
    return documents


def sample_text(documents: list[Document], size: int, code_share: float) -> str:
    """About `size` bytes of whole pages: prose, with `code_share` of it code. At most 30 kB of each page is taken."""
    parts = []
    for kind, budget in (("prose", size * (1 - code_share)), ("code", size * code_share)):
        pages = sorted((d for d in documents if d.kind == kind), key=lambda d: hashlib.sha256(d.text.encode()).digest())
        used = 0
        for page in pages:
            text = page.text[:30_000]
            if used + len(text.encode()) <= budget:
                parts.append(text)
                used += len(text.encode())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write corpus.jsonl, heldout.txt, calibration.txt and corpus.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    documents = collect(Path(sysconfig.get_paths()["stdlib"]))
    lines = "".join(json.dumps(asdict(d), ensure_ascii=False) + "\n" for d in documents)
    (args.out / "corpus.jsonl").write_text(lines, "utf-8")
    heldout = [d for d in documents if d.heldout]
    training = [d for d in documents if not d.heldout]
    (args.out / "heldout.txt").write_text(sample_text(heldout, HELDOUT_BYTES, 0.15), "utf-8")
    (args.out / "calibration.txt").write_text(sample_text(training, CALIBRATION_BYTES, 0.25), "utf-8")
    facts = {
        "python": platform.python_version(),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "documents": len(training),
        "heldout_documents": len(heldout),
        "prose_bytes": sum(len(d.text.encode()) for d in training if d.kind == "prose"),
        "code_bytes": sum(len(d.text.encode()) for d in training if d.kind == "code"),
    }
    (args.out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
