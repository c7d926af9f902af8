"""Train the reference model: seeded, resumable, on the CPU or one GPU.

The schedule is counted in steps (schedule.py), the data of a step follow from the seed and the step's number, and the
state on disk holds everything else: a stopped run continues with --resume as if it had not stopped.

    python examples/reference_model/train.py --corpus build/corpus --tokenizer build/tokenizer --run build/run

`--init` starts from a trained model of the same widths and fewer layers (grow.py) and leaves out the look-up drill.
"""

import argparse
import os
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from export import export_model
from grow import grow
from llama import Llama, Shape
from mixture import NAMES, make_batch
from muon import Muon
from schedule import RATES, RUNS, Phase, Schedule, phase_at, rate_factor, schedule_for
from tasks import ANSWER_WEIGHT, REPEAT_WEIGHT, Material
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset


class Stream(Dataset):
    """Batches by step number."""

    def __init__(self, material: Material, seed: int, phases: list[Phase]) -> None:
        self.material, self.seed, self.phases = material, seed, phases

    def __getitem__(self, step: int) -> tuple:
        p = phase_at(step, self.phases)
        return make_batch(self.material, self.seed, step, p.rows, p.length, p.shares)


class Meter:
    """Accuracy on answer tokens by task, and loss on text, since the last line."""

    def __init__(self) -> None:
        self.counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: float, count: float) -> None:
        self.counts[name][0] += value
        self.counts[name][1] += count

    def line(self) -> str:
        """The means; the counts start again."""
        parts = [f"{n} {v / c:.3f}" for n, (v, c) in sorted(self.counts.items()) if c]
        self.counts.clear()
        return ", ".join(parts)


def build(shape: Shape, seed: int, device: str, compiled: bool) -> tuple[Llama, list[torch.optim.Optimizer]]:
    """A new model and its two optimizers."""
    torch.manual_seed(seed)
    model = Llama(shape).to(device)
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=False)
    groups: dict[str, list] = {"matrices": [], "embedding": [], "norms": []}
    for name, p in model.named_parameters():
        groups["embedding" if name.startswith("embed") else "matrices" if p.ndim == 2 else "norms"].append(p)
    small = [{"params": groups[g], "lr": RATES[g], "full": RATES[g]} for g in ("embedding", "norms")]
    muon = Muon([{"params": groups["matrices"], "full": RATES["matrices"]}], lr=RATES["matrices"])
    return model, [muon, torch.optim.AdamW(small, betas=(0.9, 0.95), weight_decay=0.0)]


def train_step(model: Llama, optimizers: list, batch: tuple, rate: float, meter: Meter) -> None:
    """One update; `rate` scales the optimizers' full learning rates."""
    ids, weights, kinds = batch
    targets, wanted = ids[:, 1:], weights[:, 1:]
    where = F.pad(wanted > 0, (0, 1))
    logits = model.logits_at(ids, where).float()
    chosen = wanted > 0
    target, weight = targets[chosen], wanted[chosen]
    losses = F.cross_entropy(logits, target, reduction="none")
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        hits = (logits.argmax(-1) == target).float()
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(chosen)[chosen]
        for i, kind in enumerate(kinds.tolist()):
            mine = row == i
            name = NAMES[kind]
            if name == "text":
                meter.add("text loss", losses[mine].sum().item(), mine.sum().item())
                continue
            for label, level in ((name, ANSWER_WEIGHT), (f"{name}/copy", REPEAT_WEIGHT)):
                part = mine & (weight == level)
                meter.add(label, hits[part].sum().item(), part.sum().item())


def save_state(path: Path, model: Llama, optimizers: list, step: int, seen: int, seconds: float) -> None:
    """Write the state whole or not at all."""
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "shape": asdict(model.shape),
        "step": step,
        "tokens": seen,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def run(args: argparse.Namespace, shape: Shape, schedule: Schedule) -> None:
    """Train from the saved or a new state to the schedule's end or args.stop_at."""
    args.run.mkdir(parents=True, exist_ok=True)
    state_path = args.run / "state.pt"
    model, optimizers = build(shape, args.seed, args.device, args.compile)
    if args.init is not None:
        grow(model, args.init)
    first, seen, seconds = 0, 0, 0.0
    if args.resume and state_path.exists():
        state = torch.load(state_path, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seen, seconds = state["step"], state["tokens"], state["seconds"]
    material = Material.load(args.tokenizer, args.corpus)
    last = min(schedule.steps, args.stop_at or schedule.steps)
    loader = DataLoader(
        Stream(material, args.seed, schedule.phases),
        batch_size=None,
        sampler=range(first, last),
        num_workers=args.workers,
        prefetch_factor=8 if args.workers else None,
    )
    meter, began = Meter(), time.monotonic() - seconds
    for step, batch in enumerate(loader, first):
        batch = tuple(torch.as_tensor(part).to(args.device) for part in batch)
        train_step(model, optimizers, batch, rate_factor(step, schedule), meter)
        seen += batch[0].numel()
        done = step + 1
        if done % args.log_every == 0:
            seconds = time.monotonic() - began
            head = f"step {done} L {batch[0].shape[1]} {seen / 1e6:.2f}M tokens {seconds:.0f}s"
            print(f"{head} rate {rate_factor(step, schedule):.3f} | {meter.line()}", flush=True)
        if done % args.save_every == 0 or done == last:
            save_state(state_path, model, optimizers, done, seen, time.monotonic() - began)
            export_model(model.state_dict(), shape, args.tokenizer, args.run / "model")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that corpus.py and vocabulary.py wrote")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder that vocabulary.py wrote")
    parser.add_argument("--run", type=Path, required=True, help="folder for state.pt and model/")
    parser.add_argument("--init", type=Path, help="Transformers checkpoint to start from instead of random weights")
    parser.add_argument("--schedule", choices=list(RUNS), default="tasks", help="the later ones start from --init")
    parser.add_argument("--steps", type=int, help="length of the whole schedule; its phases keep their starts")
    parser.add_argument("--stop-at", type=int, help="stop at this step, before the schedule ends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--compile", action="store_true", help="compile the layers (faster, a minute per length)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = schedule_for(arguments.schedule, from_scratch=arguments.init is None)
    if arguments.steps:
        chosen = replace(chosen, steps=arguments.steps)
    vocabulary = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json")).get_vocab_size()
    run(arguments, Shape(vocab_size=vocabulary), chosen)
