"""Is the 14B model right on your GPU, and as fast as it should be? Random weights, no downloads, five minutes.

    python bench/gpu.py                 on a GPU: correctness, and a full-size forward by arithmetic and measured
    python bench/gpu.py --arithmetic    the arithmetic of a few cards; the same without a GPU
    python bench/gpu.py --tiny          everything at a tiny size, in seconds, on the CPU too: tries the program

It prints Markdown. **Nobody has run this on a Blackwell GPU yet: if you can, please paste the output into a bug
report**, even if all is well.

Right: the product in each format on this GPU, and attention in 8 bits, against references (extra/check.py).

Fast: one forward of the published recipe's mix of formats, for 81 frames of 480 x 832. By arithmetic, a product
or an attention takes its floating-point operations divided by the rate that a good kernel reaches. Everything
else takes the bytes that it moves, divided by the memory's rate; a compiled elementwise function moves each of
its tensors once. Measured: each kind of product, of attention and of quantization alone and at full size, times
how often a forward runs it. *Elementwise and the rest* is a whole forward without these. Tensors of one shape are
shared by all layers, so that 0.6 GiB stand for the model's 10.

Memory: the most bytes that a forward's tensors take at a time, besides the weights. By arithmetic: on torch's
meta device, with flash attention. Measured: by torch's allocator.

The tests import FULL, dit_working and vae_working.
"""
import argparse
import contextlib
import functools
import itertools
import math
import platform
import re
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
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
META = torch.device("meta")


@dataclass(frozen=True)
class Size:
    """The networks, and the latents of a video."""
    cfg: wan_fp4.DiTConfig = wan_fp4.DiTConfig()
    vae: wan_fp4.VAEConfig = wan_fp4.VAEConfig()
    grid: tuple = (21, 60, 104)  # of 81 frames of 480 x 832
    text: int = 31  # tokens of a prompt, with the one that the DiT adds for the padding
    image: int = 257

    @property
    def tokens(self):
        return math.prod(self.grid) // 4

    def rows(self, name):
        """The rows that a block's weight multiplies."""
        if "_img" in name:
            return self.image
        return self.text if re.search(r"cross_attn\.[kv]\b", name) else self.tokens


FULL = Size()
TINY = Size(wan_fp4.DiTConfig(dim=256, ffn_dim=512, num_blocks=2, text_dim=64, image_dim=64),
            wan_fp4.VAEConfig(dims=(16, 16, 16, 16), num_res_blocks=1), (3, 4, 4))


# ----------------------------------------------------------------------------------------------------
# Networks with random weights
# ----------------------------------------------------------------------------------------------------

@functools.cache
def weights(cfg):
    """{name: shape} of a DiT's parameters."""
    with META:
        return {name: tuple(p.shape) for name, p in wan_fp4.WanDiT(cfg).named_parameters()}


def recipe(cfg):
    """{weight: format} of the published recipe."""
    return convert.plan(weights(cfg), "nvfp4", "mxfp8", convert.RECIPE_MXFP8, convert.RECIPE_KEPT)


def random_tensor(suffix, dtype, shape, device):
    """Random weights of about 0.02, in any way of storing them."""
    if device == META:
        return torch.empty(shape, dtype=dtype, device=device)
    if suffix == "weight_scale_2":
        return torch.full(shape, 0.02 / 2.9, device=device)  # 2.9: the rms of random E2M1 codes
    if suffix == "weight_scale":
        byte = 56 if dtype == torch.float8_e4m3fn else 127 - 7  # 1 in E4M3; 2 ** -7 in E8M0
        return torch.full(shape, byte, dtype=torch.uint8, device=device).view(dtype)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).mul_(1 if dtype == torch.float8_e4m3fn else 0.02).to(dtype)


def random_dit(cfg, formats, device, blocks_on=None, **options):
    """A DiT on a device, or its blocks on another. Tensors of the same kind and shape are one tensor."""
    tensors, made = {}, {}
    for name, shape in weights(cfg).items():
        layer, _, suffix = name.rpartition(".")
        stored, fmt = {suffix: (torch.bfloat16, shape)}, formats.get(name, "bf16")
        if fmt != "bf16":
            required, _ = quant.stored_tensors(fmt, shape[1], shape[0])
            stored = {suffix: (dtypes[0], shape) for suffix, (dtypes, shape, _) in required.items()}
            tensors[f"{layer}.comfy_quant"] = quant.write_marker({"format": fmt})
        for suffix, (dtype, shape) in stored.items():
            kind = suffix, dtype, shape, blocks_on if blocks_on and name.startswith("blocks.") else device
            if kind not in made:
                made[kind] = random_tensor(*kind)
            tensors[f"{layer}.{suffix}"] = made[kind]
    return wan_fp4.dit_from_tensors(tensors, {}, "random weights", device, torch.bfloat16, **options)


def inputs(size, device):
    """A forward's arguments: x, t, text, image, y."""
    x, text, image, y = (random_tensor("", torch.float32, (1, *shape), device) for shape in (
        (16, *size.grid), (size.text - 1, size.cfg.text_dim), (size.image, size.cfg.image_dim), (20, *size.grid)))
    return x, torch.full((1,), 900.0, device=device), text, image, y


def random_vae(cfg, device, dtype=torch.bfloat16):
    with META:
        vae = wan_fp4.WanVAE(cfg)
    tensors = {name: random_tensor("", torch.float32, p.shape, device) for name, p in vae.named_parameters()}
    return wan_fp4.load_weights(vae, tensors, "random weights", device, dtype)


# ----------------------------------------------------------------------------------------------------
# Memory by arithmetic
# ----------------------------------------------------------------------------------------------------

class PeakMemory(TorchDispatchMode):
    """Records the most bytes held at a time by tensors made inside, besides the model's. On the meta device it
    takes no memory."""

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
    """Peak bytes of a forward besides the weights: with one block (more do not change it), all of its
    Linears in NVFP4, bf16 activations, and a LoRA of this rank."""
    cfg = wan_fp4.DiTConfig(size.cfg.dim, size.cfg.ffn_dim, num_blocks=1)
    dit = random_dit(cfg, convert.plan(weights(cfg)), META, mode=mode, two_pass=two_pass)
    for layer in dit.blocks.modules():
        if isinstance(layer, quant.QuantLinear) and rank:
            layer.attach_lora(*(torch.empty(shape, dtype=torch.bfloat16, device=META) for shape in (
                (layer.out_features, rank), (rank, layer.in_features))))
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.empty_like(q)  # flash: no N x N matrix
    try:
        with PeakMemory(dit) as memory:
            dit(*inputs(Size(cfg, grid=size.grid), META))
    finally:
        F.scaled_dot_product_attention = attention
    return memory.peak


@torch.inference_mode()
def vae_working(size=FULL):
    """Peak bytes of decoding besides the weights, in bf16."""
    vae = random_vae(size.vae, META)
    latents = torch.empty(1, size.vae.z_dim, *size.grid, device=META)
    with PeakMemory(vae) as memory:
        for _ in vae.decode_chunks(latents):
            pass
    return memory.peak


# ----------------------------------------------------------------------------------------------------
# Seconds by arithmetic
# ----------------------------------------------------------------------------------------------------

class Card(NamedTuple):
    """Rates that good kernels reach: bytes/s of the memory, FLOP/s, bytes/s over PCIe; and the memory's bytes."""
    bandwidth: float
    attention: float
    nvfp4: float
    mxfp8: float
    bf16: float
    pcie: float
    memory: float


CARDS = {  # published peaks, times the share that is reached
    "B200": Card(8e12 * 0.85, 2250e12 * 0.62, 9000e12 * 0.65, 4500e12 * 0.7, 2250e12 * 0.7, 51e9, 180e9),
    "RTX PRO 6000": Card(1.79e12 * 0.9, 504e12 * 0.7, 2015e12 * 0.7, 1007e12 * 0.7, 504e12 * 0.75, 51e9, 96e9),
    "RTX 5090": Card(1.79e12 * 0.9, 209.5e12 * 0.83, 1676e12 * 0.75, 838e12 * 0.75, 209.5e12 * 0.8, 51e9, 32e9),
    "RTX 5080": Card(0.96e12 * 0.9, 112.6e12 * 0.83, 900e12 * 0.75, 450e12 * 0.75, 112.6e12 * 0.8, 51e9, 16e9),
    "RTX 5060": Card(0.448e12 * 0.9, 38.4e12 * 0.85, 307e12 * 0.8, 153e12 * 0.8, 38.4e12 * 0.85, 26e9, 8e9)}
SHOWN = "B200", "RTX 5090", "RTX 5060"
BYTES = {"nvfp4": 9 / 16, "mxfp8": 33 / 32, "bf16": 2}  # of a weight
# The bytes that quantizing an activation moves, divided by its own. NVFP4 reads it twice, as the tensor scale
# depends on all of it, and writes codes and scales, which the swizzle reads and writes; two passes write twice.
QUANTIZER = {"nvfp4": 2.7, "mxfp8": 1.6}
TWO_PASS = 3.1
SAVED = 8.8 * GIB + 3.3 * GIB  # for convert.py's gradients in a block: activations, errors of its layers
REST = "elementwise and the rest"


def card_of(device):
    """The Card of a device, and where its rates are from: they are measured for those not in CARDS."""
    name = torch.cuda.get_device_name(device) if on_gpu(device) else "a CPU"
    known = next((card for card in CARDS if re.search(rf"{card}\b(?! Ti)", name)), None)
    if known:
        return CARDS[known], f"the published peaks of {known}"
    n = 8192 if on_gpu(device) else 256
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    bf16, copy = 2 * n ** 3 / seconds(lambda: a @ a, device), 2 * a.nbytes / seconds(a.clone, device)
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu(device) else math.inf
    return Card(copy, bf16, 4 * bf16, 2 * bf16, bf16, 26e9, memory), (
        f"its own rates: {copy / 1e9:.3g} GB/s, {bf16 / 1e12:.3g} TFLOP/s in bf16; assumed: twice that in MXFP8, "
        f"four times in NVFP4")


def work(size, formats, tensor_cores=True):
    """{row: amount} of one forward: FLOPs of attention and of products by format, bytes of the rest. Without
    tensor cores, weights are dequantized to bf16."""
    N, D, blocks, seen = size.tokens, size.cfg.dim, size.cfg.num_blocks, set()
    amounts = Counter(attention=4 * blocks * N * D * (N + size.text + size.image))
    for name, fmt in formats.items():
        (M, K), n = weights(size.cfg)[name], size.rows(name)
        amounts[fmt if tensor_cores else "bf16"] += 2 * n * M * K
        if fmt != "bf16" and tensor_cores:
            fed = fmt, re.sub(r"\.[qkv]\.weight", "", name) if "self_attn" in name else name
            if fed not in seen:  # q, k and v of one format share their input
                amounts["quantizing activations"] += QUANTIZER[fmt] * 2 * n * K
            seen.add(fed)
            amounts["scale and bias"] += 4 * n * M  # the product, read and written
        elif fmt != "bf16":
            amounts["dequantizing weights"] += M * K * (BYTES[fmt] + 2)
    # Three layer norms from float32 to bfloat16; RMS norm with RoPE of q and k, RMS norm of cross-attention's q;
    # two gated residuals; the sum of both cross-attentions, and its residual
    passes = 3 * 6 + 2 * 4 + 4 + 2 * 10 + 6 + 10
    amounts[REST] = blocks * N * (passes * D + 4 * size.cfg.ffn_dim)  # and GELU
    return amounts


def arithmetic(size, card, tensor_cores=True):
    """[(row, its work in words, seconds)] of a forward by the published recipe, of what choices make of it, of
    the VAE and of calibration."""
    N, D, ffn, blocks = size.tokens, size.cfg.dim, size.cfg.ffn_dim, size.cfg.num_blocks
    formats = recipe(size.cfg)
    amounts, table = work(size, formats, tensor_cores), []
    for row, amount in amounts.items():
        flops = row in Card._fields
        table.append((row, f"{amount / 1e12:.0f} TFLOP" if flops else f"{amount / 1e9:.0f} GB",
                      amount / getattr(card, row if flops else "bandwidth")))
    forward = sum(seconds for *_, seconds in table)
    # 8-bit attention: rotating q and k reads and writes them (8 bytes a value); k's and v's mean and three
    # largest values read (10); casts to E4M3 (9); y is read and written (3). The products take half the time.
    fp8 = blocks * N * D * 30 / card.bandwidth - 2 * blocks * N ** 2 * D / card.attention
    copied = sum(math.prod(weights(size.cfg)[name]) * BYTES[fmt] for name, fmt in formats.items()) / card.pcie
    plain = (amounts["attention"] / card.attention + amounts[REST] / card.bandwidth
             + sum(amounts[fmt] for fmt in BYTES) / card.bf16)
    choices = {"": 0, ", all in bf16": plain - forward, ", --attention fp8": fp8,
               ", --offload": max(0, copied - forward)}
    if tensor_cores:
        nvfp4 = work(size, {name: fmt for name, fmt in formats.items() if fmt == "nvfp4"})
        product, quantizer, scaling = nvfp4["nvfp4"], nvfp4["quantizing activations"], nvfp4["scale and bias"]
        more = quantizer * (TWO_PASS / QUANTIZER["nvfp4"] - 1) + 2.5 * scaling  # adding reads two and writes one
        choices[", --two-pass"] = product / card.nvfp4 + more / card.bandwidth
        in_bf16 = product / card.bf16 - product / card.nvfp4 - quantizer / card.bandwidth
        choices[", 12 % in W4A16"] = 0.12 * in_bf16
        # v, o, ffn.0 and ffn.2: x is read, y is read and written, in bf16
        choices[", a LoRA of rank 64"] = blocks * N * (3 * D + ffn) * (256 / card.bf16 + 4 / card.bandwidth)
    table += [(f"a forward{choice}", "", forward + adds) for choice, adds in choices.items()]
    table += [(row, f"{flops / 1e12:.0f} TFLOP", flops / (0.7 * card.bf16))
              for row, flops in zip(("VAE encode", "VAE decode"), vae_flops(size))]
    return table + [("--calib, each picture", "", calibration(size, amounts, card))]


def calibration(size, amounts, card):
    """Seconds of convert.py --calib for one picture, besides rounding. Each of the four steps takes six forwards
    in bf16 (one to sample, one to compare the layers' outputs, two for the gradients, two while blocks are
    rounded), each layer's product once more, and four backward passes: the products, attention 2.5 times, and the
    elementwise functions, not compiled, three times. A step reads the weights three times over PCIe. Where the
    memory holds less than twice what a block saves, that goes to CPU memory, and back for each backward pass."""
    products = sum(amounts[fmt] for fmt in BYTES) / card.bf16
    attention, elementwise = amounts["attention"] / card.attention, amounts[REST] / card.bandwidth
    backward = products + 2.5 * attention + 3 * elementwise
    step = 6 * (products + attention + elementwise) + products + 4 * backward
    step += 3 * 2 * sum(map(math.prod, weights(size.cfg).values())) / card.pcie
    if card.memory < 2 * SAVED:
        step += 5 * size.cfg.num_blocks * SAVED / (card.pcie / 2)  # half the rate, as the memory is not pinned
    return 4 * step


@functools.cache
@torch.inference_mode()
def vae_flops(size):
    """FLOPs of encoding and of decoding, counted by torch. Each latent frame after the second takes the same."""
    vae, (frames, height, width) = random_vae(size.vae, META, torch.float32), size.grid

    def count(work, *shape):
        with FlopCounterMode(display=False) as counter:
            work(torch.empty(1, *shape, device=META))
        return counter.get_total_flops()

    encode = [count(vae.encode, 3, 4 * t - 3, 8 * height, 8 * width) for t in (2, 3)]
    decode = [count(vae.decode, size.vae.z_dim, t, height, width) for t in (2, 3)]
    return [two + (frames - 2) * (three - two) for two, three in (encode, decode)]


# ----------------------------------------------------------------------------------------------------
# Measured
# ----------------------------------------------------------------------------------------------------

def on_gpu(device):
    return device.type == "cuda"


def seconds(work, device, rounds=3, warm_up=1):
    """The median time of a call, with all work that it queues on the GPU. NaN if it fails, with the reason on
    stderr: the other rows are still worth having."""
    def synchronized():
        work()
        if on_gpu(device):
            torch.cuda.synchronize(device)

    try:
        return bench.median_seconds(synchronized, rounds=rounds, warm_up=warm_up)[0]
    except (RuntimeError, NotImplementedError) as error:
        print(f"gpu.py: failed: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return math.nan


def products(dit, size, device):
    """{row: seconds} of all products of a forward, and of what quantization adds to them. q, k and v of one
    format share their input."""
    layers, fed = {}, {}
    for name, layer in dit.blocks.named_modules():
        if isinstance(layer, quant.QuantLinear):
            kind = layer.format or "bf16", size.rows(name), layer.in_features, layer.out_features
            layers.setdefault(kind, []).append(layer)
            fed.setdefault(kind, set()).add(re.sub(r"\.[qkv]$", "", name) if "self_attn" in name else name)
    rows = Counter()
    for kind, (layer, *others) in layers.items():
        x, count = random_tensor("", torch.bfloat16, kind[1:3], device), 1 + len(others)
        if layer.mode == "tensor_cores":
            *operands, scale = quant.scaled_mm_operands(quant.quantize_activation(x, layer)[0], layer)
            multiply = functools.partial(torch._scaled_mm, *operands, out_dtype=torch.bfloat16)
            y = random_tensor("", torch.bfloat16, (kind[1], layer.out_features), device)
            rows["quantizing activations"] += len(fed[kind]) * seconds(
                lambda: quant.quantize_activation(x, layer), device)
            rows[kind[0]] += count * seconds(multiply, device)
            rows["scale and bias"] += count * seconds(lambda: quant.scale_and_add(y, scale, layer.bias), device)
        else:
            w = layer.dequantized(x.dtype)
            rows["bf16"] += count * seconds(lambda: quant.linear(x, w), device)
            if layer.format:
                rows["dequantizing weights"] += count * seconds(lambda: layer.dequantized(x.dtype), device)
        if layer.mode == "tensor_cores" and layer.format == "nvfp4":
            once, layer.two_pass = seconds(lambda: layer(x), device), True
            rows["two-pass"] += count * (seconds(lambda: layer(x), device) - once)
            layer.two_pass = False
    return rows


def attentions(size, device):
    """{row: seconds} of all attention of a forward, and of what fp8_attention adds."""
    heads, d, blocks = size.cfg.dim // size.cfg.head_dim, size.cfg.head_dim, size.cfg.num_blocks
    q, *kv = (random_tensor("", torch.bfloat16, (1, heads, n, d), device)
              for n in (size.tokens, size.tokens, size.text, size.image))
    own, *cross = (seconds(lambda: F.scaled_dot_product_attention(q, k, k), device) for k in kv)
    rows = {"attention": blocks * (own + sum(cross))}
    if has_fp8_kernel(device) or device.type == "cpu":  # on a CPU, its emulation
        rows["fp8"] = blocks * (seconds(lambda: fp8_attention(q, kv[0], kv[0]), device) - own)
    return rows


def peak(work, device):
    """The seconds of one call, and the bytes that it takes on a GPU besides what is there already."""
    if not on_gpu(device):
        return seconds(work, device, 1, 0), math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return seconds(work, device, 1, 0), torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def measure(size, device):
    """{row of arithmetic: seconds} on a device, {row: bytes}, and a line on the DiT's formats."""
    formats, arguments, memory = recipe(size.cfg), inputs(size, device), {}
    dit = random_dit(size.cfg, formats, device)
    parts = products(dit, size, device) | attentions(size, device)
    two_pass, fp8 = parts.pop("two-pass", math.nan), parts.pop("fp8", math.nan)
    seconds(lambda: dit(*arguments), device, 1, 0)  # compiles
    forward, memory["a forward"] = peak(lambda: dit(*arguments), device)
    rows = parts | {REST: forward - sum(parts.values()), "a forward": forward,
                    "a forward, --attention fp8": forward + fp8, "a forward, --two-pass": forward + two_pass}
    line, dit = quant.describe(dit), None
    streamed = random_dit(size.cfg, formats, device, torch.device("cpu"), stream=True)
    streamed.blocks = StreamedBlocks(streamed.blocks, device)
    rows["a forward, --offload"] = seconds(lambda: streamed(*arguments), device, 1, 0)
    streamed = None
    vae, (frames, height, width) = random_vae(size.vae, device), size.grid
    latents = random_tensor("", torch.float32, (1, size.vae.z_dim, *size.grid), device)
    video = torch.zeros(1, 3, 4 * frames - 3, 8 * height, 8 * width, device=device)
    rows["VAE encode"], memory["VAE encode"] = peak(lambda: vae.encode(video), device)
    rows["VAE decode"], memory["VAE decode"] = peak(lambda: [None for _ in vae.decode_chunks(latents)], device)
    return rows, memory, line


# ----------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------

def arithmetic_report():
    """Print the arithmetic of several cards side by side."""
    print(f"{'seconds':32}{'work':>12}" + "".join(f"{name:>12}" for name in SHOWN))
    for rows in zip(*(arithmetic(FULL, CARDS[name]) for name in SHOWN)):
        print(f"{rows[0][0]:32}{rows[0][1]:>12}" + "".join(f"{row[2]:12.2f}" for row in rows))
    shapes, formats, sizes = weights(FULL.cfg), recipe(FULL.cfg), Counter()
    for name, shape in shapes.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "rest"
        sizes[part] += math.prod(shape) * BYTES[formats.get(name, "bf16")]
    block = max(size for part, size in sizes.items() if part != "rest")
    print(f"weights by the recipe: {sum(sizes.values()) / GIB:.2f} GiB, in bf16 "
          f"{2 * sum(map(math.prod, shapes.values())) / GIB:.2f}; two blocks and the rest, for --offload: "
          f"{(2 * block + sizes['rest']) / GIB:.2f}")
    for mode, rank, two_pass in ("dequantize", 0, False), ("tensor_cores", 0, False), ("tensor_cores", 64, True):
        choice = f", a LoRA of rank {rank}, --two-pass" if two_pass else ""
        print(f"memory of a forward, {mode}{choice}: {dit_working(mode, FULL, rank, two_pass) / GIB:.2f} GiB")
    print(f"memory of decoding: {vae_working() / GIB:.2f} GiB")


def machine(device):
    """Card, driver, torch and system in one line."""
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}", platform.platform()]
    if on_gpu(device):
        card, driver = torch.cuda.get_device_properties(device), "unknown"
        with contextlib.suppress(OSError, IndexError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
        parts = [card.name, f"sm_{card.major}{card.minor}", f"{card.total_memory / GIB:.1f} GiB",
                 f"driver {driver}", f"CUDA {torch.version.cuda}", *parts]
    return ", ".join(parts)


def report(size, device):
    """Check and measure, and print the tables."""
    tensor_cores = quant.default_mode(device) == "tensor_cores"
    card, source = card_of(device)
    expected = {row: value for row, _, value in arithmetic(size, card, tensor_cores)}
    print(f"### {machine(device)}\n\n```")
    check.check(device)
    rows, memory, line = measure(size, device)
    print(f"{line}\n```\n\nA forward with {size.tokens} tokens; arithmetic with {source}.\n\n"
          f"| | arithmetic, s | measured, s | ratio |\n|---|---|---|---|")
    for row in (row for row in expected if row in rows):
        print(f"| {row} | {expected[row]:.3g} | {rows[row]:.3g} | {rows[row] / expected[row]:.2f} |")
    print("\n| memory besides the weights | arithmetic, GiB | measured, GiB |\n|---|---|---|")
    working = {"a forward": dit_working(quant.default_mode(device), size), "VAE decode": vae_working(size)}
    for row in working:
        print(f"| {row} | {working[row] / GIB:.2f} | {memory[row] / GIB:.2f} |")
    slow = [row for row in expected if rows.get(row, 0) > 1.5 * expected[row]]
    print(f"\nMore than 1.5 times the arithmetic: {', '.join(slow) or 'nothing'}.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arithmetic", action="store_true", help="the arithmetic of a few cards; needs no GPU")
    parser.add_argument("--tiny", action="store_true", help="measure a tiny model; without a GPU, on the CPU")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.arithmetic or (device.type == "cpu" and not args.tiny):
        arithmetic_report()
    else:
        report(TINY if args.tiny else FULL, device)


if __name__ == "__main__":
    main()
