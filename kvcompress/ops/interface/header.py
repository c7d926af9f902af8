"""Writes csrc/include/kvcompress/*.h: `python -m kvcompress.ops.interface.header`."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType

from kvcompress.ops.interface import common
from kvcompress.ops.interface.struct import Field, Function, Struct, Type, c_name, fields

ROOT = Path(__file__).parents[3]
ROOMS = ("common", "heads", "blocks", "latent", "shared")

_WRITTEN = "// Written by kvcompress/ops/interface/header.py.\n//\n"
_START = """\
#include <stdint.h>

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))
"""


def path(room: str) -> Path:
    return ROOT / "csrc" / "include" / "kvcompress" / f"{room}.h"


def header(room: str) -> str:
    """The C header of one of the modules beside this one: its constants, structs and functions."""
    module = importlib.import_module(f"kvcompress.ops.interface.{room}")
    before = _START if module is common else '#include "kvcompress/common.h"\n'
    structs = [item for item in vars(module).values() if _is_struct(item) and item.__module__ == module.__name__]
    parts = [
        f"{_WRITTEN}{_comment(inspect.getdoc(module) or '')}#pragma once\n",
        before,
        *filter(None, ["".join(_constants(room, module)), _enums() if module is common else ""]),
        *map(_struct, structs),
        *map(_function, module.FUNCTIONS),
    ]
    return "\n".join(parts)


def _is_struct(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, Struct)


def _comment(text: str, indent: str = "") -> str:
    paragraphs = [" ".join(each.split()) for each in text.split("\n\n") if each]
    width = 120 - len(indent)
    return "".join(f"{indent}// {line}\n" for each in paragraphs for line in textwrap.wrap(each, width - 3))


def _constants(room: str, module: ModuleType) -> list[str]:
    """Numbers, and lists of them as macros that call another one with each."""
    prefix = "KVC_" if module is common else f"KVC_{room.upper()}_"
    lines = []
    for name, value in vars(module).items():
        if isinstance(value, int) and name.isupper():
            lines.append(f"#define {prefix}{name} {value}\n")
        elif name.isupper() and isinstance(value, tuple) and isinstance(value[0], int | tuple):
            items = [", ".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value]
            lines.append(f"#define {prefix}{name}(X) {' '.join(f'X({item})' for item in items)}\n")
    return lines


def _enums() -> str:
    names = {
        "dtype": [name.upper() for name in common.DTYPES],
        "level": [name.upper() for name in common.LEVELS],
        "status": list(common.STATUS),
    }
    lists = {name: ", ".join(f"KVC_{item} = {i}" for i, item in enumerate(items)) for name, items in names.items()}
    return "".join(f"enum kvc_{name} {{ {items} }};\n" for name, items in lists.items())


def _struct(struct: type[Struct]) -> str:
    # What ctypes lays out and what the compiler does are one.
    check = f"static_assert(sizeof({c_name(struct)}) == {ctypes.sizeof(struct)});\n"
    doc = _comment(inspect.cleandoc(struct.__doc__)) if struct.__doc__ else ""
    return f"{doc}typedef struct {{\n{''.join(map(_field, fields(struct)))}}} {c_name(struct)};\n{check}"


def _field(field: Field) -> str:
    kind, array, count = (field.type.c if isinstance(field.type, Type) else c_name(field.type)).partition("[")
    line = f"    {kind} {field[0]}{array}{count};"
    if not field.doc:
        return f"{line}\n"
    whole = f"{line}  // {field.doc}\n"
    return whole if len(whole) <= 121 else f"{_comment(field.doc, '    ')}{line}\n"


def _function(function: Function) -> str:
    return f"{_comment(function.doc)}KVC_EXPORT {function.returns} {function.name}({function.arguments});\n"


if __name__ == "__main__":
    for room in ROOMS:
        path(room).write_text(header(room))
