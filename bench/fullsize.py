"""The full-size 14B DiT in the published recipe's mix of formats, with random weights: memory, FLOPs, time.

    python bench/fullsize.py --arithmetic    memory and FLOPs of 81 frames of 480 x 832, on the meta device
    python bench/fullsize.py                 the same, then a real forward on the CPU, on a small grid
    python bench/fullsize.py --device cuda   the same, then 81 frames, loaded and streamed, and the VAE
    python bench/fullsize.py --activation    the memory traffic of quantizing activations for the tensor cores

The file of weights (10 GiB, --file) is written once, tensor by tensor; no 32 GB source is needed.

Memory by arithmetic adds up the tensors that a forward makes on the meta device, with flash attention.

Memory traffic: step by step, the bytes that each operation reads and writes, divided by the bytes of the
activation (32,768 x 5120, bf16). Compiled: the buffers of the compiler's program, each written once, and read
once where something else is made from it. The minimum for NVFP4 is 2.25: x is read twice, because the tensor
scale depends on all of x, and the codes are written. It is 1.5 for MXFP8, which has no tensor scale.

test_all.py imports GRID, dit_working and vae_working.
"""
import argparse
import itertools
import json
import math
import re
import struct
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench  # also puts the project's folder on sys.path
import convert
import quant
import sample
import wan_fp4

GRID = 21, 60, 104  # latents of 81 frames of 480 x 832
GIB = 2 ** 30


def inputs(grid, device, prompt=30):
    """forward's arguments: x, t, text, image, y."""
    def normal(*shape):
        return torch.empty(shape, device=device) if device == "meta" else torch.randn(shape, device=device)
    return (normal(1, 16, *grid), torch.full((1,), 900.0, device=device), normal(1, prompt, 4096),
            normal(1, 257, 1280), normal(1, 20, *grid))


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


def recipe(shapes):
    """{weight: format} of the published recipe."""
    return convert.plan(shapes, "nvfp4", "mxfp8", convert.RECIPE_MXFP8, convert.RECIPE_KEPT)


def full_size():
    """The layout of the 14B model as convert.py --plan recipe writes it."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in wan_fp4.WanDiT().named_parameters()}
    return layout(shapes, recipe(shapes))


def random_tensor(name, dtype, shape):
    """Random weights of about 0.02, in any way of storing them."""
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
    """Write the file tensor by tensor as safetensors: a length, a JSON header, the bytes."""
    stored, markers = full_size()
    names = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    header, offset = {}, 0
    for name, (dtype, shape) in stored.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
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
# Memory and FLOPs by arithmetic
# ----------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Records the most bytes held at a time by tensors made inside. On the meta device it takes no memory."""

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


def dit_working(mode, grid, rank=0, activations=None):
    """Peak bytes of a forward besides the weights, with all blocks' Linears in NVFP4, bf16 activations, which
    are quantized as in sample.py --activations, and a LoRA of this rank."""
    with torch.device("meta"):
        two = wan_fp4.WanDiT(wan_fp4.DiTConfig(num_blocks=2))
    shapes = {name: tuple(p.shape) for name, p in two.named_parameters()}
    stored, tensors = layout(shapes, convert.plan(shapes))
    tensors |= {name: torch.empty(shape, dtype=dtype, device="meta")
                for name, (dtype, shape) in stored.items() if name not in tensors}
    dit = wan_fp4.dit_from_tensors(tensors, {}, "arithmetic", "meta", torch.bfloat16, activations=activations)
    for layer in dit.modules():
        if isinstance(layer, quant.QuantLinear) and layer.format:
            layer.mode = mode
            if rank:
                up, down = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in (
                    (layer.out_features, rank), (rank, layer.in_features)))
                layer.attach_lora(up, down)
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.empty_like(q)  # flash: no N x N matrix
    try:
        with torch.inference_mode(), PeakMemory() as memory:
            dit(*inputs(grid, "meta"))
    finally:
        F.scaled_dot_product_attention = attention
    return memory.peak


def vae_working(grid):
    """Peak bytes of decoding besides the weights, in bf16."""
    with torch.device("meta"):
        vae = wan_fp4.WanVAE().bfloat16().eval()
    vae.dtype = torch.bfloat16
    small = torch.empty(1, vae.cfg.z_dim, *grid, device="meta", dtype=torch.bfloat16)
    with torch.inference_mode(), PeakMemory() as memory:
        cache = {}
        for z in wan_fp4.chunks(small, 1):
            vae.decoder(vae.conv2(z, cache), cache)
    return memory.peak


def flops(grid, prompt=30):
    """Floating-point operations of one forward, {"linear", "attention", "convolution": count}, counted by torch.
    On the meta device torch multiplies attention's matrices by aten.bmm and every Linear by aten.addmm."""
    with torch.device("meta"):
        dit = wan_fp4.WanDiT()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        dit(*inputs(grid, "meta", prompt))
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    names = {"aten.addmm": "linear", "aten.bmm": "attention", "aten.convolution": "convolution"}
    return {names[op]: count for op, count in counts.items()}


def arithmetic():
    stored, _ = full_size()
    sizes = {}
    for name, (dtype, shape) in stored.items():
        part = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "rest"
        sizes[part] = sizes.get(part, 0) + math.prod(shape) * dtype.itemsize
    rest, blocks = sizes.pop("rest"), list(sizes.values())
    tokens = math.prod(GRID) // 4
    print(f"14B in the recipe's mix: {(rest + sum(blocks)) / GIB:.2f} GiB, largest block "
          f"{max(blocks) / GIB:.2f} GiB; 81 frames of 480 x 832 are {tokens} tokens")
    for mode, rank, activations in (("dequantize", 0, None), ("tensor_cores", 0, None),
                                    ("tensor_cores", 64, None), ("tensor_cores", 64, "two-pass")):
        working = dit_working(mode, GRID, rank, activations)
        lora = f" with a LoRA of rank {rank}" if rank else ""
        way = f", {activations}" if activations else ""
        print(f"{mode}{lora}{way}: a forward needs {working / GIB:.2f} GiB besides the weights, "
              f"{working / tokens / 5120:.1f} bytes per token and channel; in total, loaded "
              f"{(working + rest + sum(blocks)) / GIB:.2f} GiB, streamed "
              f"{(working + rest + 2 * max(blocks)) / GIB:.2f} GiB")
    print(f"VAE decode: {vae_working(GRID) / GIB:.2f} GiB")
    for prompt in (30, 512):
        counts = flops(GRID, prompt)
        print(f"a forward with a prompt of {prompt} tokens: {sum(counts.values()) / 1e15:.2f} PFLOP: "
              f"{counts['linear'] / 1e15:.2f} in the Linears, {counts['attention'] / 1e15:.2f} in attention")


# ----------------------------------------------------------------------------------------------------
# Quantizing activations: bytes through memory
# ----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write. Views and new uninitialized tensors move none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        views = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not views and function is not torch.ops.aten.empty.memory_format:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        return out


def step_by_step(fmt, activations):
    """Bytes moved without the compiler, divided by the bytes of the activation."""
    x = torch.empty(32768, 5120, dtype=torch.bfloat16, device="meta")
    tensor_scale = None if activations == "nearest" else torch.empty((), device="meta")
    with Traffic() as traffic:
        quant.quantize_rows(x, fmt, tensor_scale, activations)
    return traffic.bytes / x.nbytes


def compiled(fmt, activations):
    """The dtype and shape of every buffer of the compiled program, for x of 4096 x 5120 on the CPU."""
    from torch._inductor.utils import run_and_get_code
    x = torch.randn(4096, 5120).bfloat16()
    quantize = torch.compile(quant.quantize_rows.__wrapped__, options=quant.COMPILER_OPTIONS)
    tensor_scale = None if activations == "nearest" else torch.tensor(0.003)
    _, programs = run_and_get_code(quantize, x, fmt, tensor_scale, activations)
    buffers = re.findall(r"buf\d+ = empty_strided_cpu\((\(.*?\)), \(.*?\), torch\.(\w+)\)", programs[0])
    return [f"{dtype} {shape}" for shape, dtype in buffers]


@torch.no_grad()
def activation():
    for fmt, activations in ("mxfp8", "nearest"), *itertools.product(["nvfp4"], quant.ACTIVATIONS):
        name = f"{quant.FORMAT_NAMES[fmt]}, {activations}"
        print(f"{name}: step by step {step_by_step(fmt, activations):.1f} times the activation's bytes")
        print(f"{name}: compiled, 4096 x 5120 makes {', '.join(compiled(fmt, activations))}", flush=True)


# ----------------------------------------------------------------------------------------------------
# Running it
# ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def on_cpu(path):
    dit, grid = wan_fp4.load_dit(path), (2, 8, 8)
    print(f"{quant.describe(dit)}; {math.prod(grid) // 4} tokens, float32, {torch.get_num_threads()} threads")
    arguments = inputs(grid, "cpu")
    seconds, out = bench.timed(lambda: dit(*arguments))
    own, pages, peak = (bench.process_memory(key) / 1024 for key in ("RssAnon", "RssFile", "VmHWM"))
    assert out.isfinite().all()
    print(f"forward: {seconds:.0f} s; {own:.2f} GiB of its own and {pages:.2f} GiB of the file's pages, "
          f"peak {peak:.2f} GiB")


def gpu_timed(work, device):
    """bench.timed, with all work that is queued on the GPU."""
    def synchronized():
        work()
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    return bench.timed(synchronized)[0]


@torch.inference_mode()
def on_gpu(path, device):
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    rate = 2 * 8192 ** 3 / min(gpu_timed(lambda: a @ a, device) for _ in range(5))
    print(f"{torch.cuda.get_device_name(device)}: bf16 matmul {rate / 1e12:.0f} TFLOP/s; at that rate a forward "
          f"takes {sum(flops(GRID).values()) / rate:.2f} s")
    loaded, streamed = (dit_on_gpu(path, device, offload) for offload in (False, True))
    print(f"streaming costs {streamed / loaded - 1:.1%}")
    vae = wan_fp4.WanVAE().to(device, torch.bfloat16).eval()
    vae.dtype = torch.bfloat16
    torch.cuda.reset_peak_memory_stats(device)
    latents = torch.randn(1, 16, *GRID, device=device)
    decode = gpu_timed(lambda: [None for _ in vae.decode_chunks(latents)], device)
    video = torch.zeros(1, 3, 4 * GRID[0] - 3, 8 * GRID[1], 8 * GRID[2], device=device)
    print(f"VAE: decode {decode:.1f} s, encode {gpu_timed(lambda: vae.encode(video), device):.1f} s, peak "
          f"{torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB")


def dit_on_gpu(path, device, offload):
    """Load, run four steps, and print. With offload torch may use 8 GB, as on a small card. Returns the seconds
    of a step."""
    if offload:
        torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.mem_get_info(device)[1])
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    dit = wan_fp4.load_dit(path, device, stream=True)
    sample.settle(dit, 0, torch.device(device), offload)
    load = time.perf_counter() - start
    arguments = inputs(GRID, device)
    steps = [gpu_timed(partial(dit, *arguments), device) for _ in range(4)]
    step = sorted(steps)[1]
    print(f"{'streamed' if offload else 'loaded'}: load {load:.1f} s; steps "
          f"{', '.join(f'{s:.2f}' for s in steps)} s, {1000 * step / len(dit.blocks):.0f} ms a block; peak "
          f"{torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB")
    del dit
    torch.cuda.empty_cache()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=Path("fullsize.safetensors"),
                        help="the weights, written if missing (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", action="store_true", help="only memory and FLOPs by arithmetic")
    parser.add_argument("--activation", action="store_true", help="only the bytes that activations move")
    args = parser.parse_args()
    print(f"torch {torch.__version__}")
    if args.activation:
        return activation()
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
