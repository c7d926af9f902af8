"""Average checkpoints of one run: weights along the end of training lie around a better point than the last of them.

    python examples/reference_model/average.py --out averaged build/run/model-3750 build/run/model-4000 ...

Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, arXiv 1803.05407.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def average(folders: list[Path], out: Path) -> None:
    """Write the mean of the folders' weights, in float32 and stored as bfloat16, beside the first folder's files."""
    shutil.copytree(folders[0], out)
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        for name, tensor in load_file(folder / "model.safetensors").items():
            sums[name] = sums.get(name, torch.zeros(())) + tensor.float() / len(folders)
    rounded = {name: tensor.bfloat16().contiguous() for name, tensor in sums.items()}
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="Transformers folders of one run")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    average(arguments.folders, arguments.out)
