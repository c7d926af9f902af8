"""Code widths as parameters of a recipe: whole numbers that `codec.codes.registry` has codes for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from kvcompress.codec.codes.registry import listed, quantized, widths


def _one_of(known: Callable[[], tuple[int, ...]]) -> tuple[PlainValidator, WithJsonSchema]:
    def check(value: Any) -> int:
        if value not in known():
            raise PydanticCustomError("width", "Input should be {known}", {"known": listed(known())})
        return int(value)

    return PlainValidator(check), WithJsonSchema({"type": "integer", "enum": list(known())})


Width = Annotated[int, *_one_of(widths)]
QuantizedWidth = Annotated[int, *_one_of(quantized)]
