"""File names that come from a file are checked here before anything is opened."""

from __future__ import annotations

from pathlib import Path

MAX_QUOTED_CHARACTERS = 100


def quote(text: str) -> str:
    """A name read from a file, made fit for a one-line message: escaped, and cut where it is very long."""
    return repr(text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "...")


def check_relative(name: str, where: str) -> str:
    """Return `name` if it is a relative path that cannot leave its folder.

    Raises:
        ValueError: absolute path, `..`, empty part, backslash, NUL or `::` (which separates file and tensor in keys).
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(bad in name for bad in ("\\", "\0", "::")):
        raise ValueError(
            f"{where} names the file {quote(name)}, which is not a path inside the checkpoint folder; "
            "get a fresh copy from a source you trust"
        )
    return name


def check_plain_name(name: str, where: str) -> str:
    """Return `name` if it is a file name without any folder. Raises ValueError otherwise."""
    check_relative(name, where)
    if "/" in name:
        raise ValueError(f"{where} names the file {quote(name)}; expected a file directly in the checkpoint folder")
    return name


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, after following links, as long as it stays where a checkpoint may keep files.

    That is the folder itself or, for a snapshot in the Hugging Face cache
    (`<cache>/models--org--name/snapshots/<revision>/file -> ../../blobs/<hash>`), the blob stores of that cache.
    The file need not exist.

    Raises:
        ValueError: the name or a symbolic link leads elsewhere.
    """
    check_relative(name, str(folder))
    root = folder.resolve()
    try:
        target = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{folder / name} cannot be followed to a file ({error.__class__.__name__})") from error
    if not any(target.is_relative_to(allowed) for allowed in (root, *_blob_stores(root))):
        raise ValueError(
            f"{folder / name} is a link to {target}, outside the checkpoint folder; replace the link with the file"
        )
    return target


def _blob_stores(root: Path) -> list[Path]:
    """Where links of a hub-cache snapshot may point: the model's own store and the one shared by all models."""
    repository = root.parent.parent
    if root.parent.name != "snapshots" or "--" not in repository.name:
        return []
    return [repository / "blobs", repository.parent / "blobs"]
