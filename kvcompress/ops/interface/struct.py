"""Structs of the C interface: fields with their types in C, and what they mean."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Type:
    """Of a field; of a pointer also the type of the numbers in a tensor that it may point into."""

    c: str
    layout: Any
    dtype: torch.dtype | None = None

    def __mul__(self, count: int) -> Type:
        return Type(f"{self.c}[{count}]", self.layout * count)


INT32 = Type("int32_t", ctypes.c_int32)
INT64 = Type("int64_t", ctypes.c_int64)
FLOAT = Type("float", ctypes.c_float)
POINTER = Type("void*", ctypes.c_void_p)
CONST_POINTER = Type("const void*", ctypes.c_void_p)
BYTES = Type("uint8_t*", ctypes.c_void_p, torch.uint8)
FLOATS = Type("const float*", ctypes.c_void_p, torch.float32)
FLOATS_OUT = Type("float*", ctypes.c_void_p, torch.float32)
INT16S = Type("const int16_t*", ctypes.c_void_p, torch.int16)
INT32S = Type("const int32_t*", ctypes.c_void_p, torch.int32)
INT64S = Type("const int64_t*", ctypes.c_void_p, torch.int64)


class Field(tuple[str, Any]):
    """Name and layout, as ctypes takes them."""

    type: Type | type[ctypes.Structure]
    doc: str


class Struct(ctypes.Structure):
    """Tensors that a field is set to are pointed into, and kept; a field that is not set is 0 or null."""

    _dtypes: ClassVar[dict[str, torch.dtype | None]]
    """Of every field, of numbers in a tensor that it may point into."""
    _kept: list[object]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._dtypes = {each[0]: each.type.dtype if isinstance(each.type, Type) else None for each in fields(cls)}

    def __init__(self, *values: object, **named: object) -> None:
        named = {**dict(zip(self._dtypes, values, strict=False)), **named}
        kept: list[object] = []
        super().__init__(**{name: _plain(value, name, self._dtypes[name], kept) for name, value in named.items()})
        self._kept = kept

    @classmethod
    def plain(cls, keep: object, *values: object) -> Self:
        """All fields in order, pointers as numbers, unchecked: for what is made anew at every step of a server.

        Args:
            keep: what the pointers point into.
        """
        made = cls.__new__(cls)
        ctypes.Structure.__init__(made, *values)
        made._kept = [keep]
        return made

    def filled(self, **named: object) -> Self:
        """A copy with fields set, of a struct that has what never changes."""
        made = type(self).from_buffer_copy(self)
        kept: list[object] = [self._kept]
        for name, value in named.items():
            setattr(made, name, _plain(value, name, self._dtypes[name], kept))
        made._kept = kept
        return made


def _plain(value: object, name: str, dtype: torch.dtype | None, kept: list[object]) -> object:
    """A field's value as ctypes takes it; what it points into is kept."""
    if isinstance(value, Tensor):
        assert dtype is None or value.dtype == dtype, (name, value.dtype)
        kept.append(value)
        return value.data_ptr()
    if isinstance(value, Struct):
        kept.append(value)
    return value


def fields(struct: type[Struct]) -> tuple[Field, ...]:
    return cast(tuple[Field, ...], struct._fields_)


def field(name: str, type: Type | type[ctypes.Structure], doc: str = "") -> Field:
    made = Field((name, type.layout if isinstance(type, Type) else type))
    made.type, made.doc = type, doc
    return made


def pointer_to(struct: type[Struct]) -> Type:
    return Type(f"const {c_name(struct)}*", ctypes.POINTER(struct))


def c_name(struct: type[ctypes.Structure]) -> str:
    """`heads.AppendArgs` is kvc_heads_append_args."""
    room = struct.__module__.rpartition(".")[2]
    words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in struct.__name__)
    return f"kvc{words}" if room == "common" else f"kvc_{room}{words}"


@dataclass(frozen=True)
class Function:
    """An entry point of one of the libraries."""

    name: str
    arguments: str
    doc: str
    returns: str = "int32_t"


def call(name: str, doc: str, *structs: type[Struct]) -> Function:
    """A function of pointers to structs."""
    arguments = [f"const {c_name(struct)}* {struct.__name__.removesuffix('Args').lower()}" for struct in structs]
    if len(structs) == 1:
        arguments = [f"const {c_name(structs[0])}* args"]
    return Function(name, ", ".join(arguments), doc)
