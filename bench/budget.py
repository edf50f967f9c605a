"""Seconds of one forward of the 14B DiT by arithmetic, on GPUs where nobody has run it: python bench/budget.py

81 frames of 480 x 832 in the published recipe's mix of formats. A product or an attention takes its FLOPs divided
by the rate that a good kernel reaches; everything else takes the bytes that it moves, divided by the memory's
bandwidth. A compiled elementwise function moves each of its tensors once.
"""
import math
import re

import fullsize  # also puts the project's folder on sys.path
import torch

import wan_fp4

TOKENS, TEXT, IMAGE = 32760, 32, 257  # of the video, a prompt, the image tower
CFG = wan_fp4.DiTConfig()
# Bytes/s of the memory, FLOP/s of the formats and of attention: as published, times the share that is reached;
# bytes/s over PCIe; bytes of memory
GPUS = {"B200": dict(bandwidth=8e12 * 0.85, nvfp4=9e15 * 0.65, mxfp8=4.5e15 * 0.7, bf16=2.25e15 * 0.7,
                     attention=2.25e15 * 0.62, pcie=64e9 * 0.8, memory=180e9),
        "RTX 5090": dict(bandwidth=1.79e12 * 0.9, nvfp4=1.676e15 * 0.75, mxfp8=838e12 * 0.75, bf16=209.5e12 * 0.8,
                         attention=209.5e12 * 0.83, pcie=64e9 * 0.8, memory=32e9),
        "RTX 5060": dict(bandwidth=448e9 * 0.9, nvfp4=307e12 * 0.8, mxfp8=153e12 * 0.8, bf16=38.4e12 * 0.85,
                         attention=38.4e12 * 0.85, pcie=32e9 * 0.8, memory=8e9)}
QUANTIZER = {"nvfp4": 2.66, "mxfp8": 1.59}  # times the activation's bytes: bench/fullsize.py --activation
SAVED = 8.8 * 2 ** 30, 3.3 * 2 ** 30  # for convert.py's gradients in a block: activations, errors of its layers
FOUR_OVER_SIX, TWO_PASS = 3.5, 4.0  # the same of NVFP4, by sample.py --activations


def rows(name):
    """The rows that a weight multiplies."""
    return TEXT if re.search(r"cross_attn\.[kv]\.", name) else IMAGE if "_img." in name else TOKENS


def work(formats, shapes, nvfp4=QUANTIZER["nvfp4"]):
    """FLOPs of attention and of the products by format, and bytes of the rest, of one forward.

    formats: {weight: "nvfp4", "mxfp8" or "bf16"}
    nvfp4: the bytes that quantizing an activation to NVFP4 moves, divided by its own
    """
    D, ffn, N, blocks = CFG.dim, CFG.ffn_dim, TOKENS, CFG.num_blocks
    flops = {"attention": 4 * blocks * N * D * (N + TEXT + IMAGE), "nvfp4": 0, "mxfp8": 0, "bf16": 0}
    quantizer = scaling = 0
    for i in range(blocks):
        seen = set()
        for name in (name for name in formats if name.startswith(f"blocks.{i}.")):
            (out, columns), fmt, n = shapes[name], formats[name], rows(name)
            flops[fmt] += 2 * n * out * columns
            if fmt == "bf16":
                continue
            fed = fmt, re.sub(r"\.[qkv](_img)?\.weight", "", name) if "self_attn" in name else name
            if fed not in seen:  # q, k and v of one format share their input
                quantizer += (nvfp4 if fmt == "nvfp4" else QUANTIZER[fmt]) * 2 * n * columns
            seen.add(fed)
            scaling += 4 * n * out  # the product, read and written by scale_and_add
    # Three layer norms from float32 to bfloat16; RMS norm with RoPE of q and k, RMS norm of cross-attention's q;
    # two gated residuals; the sum of both cross-attentions, and its residual
    passes = 3 * 6 + 2 * 4 + 4 + 2 * 10 + 6 + 10
    elementwise = blocks * N * (passes * D + 4 * ffn)  # and GELU
    return flops, {"quantizing activations": quantizer, "scale and bias": scaling, "elementwise": elementwise}


def fp8_attention(gpu):
    """Seconds that fp8 attention adds: a negative number, as it multiplies at twice the rate. Rotating q and k
    reads and writes bf16 (4 bytes each); k's and v's mean, and three largest values, read it (10); casts read
    bf16 and write E4M3 (9); y is read and written (3)."""
    self_attention = 4 * CFG.num_blocks * TOKENS ** 2 * CFG.dim
    moved = CFG.num_blocks * TOKENS * CFG.dim * (2 * 4 + 10 + 9 + 3)
    return moved / gpu["bandwidth"] - self_attention / gpu["attention"] / 2


def choices(flops, moved, gpu):
    """Seconds that choices of convert.py add."""
    nvfp4, quantizer = flops["nvfp4"], moved["quantizing activations"] / gpu["bandwidth"]
    linears = CFG.num_blocks * 2 * (3 * CFG.dim + CFG.ffn_dim)  # inputs and outputs of self_attn v, o, ffn 0, 2
    lora = 2 * TOKENS * 64 * linears / gpu["bf16"]
    again = CFG.num_blocks * TOKENS * 2 * 2 * (2 * CFG.dim + CFG.ffn_dim + CFG.dim)  # reads x, adds to y, in bf16
    return {"--w4a16 0.12": 0.12 * nvfp4 * (1 / gpu["bf16"] - 1 / gpu["nvfp4"]) - 0.12 * quantizer,
            "LoRA of rank 64": lora + again / gpu["bandwidth"]}


def finer_activations(formats, shapes, gpu, times, second):
    """Seconds that sample.py --activations adds, where quantizing an activation moves `times` its bytes. second:
    whether there is a second product, which is computed and then added; adding reads two and writes one."""
    (flops, moved), (_, more) = work(formats, shapes), work(formats, shapes, times)
    seconds = (sum(more.values()) - sum(moved.values())) / gpu["bandwidth"]
    if second:
        nvfp4 = {name: fmt for name, fmt in formats.items() if fmt == "nvfp4"}
        product = work(nvfp4, shapes)[1]["scale and bias"]  # read and written
        seconds += flops["nvfp4"] / gpu["nvfp4"] + 1.5 * product / gpu["bandwidth"]
    return seconds


def calibration(shapes, flops, moved, gpu):
    """Seconds of convert.py --calib for one picture, besides rounding. Each of the four steps takes six forwards
    in bf16 (one to sample, one to compare the layers' outputs, two for the gradients, two while blocks are
    rounded), each layer's product once more, and four backward passes: the products, attention 2.5 times, and the
    elementwise functions, not compiled, three times. A step reads the weights three times over PCIe. Where the
    memory holds less than twice what a block saves, that goes to CPU memory, and back for each backward pass."""
    linears = (flops["nvfp4"] + flops["mxfp8"] + flops["bf16"]) / gpu["bf16"]
    attention, elementwise = flops["attention"] / gpu["attention"], moved["elementwise"] / gpu["bandwidth"]
    step = 6 * (linears + attention + elementwise) + linears + 4 * (linears + 2.5 * attention + 3 * elementwise)
    weights = 2 * sum(math.prod(shape) for shape in shapes.values())
    step += 3 * weights / gpu["pcie"]
    if gpu["memory"] < 2 * sum(SAVED):
        step += 5 * CFG.num_blocks * sum(SAVED) / (gpu["pcie"] / 2)  # half the rate, as the memory is not pinned
    return 4 * step


def main():
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in wan_fp4.WanDiT().named_parameters()}
    formats = fullsize.recipe(shapes)
    flops, moved = work(formats, shapes)
    print(f"{'seconds of one forward':32}{'work':>12}" + "".join(f"{gpu:>12}" for gpu in GPUS))
    table = [(kind, f"{n / 1e12:.0f} TFLOP", [n / gpu[kind] for gpu in GPUS.values()])
             for kind, n in flops.items()]
    table += [(kind, f"{n / 1e9:.0f} GB", [n / gpu["bandwidth"] for gpu in GPUS.values()])
              for kind, n in moved.items()]
    total = [sum(column) for column in zip(*(seconds for *_, seconds in table))]
    one_call = [a - moved["scale and bias"] / gpu["bandwidth"] for a, gpu in zip(total, GPUS.values())]
    fp8 = [a + fp8_attention(gpu) for a, gpu in zip(one_call, GPUS.values())]
    table += [("sum", "", total), ("with quant.multiply_in_one_call", "", one_call),
              ("and --attention fp8", "", fp8), ("4 steps of that", "", [4 * s for s in fp8])]
    added = [choices(flops, moved, gpu) for gpu in GPUS.values()]
    table += [(f"{choice} adds", "", [a[choice] for a in added]) for choice in added[0]]
    for way, times in (("four-over-six", FOUR_OVER_SIX), ("two-pass", TWO_PASS)):
        adds = [finer_activations(formats, shapes, gpu, times, way == "two-pass") for gpu in GPUS.values()]
        table += [(f"{way} adds", "", adds)]
    table += [("--calib, each picture", "", [calibration(shapes, flops, moved, gpu) for gpu in GPUS.values()])]
    for kind, amount, seconds in table:
        print(f"{kind:32}{amount:>12}" + "".join(f"{s:12.2f}" for s in seconds))


if __name__ == "__main__":
    main()
