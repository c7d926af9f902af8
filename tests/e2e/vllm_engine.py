"""vLLM engines, each in a process of its own: engines leak when several live in one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e import forks

ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 320,
    "max_num_seqs": 8,
    "block_size": 32,
    "enforce_eager": True,
    "disable_log_stats": False,
    "kv_cache_memory_bytes": 64 * 2**20,
}


def run(
    model: Path,
    *passes: list[list[int]],
    max_tokens: int = 64,
    env: dict[str, str] | None = None,
    logits: bool = False,
    between: Callable[[Any], None] | None = None,
    serve: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """Generate greedily from each pass of prompts, one after the other, in one engine.

    Args:
        between: called with vLLM's `LLM` after each pass but the last; a function of a module.
        serve: called in the engine's process instead of `generate`, which it calls in turn; a function of a module.

    Returns:
        tokens: generated ids, by pass and prompt; cached: prompt tokens taken from the prefix cache, likewise;
        blocks: cache blocks allocated; capacity_tokens: the tokens vLLM says fit; metrics: its counters by name;
        kvcompress: our metrics, likewise; logits: where asked for, those of every generated token, by pass, prompt and
        step; log: everything the engine wrote.
    """
    wanted = {"logprobs_mode": "raw_logits", "max_logprobs": -1} if logits else {}
    scenario: dict[str, Any] = {"passes": passes, "max_tokens": max_tokens, "logits": logits, "between": between}
    scenario["engine"] = ENGINE | {"model": str(model)} | wanted | engine
    return in_child(serve or generate, env, scenario=scenario)


def refusals(*engines: dict[str, Any], env: dict[str, str] | None = None) -> list[str]:
    """The message with which each engine refuses to start; they are tried one after the other in one process."""
    errors: list[str] = in_child(attempts, env, engines=[ENGINE | engine for engine in engines])["errors"]
    return errors


def in_child(
    function: Callable[..., dict[str, Any]], env: dict[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """What a module's function returns when it runs in a process of its own, plus `log`: everything it wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = forks.context().Process(target=_main, args=(function, arguments, env or {}, folder))
        child.start()
        child.join(600)
        if child.is_alive():
            child.kill()
            child.join()
        log = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else "no output"
        assert (folder / "result").exists(), log[-5000:]
        result: dict[str, Any] = json.loads((folder / "result").read_text())
        return result | {"log": log}


def redirect(log: Path) -> None:
    """Have everything that this process and its children print go to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)


def fork_workers() -> None:
    """Have vLLM fork its processes from this one, where on CPU it spawns new ones that import everything again."""
    ordinary = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return ordinary("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking  # type: ignore[assignment]


def _main(
    function: Callable[..., dict[str, Any]], arguments: dict[str, Any], env: dict[str, str], folder: Path
) -> None:
    """In the child: everything printed goes to `folder/log`."""
    redirect(folder / "log")
    tempfile.tempdir = str(folder)
    fork_workers()
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would take precedence over kv_cache_memory_bytes
    os.environ.pop("KVCOMPRESS_METRICS", None)  # may be that of a test that has loaded the plug-in
    os.environ.update(env)
    try:
        found = function(**arguments)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    (folder / "result").write_text(json.dumps(found))


def attempts(engines: list[dict[str, Any]]) -> dict[str, Any]:
    return {"errors": [_attempt(engine) for engine in engines]}


def _attempt(engine: dict[str, Any]) -> str:
    from vllm import LLM

    try:
        LLM(**engine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "started"


def _logits(completion: Any) -> list[list[float]]:
    return [[step[token].logprob for token in range(len(step))] for step in completion.logprobs]


def _our_metrics() -> dict[str, float]:
    """Those of engine 0, as the metrics endpoint would give them."""
    from prometheus_client import REGISTRY

    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.name.startswith("kvcompress_")}


def generate(scenario: dict[str, Any]) -> dict[str, Any]:
    """In the child: what `run` asks for."""
    from vllm import LLM, SamplingParams

    llm = LLM(**scenario["engine"])
    sampling = SamplingParams(
        temperature=0,
        max_tokens=scenario["max_tokens"],
        detokenize=False,
        ignore_eos=True,
        logprobs=-1 if scenario["logits"] else None,
    )
    outputs = []
    for prompts in scenario["passes"]:
        if outputs and scenario["between"] is not None:
            scenario["between"](llm)
        outputs.append(llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False))
    return {
        "tokens": [[list(output.outputs[0].token_ids) for output in one] for one in outputs],
        "logits": [[_logits(output.outputs[0]) for output in one] for one in outputs] if scenario["logits"] else None,
        "cached": [[output.num_cached_tokens for output in one] for one in outputs],
        "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "capacity_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
        "kvcompress": _our_metrics(),
        "metrics": {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")},
    }
