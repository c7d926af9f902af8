"""Processes that need not import torch, transformers and vLLM: forked from one that has, and has done nothing else.

A process has one fork server, so everything that wants such processes takes them from here.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from multiprocessing.context import ForkServerContext

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "kvcompress",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Spinning worker threads make tiny layers fifty times slower on a machine that does anything else.
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Of the fork server; some of it counts when vLLM is imported."""

_IMPORTS = ["kvcompress.pipeline.compress", "transformers.models.llama.modeling_llama"]
_VLLM = ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"]


@functools.cache
def context() -> ForkServerContext:
    """Where to take a `Process` from."""
    os.environ.update(ENVIRONMENT)
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTS + (_VLLM if importlib.util.find_spec("vllm") else []))
    return found
