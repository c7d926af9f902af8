"""How operations become torch ops, for graphs: `torch.ops.kvcompress.heads_attend` and its like.

Importing `ops.<form>.graph` registers a form's. Ops take no objects, so a codec goes in as its tensors and its spec in
JSON (`flatten`). Each does what the method of that name does which `ops.<form>.attention.bind` gives for the device of
the cache, and allocates what it returns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcompress.forms import FORMS


def flatten(codec: Any) -> tuple[list[Tensor], str]:
    """A codec as ops take it."""
    named = codec.tensors()
    return list(named.values()), json.dumps({"form": codec.spec.form, "tensors": [*named], **codec.spec.to_json()})


def unflatten(tensors: Sequence[Tensor], spec: str) -> Any:
    """Inverse of `flatten`."""
    data = json.loads(spec)
    form, named = FORMS[data["form"]], dict(zip(data["tensors"], tensors, strict=True))
    return form.codec.from_tensors(form.spec.from_json(data), lambda name, *_, **__: named[name])
