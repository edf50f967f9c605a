"""8-bit self-attention: what it costs the demo's videos, and which instructions its kernel uses.

    python bench/attention.py [--dit FILE]      accuracy, on the demo model
    python bench/attention.py --kernels         the kernels' instructions; needs torch's CUDA build, but no GPU:
                                                pip --isolated install torch==2.13.0

Accuracy, by block: the signal-to-noise ratio of self-attention's output, over four steps of one video, and that
of rounding the exact output to NVFP4, which the next layer does to it in W4A4. Videos: two photos that the model
was never trained on, nine moves each; PSNR against the videos in W4A16 with torch's attention, from the same
noise.

Kernels: torch.compile writes FlexAttention's kernel for a pretended GPU, Triton's ptxas assembles it, and
nvdisasm lists its instructions. Nothing runs.
"""
import argparse
import ctypes
import functools
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import quality  # also puts the project's folder on sys.path
import torch
import torch.nn.functional as F

import convert
import quant
import sample
import wan_fp4

CAPABILITIES = (8, 9), (9, 0), (10, 0), (12, 0)


# ----------------------------------------------------------------------------------------------------
# Accuracy
# ----------------------------------------------------------------------------------------------------


def by_block(dit, condition):
    """Print the SNR of each block's self-attention in fp8, and of its output rounded to NVFP4."""
    seen = [[] for _ in dit.blocks]

    def attention(i, q, k, v):
        exact = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        rows = wan_fp4.join_heads(exact)[0]  # (N, D)
        fp8 = wan_fp4.fp8_attention(q, k, v)
        seen[i].append((convert.snr(exact, fp8), convert.snr(rows, convert.as_nvfp4(rows))))
        return exact

    for i, block in enumerate(dit.blocks):
        block.self_attn.attention = functools.partial(attention, i)
    noise = torch.randn((1, 16, *condition.y.shape[2:]), generator=torch.Generator().manual_seed(0))
    sample.sample_latents(lambda x, sigma: dit(x, torch.full((1,), 1000 * sigma), condition.text, condition.image,
                                               condition.y),
                          noise, sample.sigmas("normal", 4, 5.0), "lcm", torch.Generator().manual_seed(0))
    print("dB            fp8  rounding to NVFP4")
    for i, pairs in enumerate(seen):
        print("block {:2}{:9.1f}{:19.1f}".format(i, *map(quality.mean, zip(*pairs))))


@torch.inference_mode()
def accuracy(path):
    sys.path.insert(0, str(quality.DEMO))
    import train
    conditions = quality.held_out_conditions(wan_fp4.read_header(path)[0])
    vae, dit = wan_fp4.load_vae(quality.ENCODERS["vae"]), wan_fp4.load_dit(path)
    print(f"{path.name}: {quant.describe(dit)}")
    by_block(dit, conditions[0])
    truth = None
    for mode in ("dequantize", "emulate"):
        dit = wan_fp4.load_dit(path, mode=mode)
        for attention in (F.scaled_dot_product_attention, wan_fp4.fp8_attention):
            for block in dit.blocks:
                block.self_attn.attention = attention
            made = quality.videos(dit, conditions, vae)
            if truth is None:
                truth = made
                continue
            name = f"{'W4A4' if mode == 'emulate' else 'W4A16'}, {attention.__name__}"
            print(f"{name:40}{train.psnr(made, truth):8.2f} dB", flush=True)


# ----------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------


def pretend(capability):
    """Make torch.compile and Triton believe in a GPU of this compute capability."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    major, minor = capability
    shared = 101376 if capability in ((8, 9), (12, 0)) else 232448
    properties = SimpleNamespace(
        name="pretended", major=major, minor=minor, multi_processor_count=100, total_memory=2 ** 35, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, max_threads_per_block=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=shared, L2_cache_size=2 ** 26,
        shared_memory_per_multiprocessor=shared + 1024)

    def answer(place, wrap=lambda f: f, **values):
        for name, value in values.items():
            setattr(place, name, wrap(lambda *_, value=value, **__: value))

    both = dict(is_available=True, device_count=1, current_device=0, get_device_properties=properties,
                synchronize=None, get_raw_stream=0)
    answer(torch.cuda, get_device_capability=capability, get_device_name="pretended", is_bf16_supported=True,
           is_initialized=True, set_device=None, _lazy_init=None, _exchange_device=0, _maybe_exchange_device=0,
           get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None, **both)
    answer(CudaInterface, staticmethod, get_compute_capability=10 * major + minor, exchange_device=0,
           maybe_exchange_device=0, **both)
    answer(CudaInterface.Worker, staticmethod, get_device_properties=properties, current_device=0)
    answer(torch._C, _cuda_getDevice=0, _cuda_setDevice=None, _cuda_exchangeDevice=0, _cuda_maybeExchangeDevice=0,
           _cuda_getCurrentRawStream=0)
    answer(torch.accelerator, is_available=False)
    driver = SimpleNamespace()
    answer(driver, get_current_target=GPUTarget("cuda", 10 * major + minor, 32), get_current_device=0,
           get_active_torch_device=torch.device("cuda", 0), get_device_interface=torch.cuda, get_current_stream=0)
    triton.runtime.driver.set_active(driver)
    answer(triton_helpers, set_driver_to_gpu=None)
    for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init"),
                         (misc_patterns, "_misc_patterns_init")):
        answer(module, **{name: None})  # they would compute on the GPU
    config.compile_threads, config.force_disable_caches, config.joint_graph_constant_folding = 1, True, False
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[14]  # by type of device: the meta device's guard, which does nothing


def kernels(capability, tokens=32760):
    """Print the matrix instructions of the attention kernels in bf16 and in fp8."""
    import triton
    from torch._inductor.async_compile import AsyncCompile
    from torch._subclasses.fake_tensor import FakeTensorMode
    pretend(capability)
    logging.disable()  # kernels that are not loaded are logged as errors
    cubins, compile_kernel, make_kernel = [], triton.compile, AsyncCompile.triton

    def keep(*args, **options):
        cubins.append(compile_kernel(*args, **options).asm["cubin"])
        raise NotImplementedError("there is no GPU to load it")

    def make(*args, **options):
        try:
            return make_kernel(*args, **options)
        except NotImplementedError:
            return None

    triton.compile, AsyncCompile.triton = keep, make
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        cubins.clear(), torch._dynamo.reset(), wan_fp4.flex_attention.cache_clear()
        start = time.perf_counter()
        with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
            q, k, v = (torch.empty(1, 40, tokens, 128, device="cuda").to(dtype) for _ in range(3))
            try:
                wan_fp4.flex_attention()(q, k, v, torch.empty(1, 40, 1, 1, device="cuda"))
            except Exception:  # when it tries to run
                if not cubins:
                    raise
        seconds, found = time.perf_counter() - start, Counter()
        for cubin in cubins:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin), file.flush()
                listing = subprocess.check_output([disassembler, "-c", file.name], text=True)
            found.update(re.findall(r"\b(?:[HQ]G?MMA|UTC[HQ]MMA)[.\w]*", listing))
        print(f"sm_{capability[0]}{capability[1]}  {str(dtype)[6:]:14} compiled in {seconds:4.1f} s: "
              f"{', '.join(f'{n} {name}' for name, n in found.items())}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", type=Path, default=quality.DEMO / "dit.safetensors", metavar="FILE",
                        help="accuracy: a demo model (default: demo/dit.safetensors)")
    parser.add_argument("--kernels", action="store_true", help="the kernels' instructions instead of accuracy")
    parser.add_argument("--capability", help=argparse.SUPPRESS)  # of one GPU, such as 8.9
    args = parser.parse_args()
    if args.capability:
        kernels(tuple(map(int, args.capability.split("."))))
    elif args.kernels:
        for major, minor in CAPABILITIES:  # a pretended GPU lasts until its process ends
            subprocess.run([sys.executable, __file__, "--capability", f"{major}.{minor}"], check=True)
    else:
        accuracy(args.dit)


if __name__ == "__main__":
    main()
