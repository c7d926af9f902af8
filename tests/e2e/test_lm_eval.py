"""lm-evaluation-harness on a compressed checkpoint, as docs/lm-eval.md has it: one local task, through a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from kvcompress_eval.engines import open_engine
from kvcompress_eval.tasks.needle_grid import draw
from kvcompress_eval.tokenizer import TextTokenizer

from tests import require
from tests.e2e import http_server

require.need("vllm", "lm_eval")
pytestmark = pytest.mark.e2e

TASK = """\
task: local_retrieval
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "(\\\\d+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
QUESTIONS = 6
SERVER = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_a_local_task_through_a_server(balanced: Path, tmp_path: Path) -> None:
    drawn = [draw(Random(seed), 20, 15 * seed) for seed in range(QUESTIONS)]
    # The last question has no answer in its text, so that not every answer can be right.
    wanted = [answer for _, _, answer in drawn[:-1]] + ["0"]
    rows = [
        {"question": text + begun, "answer": answer} for (text, begun, _), answer in zip(drawn, wanted, strict=True)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local_retrieval.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    tokenizer = TextTokenizer(balanced)
    with http_server.command(balanced, tmp_path / "server.log", env=SERVER) as url:
        model = f"model={balanced},tokenizer={balanced},base_url={url}/v1/completions,num_concurrent=2,max_length=1024"
        words = ["--model", "local-completions", "--model_args", model, "--tasks", "local_retrieval"]
        words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
        environment = os.environ | OFFLINE | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *words], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        engine = open_engine(url, balanced, tokenizer, max_context=1024)
        ours = engine.generate([tokenizer.encode(row["question"]) for row in rows], 24)
        engine.close()
    [results] = (tmp_path / "out").rglob("results_*.json")
    score = json.loads(results.read_text())["results"]["local_retrieval"]["exact_match,number"]
    [samples] = (tmp_path / "out").rglob("samples_local_retrieval_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in found] == [made.text.split("\n")[0] for made in ours]
    right = [answer in made.text for answer, made in zip(wanted[:-1], ours, strict=False)]
    assert sum(right) >= 4, "the compressed model still finds most needles"
    assert score == pytest.approx(sum(right) / QUESTIONS)
