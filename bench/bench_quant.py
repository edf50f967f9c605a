"""How fast quant.py is against comfy-kitchen's eager backend, on this machine: python bench/bench_quant.py

Both run by turns in one process on the same weight, so that a busy machine slows both; medians are printed.
Outputs are allocated by both. comfy-kitchen gets the tensor scale for nothing; quant.py finds it.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from comfy_kitchen.backends.eager import quantization as ck

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quant  # noqa: E402


def compare(label, theirs, ours, rounds, params):
    seconds = {theirs: [], ours: []}
    for i in range(rounds + 1):
        for run in (theirs, ours):
            start = time.perf_counter()
            run()
            if i:  # the first turn warms up
                seconds[run].append(time.perf_counter() - start)
    a, b = (statistics.median(seconds[run]) for run in (theirs, ours))
    print(f"{label:<28}{params / a / 1e6:>10.0f}{params / b / 1e6:>10.0f}{a / b:>8.1f}x", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--cols", type=int, default=5120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    w = torch.randn(args.rows, args.cols, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    data, block_scale, scale = quant.quantize_nvfp4(w)
    data8, block_scale8 = quant.quantize_mxfp8(w)
    e8m0 = block_scale8.view(torch.float8_e8m0fnu)

    print(f"{args.rows} x {args.cols} bfloat16, {args.threads} threads, torch {torch.__version__}, Mparam/s")
    print(f"{'':<28}{'kitchen':>10}{'quant.py':>10}{'ratio':>9}")
    todo = [("NVFP4 quantise",
             lambda: ck.quantize_nvfp4(w, scale), lambda: quant.quantize_nvfp4(w)),
            ("MXFP8 quantise", lambda: ck.quantize_mxfp8(w), lambda: quant.quantize_mxfp8(w))]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        todo += [(f"NVFP4 dequantise {name}",
                  lambda d=dtype: ck.dequantize_nvfp4(data, scale, block_scale, d),
                  lambda d=dtype: quant.dequantize_nvfp4(data, block_scale, scale, dtype=d)),
                 (f"MXFP8 dequantise {name}",
                  lambda d=dtype: ck.dequantize_mxfp8(data8, e8m0, d),
                  lambda d=dtype: quant.dequantize_mxfp8(data8, block_scale8, dtype=d))]
    for label, theirs, ours in todo:
        compare(label, theirs, ours, args.rounds, w.numel())
    for label, quantize in (("NVFP4 search", quant.quantize_nvfp4), ("MXFP8 search", quant.quantize_mxfp8)):
        start = time.perf_counter()
        quantize(w, method="search")
        print(f"{label:<28}{'-':>10}{w.numel() / (time.perf_counter() - start) / 1e6:>10.0f}")


if __name__ == "__main__":
    main()
