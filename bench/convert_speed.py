"""Speed and memory of a conversion at the 14B model's shapes: python bench/convert_speed.py [--blocks 2]

Writes a checkpoint of some of its 40 blocks (random weights, bf16), converts it in processes of their own,
and prints for each way millions of parameters a second, start-up included, and the process's peak memory.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
SQUARE = [*(f"self_attn.{x}" for x in "qkvo"),
          *(f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img"))]
WAYS = {"rtn": ["--nvfp4", "--simple"], "search": ["--nvfp4"], "MXFP8 search": ["--mxfp8"],
        "plan score, search": [], "search, LoRA of rank 64": ["--nvfp4", "--extract-lora"]}
CHILD = ("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
         "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])")


def write_model(path, blocks, dim=5120, hidden=13824):
    shapes = {layer: (dim, dim) for layer in SQUARE} | {"ffn.0": (hidden, dim), "ffn.2": (dim, hidden)}
    tensors = {f"blocks.{i}.{layer}.weight": torch.randn(shape).mul_(0.02).bfloat16()
               for i in range(blocks) for layer, shape in shapes.items()}
    save_file(tensors, path)
    return sum(tensor.numel() for tensor in tensors.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model.safetensors", Path(folder) / "out.safetensors"
        count = write_model(source, args.blocks)
        print(f"{count / 1e6:.0f} M parameters, torch {torch.__version__}, {torch.get_num_threads()} threads")
        print(f"{'':26}{'seconds':>8}{'Mparam/s':>10}{'peak GiB':>10}{'16.4 B in minutes':>19}")
        for way, flags in WAYS.items():
            start = time.perf_counter()
            argv = [sys.executable, "-c", CHILD, ROOT / "convert.py", "-i", source, "-o", out, *flags]
            run = subprocess.run(argv, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            peak = int(run.stdout.split()[-1]) / 2 ** 20
            print(f"{way:26}{seconds:8.1f}{count / 1e6 / seconds:10.1f}{peak:10.2f}"
                  f"{16394.9 / (count / 1e6 / seconds) / 60:19.1f}", flush=True)


if __name__ == "__main__":
    main()
