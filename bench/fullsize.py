"""The full-size 14B DiT, with random weights in the published recipe's mix: does it fit, and how fast is it?

    python bench/fullsize.py                 its memory by arithmetic, then a forward on the CPU, small grid
    python bench/fullsize.py --device cuda   81 frames of 480 x 832, loaded and streamed, and the VAE

The weights' file (10 GiB, --file) is written once, layer by layer; no source of 32 GB is needed.
"""
import argparse
import json
import math
import struct
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import quant  # noqa: E402
import sample  # noqa: E402
import wan_fp4  # noqa: E402

GRID = 21, 60, 104  # latents of 81 frames of 480 x 832
PFLOP = 0.92, 0.88  # of a forward on it: in the Linears, in attention

# ----------------------------------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------------------------------


def layout(shapes, formats):
    """{tensor name: (dtype, shape)} of the converted file, and its markers by name."""
    dtypes = dict.fromkeys(shapes, torch.bfloat16)
    markers = {name.removesuffix(".weight") + ".comfy_quant":
               quant.write_marker(convert.marker(fmt, shapes[name], dtypes[name]))
               for name, fmt in formats.items() if fmt != "bf16"}
    return convert.layout(SimpleNamespace(shapes=shapes, dtypes=dtypes), formats), markers


def full_size():
    """The layout of the 14B model after convert.py --plan recipe."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in wan_fp4.WanDiT().named_parameters()}
    return layout(shapes, convert.plan(shapes, "nvfp4", "mxfp8", convert.RECIPE_MXFP8, convert.RECIPE_KEPT))


def random_tensor(name, dtype, shape):
    """Random weights of about 0.02, in whatever way they are stored."""
    if name.endswith("weight_scale_2"):
        return torch.tensor(0.02 / 2.9)  # 2.9: the rms of random E2M1 codes
    if name.endswith("weight_scale"):
        byte = 56 if dtype == torch.float8_e4m3fn else 127 - 7  # 1 in E4M3; 2 ** -7 in E8M0
        return torch.full(shape, byte, dtype=torch.uint8).view(dtype)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    if dtype == torch.float8_e4m3fn:
        return torch.randn(shape).to(dtype)
    value = torch.randn(shape).mul_(0.02)
    return (value + 1 if "norm" in name else value).to(dtype)


def write(path):
    """Write the file tensor by tensor, as safetensors: a length, a JSON header, the bytes."""
    stored, markers = full_size()
    names = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    header, at = {}, 0
    for name, (dtype, shape) in stored.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    torch.manual_seed(0)
    with open(f"{path}.part", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in stored.items():
            tensor = markers.get(name)
            tensor = random_tensor(name, dtype, shape) if tensor is None else tensor
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    Path(f"{path}.part").replace(path)


# ----------------------------------------------------------------------------------------------------
# Memory by arithmetic
# ----------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time. On the meta device it takes no memory."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

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


def dit_working(mode, grid):
    """Peak bytes of a forward besides the weights, with all blocks' Linears in NVFP4, bf16 activations."""
    with torch.device("meta"):
        two = wan_fp4.WanDiT(wan_fp4.DiTConfig(num_blocks=2))
    shapes = {name: tuple(p.shape) for name, p in two.named_parameters()}
    stored, tensors = layout(shapes, convert.plan(shapes))
    tensors |= {name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (dtype, shape) in stored.items() if name not in tensors}
    dit = wan_fp4.dit_from_tensors(tensors, {}, "arithmetic", "meta", torch.bfloat16)
    for layer in dit.modules():
        if isinstance(layer, quant.QuantLinear) and layer.format:
            layer.mode = mode
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.empty_like(q)  # flash: no N x N
    try:
        with torch.inference_mode(), PeakMemory() as memory:
            dit(*inputs(grid, "meta"))
    finally:
        F.scaled_dot_product_attention = attention
    return memory.peak


def vae_working(grid):
    """Peak bytes of decoding, the weights not counted, bf16."""
    with torch.device("meta"):
        vae = wan_fp4.WanVAE().bfloat16().eval()
    vae.dtype = torch.bfloat16
    small = torch.empty(1, vae.cfg.z_dim, *grid, device="meta", dtype=torch.bfloat16)
    with torch.inference_mode(), PeakMemory() as memory:
        cache = {}
        for z in wan_fp4.chunks(small, 1):
            vae.decoder(vae.conv2(z, cache), cache)
    return memory.peak


def inputs(grid, device):
    def normal(*shape):
        return torch.empty(shape, device=device) if device == "meta" else torch.randn(shape, device=device)
    return (normal(1, 16, *grid), torch.full((1,), 900.0, device=device), normal(1, 30, 4096),
            normal(1, 257, 1280), normal(1, 20, *grid))


def arithmetic():
    stored, _ = full_size()
    sizes = {}
    for name, (dtype, shape) in stored.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "rest"
        sizes[part] = sizes.get(part, 0) + math.prod(shape) * dtype.itemsize
    rest, blocks = sizes.pop("rest"), list(sizes.values())
    gib, tokens = 2 ** 30, math.prod(GRID) // 4
    print(f"14B in the recipe's mix: {(rest + sum(blocks)) / gib:.2f} GiB, a block at most "
          f"{max(blocks) / gib:.2f}; {tokens} tokens")
    for mode in ("dequantize", "tensor_cores"):
        working = dit_working(mode, GRID)
        print(f"{mode}: a forward needs {working / gib:.2f} GiB besides the weights, "
              f"{working / tokens / 5120:.1f} bytes a token and channel; in all, loaded "
              f"{(working + rest + sum(blocks)) / gib:.2f} GiB, streamed "
              f"{(working + rest + 2 * max(blocks)) / gib:.2f}")
    print(f"VAE decode: {vae_working(GRID) / gib:.2f} GiB")


# ----------------------------------------------------------------------------------------------------
# Running it
# ----------------------------------------------------------------------------------------------------


def memory_of_process():
    """This process's memory in GiB: its own, and pages of mapped files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) / 2 ** 20 for key in ("RssAnon", "RssFile", "VmHWM")]


@torch.inference_mode()
def on_cpu(path):
    dit, grid = wan_fp4.load_dit(path), (2, 8, 8)
    print(f"{quant.describe(dit)}; {math.prod(grid) // 4} tokens, float32, {torch.get_num_threads()} threads")
    start = time.perf_counter()
    out = dit(*inputs(grid, "cpu"))
    seconds = time.perf_counter() - start
    own, pages, peak = memory_of_process()
    assert out.isfinite().all()
    print(f"forward: {seconds:.0f} s; {own:.2f} GiB of its own and {pages:.2f} of the file's pages, "
          f"at the peak {peak:.2f}")


def timed(function, device):
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def on_gpu(path, device):
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    rate = 2 * 8192 ** 3 / min(timed(lambda: a @ a, device) for _ in range(5)) / 1e15
    print(f"{torch.cuda.get_device_name(device)}: bf16 matmul {1000 * rate:.0f} TFLOP/s, so a forward takes "
          f"at least {sum(PFLOP) / rate:.2f} s")
    arguments, seconds = inputs(GRID, device), {}
    for offload in (False, True):
        if offload:  # an 8 GB card, for all that torch knows
            torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.mem_get_info(device)[1])
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        dit = wan_fp4.load_dit(path, device, stream=True)
        sample.settle(dit, 0, torch.device(device), offload)
        load = time.perf_counter() - start
        steps = [timed(partial(dit, *arguments), device) for _ in range(4)]
        seconds[offload] = sorted(steps)[1]
        print(f"{'streamed' if offload else 'loaded'}: load {load:.1f} s; steps "
              f"{', '.join(f'{s:.2f}' for s in steps)} s, {1000 * seconds[offload] / len(dit.blocks):.0f} ms "
              f"a block; peak {torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB")
        del dit
        torch.cuda.empty_cache()
    print(f"streaming costs {seconds[True] / seconds[False] - 1:.1%}")
    vae = wan_fp4.WanVAE().to(device, torch.bfloat16).eval()
    vae.dtype = torch.bfloat16
    torch.cuda.reset_peak_memory_stats(device)
    latents = torch.randn(1, 16, *GRID, device=device)
    decode = timed(lambda: [None for _ in vae.decode_chunks(latents)], device)
    video = torch.zeros(1, 3, 4 * GRID[0] - 3, 8 * GRID[1], 8 * GRID[2], device=device)
    print(f"VAE: decode {decode:.1f} s, encode {timed(lambda: vae.encode(video), device):.1f} s, peak "
          f"{torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path("fullsize.safetensors"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", action="store_true", help="no more than the memory by arithmetic")
    args = parser.parse_args()
    arithmetic()
    if args.arithmetic:
        return
    if not args.file.exists():
        write(args.file)
    if args.device == "cpu":
        on_cpu(args.file)
    else:
        on_gpu(args.file, args.device)


if __name__ == "__main__":
    main()
