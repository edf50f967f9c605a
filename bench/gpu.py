"""Is the 14B model right on your GPU, and as fast as it should be? Random weights, no downloads, about five minutes.

    python bench/gpu.py                 on a GPU: correctness, and a full-size forward by arithmetic and measured
    python bench/gpu.py --arithmetic    the arithmetic alone, for a few cards; this needs no GPU
    python bench/gpu.py --tiny          everything at a tiny size, in seconds, on the CPU too: tries the program

The last lines are Markdown tables. **Nobody has run this on a Blackwell GPU yet: if you can, please paste them into
a bug report**, even if all is well.

Right: each format's product on this GPU, and attention in 8 bits, against the same from dequantized operands
(extra/check.py).

Fast: one forward of the published recipe's mix of formats, for 81 frames of 480 x 832. By arithmetic, a product or an
attention takes its floating-point operations divided by the rate that a good kernel reaches. Everything else takes the
bytes that it moves, divided by the rate of the memory; a compiled elementwise function moves each of its tensors once.
Measured: each kind of product, of attention and of quantization by itself, at its full size, multiplied by how often a
forward runs it. *Elementwise and the rest* is the whole forward without these. Layers with the same shape share their
weights, so 0.6 GiB stand for the 10 GiB of the model.

Memory: the most bytes that the tensors of a forward take at a time, besides the weights: by arithmetic on torch's meta
device, with flash attention; measured by torch's allocator.

The tests import FULL, TINY, dit_working, vae_working and measure.
"""
import argparse
import functools
import itertools
import math
import platform
import re
import statistics
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench  # also puts the project's folder on sys.path
import convert
import quant
import wan_fp4
from extra import check
from extra.attention import fp8_attention, has_fp8_kernel
from extra.stream import StreamedBlocks

GIB = 2 ** 30


@dataclass(frozen=True)
class Size:
    """A model and the latents of a video."""
    cfg: wan_fp4.DiTConfig = wan_fp4.DiTConfig()
    vae: wan_fp4.VAEConfig = wan_fp4.VAEConfig()
    grid: tuple = (21, 60, 104)  # of 81 frames of 480 x 832
    text: int = 30  # tokens of the prompt; the DiT adds one for the padding
    image: int = 257

    @property
    def tokens(self):
        return math.prod(self.grid) // 4

    def rows(self, name):
        """The rows that a block's weight multiplies."""
        return (self.text + 1 if re.search(r"cross_attn\.[kv]\b", name) else self.image if "_img" in name
                else self.tokens)

    def shapes(self):
        """{name: shape} of the DiT's parameters."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in wan_fp4.WanDiT(self.cfg).named_parameters()}


FULL = Size()
TINY = Size(wan_fp4.DiTConfig(dim=256, ffn_dim=512, num_blocks=2, text_dim=64, image_dim=64),
            wan_fp4.VAEConfig(dims=(16, 16, 16, 16), num_res_blocks=1), (2, 4, 4))


def recipe(shapes):
    """{weight: format} of the published recipe."""
    return convert.plan(shapes, "nvfp4", "mxfp8", convert.RECIPE_MXFP8, convert.RECIPE_KEPT)


# ----------------------------------------------------------------------------------------------------
# Random weights
# ----------------------------------------------------------------------------------------------------


def random_tensor(suffix, dtype, shape, device):
    """Random weights of about 0.02, in any way of storing them."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if suffix == "weight_scale_2":
        return torch.full(shape, 0.02 / 2.9, device=device)  # 2.9: the rms of random E2M1 codes
    if suffix == "weight_scale":
        byte = 56 if dtype == torch.float8_e4m3fn else 127 - 7  # 1 in E4M3; 2 ** -7 in E8M0
        return torch.full(shape, byte, dtype=torch.uint8, device=device).view(dtype)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).mul_(1 if dtype == torch.float8_e4m3fn else 0.02).to(dtype)


def random_dit(size, formats, device, blocks_on=None, **options):
    """A DiT on `device`, its blocks' tensors on `blocks_on`. Tensors of the same kind and shape are one tensor."""
    tensors, made = {}, {}
    for name, shape in size.shapes().items():
        layer, _, suffix = name.rpartition(".")
        place = blocks_on if blocks_on and name.startswith("blocks.") else device
        fmt = formats.get(name, "bf16")
        stored = {suffix: (torch.bfloat16, shape)}
        if fmt != "bf16":
            stored = {suffix: (dtypes[0], shape) for suffix, (dtypes, shape, _) in
                      quant.stored_tensors(fmt, shape[1], shape[0])[0].items()}
            tensors[f"{layer}.comfy_quant"] = quant.write_marker({"format": fmt})
        for suffix, (dtype, shape) in stored.items():
            kind = suffix, dtype, shape, place
            if kind not in made:
                made[kind] = random_tensor(*kind)
            tensors[f"{layer}.{suffix}"] = made[kind]
    return wan_fp4.dit_from_tensors(tensors, {}, "random weights", device, torch.bfloat16, **options)


def inputs(size, device):
    """forward's arguments: x, t, text, image, y."""
    def normal(*shape):
        return random_tensor("", torch.float32, shape, device)
    return (normal(1, 16, *size.grid), torch.full((1,), 900.0, device=device),
            normal(1, size.text, size.cfg.text_dim), normal(1, size.image, size.cfg.image_dim),
            normal(1, 20, *size.grid))


def random_vae(size, device):
    with torch.device(device):
        vae = wan_fp4.WanVAE(size.vae).bfloat16().eval()
    vae.dtype = torch.bfloat16
    return vae


# ----------------------------------------------------------------------------------------------------
# Memory by arithmetic
# ----------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Records the most bytes held at a time by tensors made inside, besides a model's own. On the meta device it takes
    no memory."""

    def __init__(self, model):
        super().__init__()
        self.now, self.peak = 0, 0
        self.known = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


@torch.inference_mode()
def dit_working(mode, size=FULL, rank=0, two_pass=False):
    """Peak bytes of a forward besides the weights, with all blocks' Linears in NVFP4, bf16 activations and a LoRA
    of this rank."""
    size = Size(wan_fp4.DiTConfig(num_blocks=2), grid=size.grid)
    dit = random_dit(size, convert.plan(size.shapes()), torch.device("meta"), mode=mode, two_pass=two_pass)
    for layer in dit.modules():
        if isinstance(layer, quant.QuantLinear) and layer.format and rank:
            layer.attach_lora(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in (
                (layer.out_features, rank), (rank, layer.in_features))))
    exact = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.empty_like(q)  # flash: no N x N matrix
    try:
        with PeakMemory(dit) as memory:
            dit(*inputs(size, torch.device("meta")))
    finally:
        F.scaled_dot_product_attention = exact
    return memory.peak


@torch.inference_mode()
def vae_working(size=FULL):
    """Peak bytes of decoding besides the weights, in bf16."""
    vae = random_vae(size, torch.device("meta"))
    small = torch.empty(1, size.vae.z_dim, *size.grid, device="meta", dtype=torch.bfloat16)
    with PeakMemory(vae) as memory:
        cache = {}
        for z in wan_fp4.chunks(small, 1):
            vae.decoder(vae.conv2(z, cache), cache)
    return memory.peak


# ----------------------------------------------------------------------------------------------------
# Seconds by arithmetic
# ----------------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """What good kernels reach of the published peaks: bytes/s of the memory, FLOP/s of attention and of the formats,
    of convolutions; bytes/s over PCIe; bytes of memory."""
    bandwidth: float
    attention: float
    nvfp4: float
    mxfp8: float
    bf16: float
    pcie: float
    memory: float


CARDS = {
    "B200": Card(8e12 * 0.85, 2.25e15 * 0.62, 9e15 * 0.65, 4.5e15 * 0.7, 2.25e15 * 0.7, 64e9 * 0.8, 180e9),
    "RTX PRO 6000": Card(1.79e12 * 0.9, 503.8e12 * 0.7, 2.015e15 * 0.7, 1.007e15 * 0.7, 503.8e12 * 0.75, 64e9 * 0.8,
                         96e9),
    "RTX 5090": Card(1.79e12 * 0.9, 209.5e12 * 0.83, 1.676e15 * 0.75, 838e12 * 0.75, 209.5e12 * 0.8, 64e9 * 0.8,
                     32e9),
    "RTX 5080": Card(960e9 * 0.9, 112.6e12 * 0.83, 900e12 * 0.75, 450e12 * 0.75, 112.6e12 * 0.8, 64e9 * 0.8, 16e9),
    "RTX 5060": Card(448e9 * 0.9, 38.4e12 * 0.85, 307e12 * 0.8, 153e12 * 0.8, 38.4e12 * 0.85, 32e9 * 0.8, 8e9)}
SHOWN = "B200", "RTX 5090", "RTX 5060"
# Bytes moved by quantizing an activation, divided by its own. NVFP4 reads it twice, as the tensor scale depends on
# all of it, and writes codes and scales, which the swizzle reads and writes again; two passes write both twice.
QUANTIZER = {"nvfp4": 2.7, "mxfp8": 1.6}
TWO_PASS = 3.1
BYTES = {"nvfp4": 0.5625, "mxfp8": 1.03125, "bf16": 2}  # of a weight
SAVED = 8.8 * GIB + 3.3 * GIB  # for convert.py's gradients in a block: activations, errors of its layers
REST = "elementwise and the rest"


def card_of(device):
    """The Card of a GPU and its name in CARDS; for others, rates measured on it."""
    name = torch.cuda.get_device_name(device) if on_gpu(device) else "this CPU"
    known = next((card for card in CARDS if re.search(rf"{card}\b(?! Ti)", name)), None)
    if known:
        return CARDS[known], f"{known}'s published peaks"
    n = 8192 if on_gpu(device) else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product, copy = 2 * n ** 3 / seconds(lambda: a @ a, device), 2 * a.nbytes / seconds(a.clone, device)
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu(device) else math.inf
    card = Card(copy, product, 4 * product, 2 * product, product, 25e9, memory)
    return card, f"its own rates: bf16 products {product / 1e12:.3g} TFLOP/s (NVFP4 four times, MXFP8 twice that), " \
                 f"memory {copy / 1e9:.3g} GB/s"


def work(size, shapes, formats, tensor_cores=True):
    """{row: (rate of a Card, amount)} of one forward: FLOPs, or bytes for the rate "bandwidth".

    formats: {weight: "nvfp4", "mxfp8" or "bf16"}. Without tensor cores, weights are dequantized to bf16.
    """
    N, D, ffn = size.tokens, size.cfg.dim, size.cfg.ffn_dim
    amounts = Counter(attention=4 * size.cfg.num_blocks * N * D * (N + size.text + 1 + size.image))
    seen = set()
    for name in (name for name in formats if name.startswith("blocks.")):
        (M, K), fmt, n = shapes[name], formats[name], size.rows(name)
        amounts[fmt if tensor_cores else "bf16"] += 2 * n * M * K
        if fmt == "bf16":
            continue
        if not tensor_cores:
            amounts["dequantizing weights"] += M * K * (BYTES[fmt] + 2)
            continue
        fed = fmt, re.sub(r"\.[qkv]\.weight", "", name) if "self_attn" in name else name
        if fed not in seen:  # q, k and v of one format share their input
            amounts["quantizing activations"] += QUANTIZER[fmt] * 2 * n * K
        seen.add(fed)
        amounts["scale and bias"] += 4 * n * M  # the product, read and written
    # Three layer norms from float32 to bfloat16; RMS norm with RoPE of q and k, RMS norm of cross-attention's q;
    # two gated residuals; the sum of both cross-attentions, and its residual
    passes = 3 * 6 + 2 * 4 + 4 + 2 * 10 + 6 + 10
    amounts[REST] = size.cfg.num_blocks * N * (passes * D + 4 * ffn)  # and GELU
    return {row: (row if row in Card._fields else "bandwidth", amount) for row, amount in amounts.items()}


def arithmetic(size, card, tensor_cores=True):
    """[(row, what it takes in words, seconds)] of one forward by the published recipe, of what choices make of it,
    and of the VAE."""
    shapes = size.shapes()
    formats = recipe(shapes)
    rows = work(size, shapes, formats, tensor_cores)
    table = [(row, f"{amount / 1e9:.0f} GB" if rate == "bandwidth" else f"{amount / 1e12:.0f} TFLOP",
              amount / getattr(card, rate)) for row, (rate, amount) in rows.items()]
    forward = sum(seconds for *_, seconds in table)
    N, D, ffn, blocks = size.tokens, size.cfg.dim, size.cfg.ffn_dim, size.cfg.num_blocks
    # Rotating q and k reads and writes them (8 bytes a value); k's and v's mean and three largest values read (10);
    # casts to E4M3 (9); y is read and written (3). Products take half the time
    fp8 = blocks * N * D * (8 + 10 + 9 + 3) / card.bandwidth - 2 * blocks * N ** 2 * D / card.attention
    weights = sum(math.prod(shapes[name]) * BYTES[fmt] for name, fmt in formats.items())
    choices = {"": 0, ", --attention fp8": fp8, ", --offload": max(0, weights / card.pcie - forward)}
    if tensor_cores:
        nvfp4 = {name: fmt for name, fmt in formats.items() if fmt == "nvfp4"}
        product, quantizer, scaling = (work(size, shapes, nvfp4)[row][1] for row in (
            "nvfp4", "quantizing activations", "scale and bias"))
        more = quantizer * (TWO_PASS / QUANTIZER["nvfp4"] - 1) + 2.5 * scaling  # adding reads two and writes one
        choices[", --two-pass"] = product / card.nvfp4 + more / card.bandwidth
        choices[", 12 % in W4A16"] = 0.12 * (product / card.bf16 - product / card.nvfp4 - quantizer / card.bandwidth)
        # v, o, ffn.0 and ffn.2: x is read, y read and written, in bf16
        choices[", a LoRA of rank 64"] = blocks * N * (3 * D + ffn) * (4 * 64 / card.bf16 + 4 / card.bandwidth)
    table += [(f"a forward{choice}", "", forward + adds) for choice, adds in choices.items()]
    table += [(row, f"{flops / 1e12:.0f} TFLOP", flops / (0.7 * card.bf16))
              for row, flops in zip(("VAE encode", "VAE decode"), vae_flops(size))]
    return table + [("--calib, each picture", "", calibration(shapes, rows, card, blocks))]


def calibration(shapes, rows, card, blocks):
    """Seconds of convert.py --calib for one picture, besides rounding. Each of the four steps takes six forwards in
    bf16 (one to sample, one to compare the layers' outputs, two for the gradients, two while blocks are rounded),
    each layer's product once more, and four backward passes: the products, attention 2.5 times, and the elementwise
    functions, not compiled, three times. A step reads the weights three times over PCIe. Where the memory holds less
    than twice what a block saves, that goes to CPU memory, and back for each backward pass."""
    linears = sum(amount for rate, amount in rows.values() if rate in BYTES) / card.bf16
    attention, elementwise = rows["attention"][1] / card.attention, rows[REST][1] / card.bandwidth
    step = 6 * (linears + attention + elementwise) + linears + 4 * (linears + 2.5 * attention + 3 * elementwise)
    step += 3 * 2 * sum(math.prod(shape) for shape in shapes.values()) / card.pcie
    if card.memory < 2 * SAVED:
        step += 5 * blocks * SAVED / (card.pcie / 2)  # half the rate, as the memory is not pinned
    return 4 * step


@functools.cache
@torch.inference_mode()
def vae_flops(size):
    """FLOPs of encoding and of decoding, counted by torch. Each latent frame after the second takes the same."""
    meta, (frames, height, width) = torch.device("meta"), size.grid
    vae, counts, total = random_vae(size, meta).float(), {}, []
    vae.dtype = torch.float32
    for work, channels, scale in (vae.encode, 3, 8), (vae.decode, size.vae.z_dim, 1):
        for t in (2, 3):
            x = torch.empty(1, channels, 4 * t - 3 if scale == 8 else t, scale * height, scale * width, device=meta)
            with FlopCounterMode(display=False) as counter:
                work(x)
            counts[t] = counter.get_total_flops()
        total.append(counts[2] + (frames - 2) * (counts[3] - counts[2]))
    return total


# ----------------------------------------------------------------------------------------------------
# Measured
# ----------------------------------------------------------------------------------------------------


def on_gpu(device):
    return device.type == "cuda" and torch.cuda.is_available()  # False for the tests' pretended GPU


def seconds(work, device, rounds=3, warm_up=1):
    """The median time of a call, with all work that it queues on the GPU."""
    def synchronized():
        work()
        if on_gpu(device):
            torch.cuda.synchronize(device)

    return bench.median_seconds(synchronized, rounds=rounds, warm_up=warm_up)[0]


def block_layers(dit, size):
    """{(format, rows, in, out): (a layer, how many of them, how many inputs they quantize)} of the blocks' Linears.
    q, k and v of one format share their input."""
    groups, seen = {}, set()
    for name, layer in dit.blocks.named_modules():
        if isinstance(layer, quant.QuantLinear):
            fmt = layer.format or "bf16"
            key = fmt, size.rows(name), layer.in_features, layer.out_features
            fed = fmt, re.sub(r"\.[qkv]$", "", name) if "self_attn" in name else name
            _, count, inputs = groups.get(key, (layer, 0, 0))
            groups[key] = layer, count + 1, inputs + (fed not in seen)
            seen.add(fed)
    return groups


def linears(dit, size, device):
    """{row: seconds} of all products of a forward, and of what quantization adds to them."""
    rows = Counter()
    for (fmt, n, K, _), (layer, count, fed) in block_layers(dit, size).items():
        x = random_tensor("", torch.bfloat16, (n, K), device)
        if layer.mode == "tensor_cores":
            quantized = quant.quantize_activation(x, layer)
            *operands, scale = quant.scaled_mm_operands(quantized, layer)
            y = torch._scaled_mm(*operands, out_dtype=torch.bfloat16)
            rows["quantizing activations"] += fed * seconds(lambda: quant.quantize_activation(x, layer), device)
            rows[fmt] += count * seconds(lambda: torch._scaled_mm(*operands, out_dtype=torch.bfloat16), device)
            rows["scale and bias"] += count * seconds(lambda: quant.scale_and_add(y, scale, layer.bias), device)
        else:
            w = layer.dequantized(x.dtype)
            rows["bf16"] += count * seconds(lambda: quant.linear(x, w), device)
            if fmt != "bf16":
                rows["dequantizing weights"] += count * seconds(lambda: layer.dequantized(x.dtype), device)
        if fmt == "nvfp4" and layer.mode == "tensor_cores":
            once, layer.two_pass = seconds(lambda: layer(x), device), True
            rows["two-pass"] += count * (seconds(lambda: layer(x), device) - once)
            layer.two_pass = False
    return rows


def attentions(size, device):
    """{row: seconds} of all attention of a forward, and what fp8_attention adds."""
    def heads(n):
        return random_tensor("", torch.bfloat16, (1, size.cfg.dim // size.cfg.head_dim, n, size.cfg.head_dim), device)

    q, k, v = (heads(size.tokens) for _ in range(3))
    own, *cross = (seconds(lambda: F.scaled_dot_product_attention(q, k, v), device) for k, v in (
        (k, v), *((heads(n), heads(n)) for n in (size.text + 1, size.image))))
    rows = {"attention": size.cfg.num_blocks * (own + sum(cross))}
    if has_fp8_kernel(device) or not on_gpu(device):  # on a CPU, its emulation
        fp8 = attempt(lambda: seconds(lambda: fp8_attention(q, k, v), device))
        rows["fp8"] = size.cfg.num_blocks * (fp8 - own)
    return rows


def attempt(work):
    """What work() returns; NaN if it fails, with the reason on stderr. Other rows of the table are still worth
    having."""
    try:
        return work()
    except (RuntimeError, NotImplementedError) as error:
        print(f"gpu.py: a row failed: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return math.nan


def peak_of(work, device):
    """What work() returns, and the GiB that it takes on a GPU besides what is there already."""
    if not on_gpu(device):
        return work(), math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    return result, (torch.cuda.max_memory_allocated(device) - before) / GIB


@torch.inference_mode()
def measure(size, device):
    """{row of arithmetic: seconds}, {row: GiB} measured on a device, and a line on the DiT."""
    rows, memory = Counter(), {}
    formats, arguments = recipe(size.shapes()), inputs(size, device)
    dit = random_dit(size, formats, device)
    parts = linears(dit, size, device) | attentions(size, device)
    two_pass, fp8 = parts.pop("two-pass", math.nan), parts.pop("fp8", math.nan)
    dit(*arguments)  # compiles
    forward, memory["a forward"] = peak_of(lambda: seconds(lambda: dit(*arguments), device, 1, 0), device)
    rows = parts | {REST: forward - sum(parts.values()), "a forward": forward,
                    "a forward, --attention fp8": forward + fp8, "a forward, --two-pass": forward + two_pass}
    streamed = random_dit(size, formats, device, torch.device("cpu"), stream=True)
    streamed.blocks = StreamedBlocks(streamed.blocks, device)
    rows["a forward, --offload"] = attempt(lambda: seconds(lambda: streamed(*arguments), device, 1, 0))
    line, dit, streamed = quant.describe(dit), None, None
    vae, (frames, height, width) = random_vae(size, device), size.grid
    z = random_tensor("", torch.float32, (1, size.vae.z_dim, *size.grid), device)
    video = torch.zeros(1, 3, 4 * frames - 3, 8 * height, 8 * width, device=device)
    for row, work in ("VAE encode", lambda: vae.encode(video)), ("VAE decode", lambda: [
            None for _ in vae.decode_chunks(z)]):
        rows[row], memory[row] = peak_of(lambda: attempt(lambda: seconds(work, device, 1, 0)), device)
    return rows, memory, line


# ----------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------


def machine(device):
    """Card, driver, torch and system in one line."""
    parts = [platform.platform(), f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if on_gpu(device):
        query = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True)
        properties = torch.cuda.get_device_properties(device)
        parts = [f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / GIB:.1f} GiB",
                 f"driver {query.stdout.split()[0] if query.stdout else 'unknown'}, CUDA {torch.version.cuda}", *parts]
    return ", ".join(parts)


def arithmetic_report(cards):
    """Print the arithmetic of several cards side by side."""
    tables = [arithmetic(FULL, CARDS[name]) for name in cards]
    print(f"{'seconds':32}{'work':>12}" + "".join(f"{name:>12}" for name in cards))
    for rows in zip(*tables):
        print(f"{rows[0][0]:32}{rows[0][1]:>12}" + "".join(f"{row[2]:12.2f}" for row in rows))
    for mode, rank, two_pass in (("dequantize", 0, False), ("tensor_cores", 0, False), ("tensor_cores", 64, True)):
        choice = f", a LoRA of rank {rank}, --two-pass" if two_pass else ""
        print(f"memory of a forward, {mode}{choice}: {dit_working(mode, FULL, rank, two_pass) / GIB:.2f} GiB")
    print(f"memory of decoding: {vae_working() / GIB:.2f} GiB")


def report(size, device):
    """Check and measure, and print the tables."""
    print("measuring, about five minutes", file=sys.stderr, flush=True)
    tensor_cores = quant.default_mode(device) == "tensor_cores"
    card, peaks = card_of(device)
    expected = {row: value for row, _, value in arithmetic(size, card, tensor_cores)}
    print(f"**bench/gpu.py** on {machine(device)}\n\n```")
    check.check(device)
    measured, memory, line = measure(size, device)
    print(f"{line}\n```\n\nA forward with {size.tokens} tokens; arithmetic from {peaks}.\n\n"
          f"| | arithmetic, s | measured, s | ratio |\n|---|---|---|---|")
    for row in (row for row in expected if row in measured):
        print(f"| {row} | {expected[row]:.3f} | {measured[row]:.3f} | {measured[row] / expected[row]:.2f} |")
    working = {"a forward": dit_working(quant.default_mode(device), size), "VAE decode": vae_working(size)}
    print("\n| memory | arithmetic, GiB | measured, GiB |\n|---|---|---|")
    for row, peak in memory.items():
        print(f"| {row} | {f'{working[row] / GIB:.2f}' if row in working else '-'} | {peak:.2f} |")
    slow = [f"{row} ({measured[row] / expected[row]:.1f} times)" for row in expected
            if measured.get(row, 0) > 1.5 * expected[row]]
    print(f"\nSlower than 1.5 times the arithmetic: {', '.join(slow) or 'nothing'}.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arithmetic", action="store_true", help="the arithmetic of a few cards; needs no GPU")
    parser.add_argument("--tiny", action="store_true", help="measure a tiny model; without a GPU, on the CPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.arithmetic or (device.type == "cpu" and not args.tiny):
        arithmetic_report(SHOWN)
    else:
        report(TINY if args.tiny else FULL, device)


if __name__ == "__main__":
    main()
