"""Score a model folder: retrieval tasks by greedy decoding in float32, and held-out text.

    python examples/reference_model/evaluate.py --model assets/reference-model \\
        --heldout assets/reference-model/heldout.txt
"""

import argparse
import json
import math
from pathlib import Path

import torch
from ruler_prompts import NiahTask, Sample, VtTask, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TASKS: dict[str, NiahTask | VtTask] = {
    "niah_single_1": NiahTask(),
    "noise, 4 keys, 1 query": NiahTask(keys=4),
    "noise, 1 key, 4 values": NiahTask(values=4),
    "noise, 4 keys, 4 queries": NiahTask(keys=4, queries=4),
    "niah_multikey_2": NiahTask(haystack="needle"),
    "niah_multikey_3": NiahTask(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "vt, 1 hop": VtTask(hops=1),
    "vt, 2 hops": VtTask(hops=2),
    "vt (4 hops)": VtTask(hops=4),
}


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int) -> str:
    """Greedy continuation of at most `limit` tokens."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=1
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def score(prediction: str, sample: Sample) -> float:
    """Share of the references that occur in the prediction."""
    return sum(r.lower() in prediction.lower() for r in sample.references) / len(sample.references)


@torch.inference_mode()
def text_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int
) -> tuple[float, float]:
    """Perplexity per token and bits per byte, over windows that do not overlap."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(ids), window - 1):
        part = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + window - 1]]], device=model.device)
        logits = model(part).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
    return math.exp(total / len(ids)), total / math.log(2) / len(text.encode())


def main() -> None:
    """Print one Markdown row per task, then the text scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--show", type=int, default=0, help="print this many answers per task")
    parser.add_argument("--json", type=Path, help="write the scores here too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    results: dict[str, dict[str, float]] = {}
    print("| task | " + " | ".join(f"{n} tokens" for n in args.lengths) + " |")
    print("| --- |" + " ---: |" * len(args.lengths))
    for name in args.tasks:
        task = TASKS[name]
        results[name] = {}
        for length in args.lengths:
            drawn = samples(task, length, args.samples, count)
            predictions = [answer(model, tokenizer, s.prompt, task.generate) for s in drawn]
            scores = [score(p, s) for p, s in zip(predictions, drawn, strict=True)]
            results[name][str(length)] = round(100 * sum(scores) / len(scores), 2)
            for prediction, sample in list(zip(predictions, drawn, strict=True))[: args.show]:
                print(f"    {prediction!r} for {sample.references}")
        print(f"| {name} | " + " | ".join(f"{results[name][str(n)]:.1f}" for n in args.lengths) + " |", flush=True)
    if args.heldout:
        perplexity, bits = text_loss(model, tokenizer, args.heldout.read_text("utf-8"), 1024)
        results["held-out text"] = {"perplexity": round(perplexity, 3), "bits_per_byte": round(bits, 4)}
        print(f"\nHeld-out text: perplexity {perplexity:.2f} per token, {bits:.3f} bits per byte")
    if args.json:
        args.json.write_text(json.dumps({"samples": args.samples, "scores": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
