"""What this machine could do at best with the work of bench.py: python bench/floors.py

Its rates first, then for each network the floating-point operations, counted on the meta device, and the
seconds they would take at the rate of one large product or convolution: no less work gives these outputs.
For the formats, the seconds that it takes to fill an output of 5120 x 5120, new memory and old.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quant  # noqa: E402
import wan_fp4  # noqa: E402


def seconds(work, rounds=5):
    taken = []
    for i in range(rounds + 1):
        start = time.perf_counter()
        work()
        if i:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rates():
    """Operations a second, in float32, of {a product as torch takes it, as quant.py does, a convolution}."""
    x, w = torch.randn(2048, 2048), torch.randn(2048, 2048)
    video, kernel = torch.randn(1, 192, 6, 120, 208), torch.nn.Conv3d(192, 192, 3, padding=(0, 1, 1))
    video = wan_fp4.channels_last(video)
    flops = 2 * 27 * 192 * 192 * 4 * 120 * 208
    return {"products by F.linear": 2 * 2048 ** 3 / seconds(lambda: F.linear(x, w)),
            "products": 2 * 2048 ** 3 / seconds(lambda: quant.linear(x, w)),
            "convolutions": flops / seconds(lambda: wan_fp4.conv3d(video, kernel, kernel.padding))}


def networks():
    """name -> (kind of operation, forward on the meta device), at the sizes of bench.py."""
    new = torch.empty
    dit = wan_fp4.WanDiT(wan_fp4.DiTConfig(dim=1536, ffn_dim=8960, num_blocks=2))
    vae = wan_fp4.WanVAE()
    umt5 = wan_fp4.UMT5Encoder(wan_fp4.UMT5Config(vocab=1000, num_blocks=2))
    clip = wan_fp4.CLIPVision(wan_fp4.CLIPConfig(num_blocks=4))
    ids = torch.ones(1, 512, dtype=torch.long)
    return {"DiT": ("products", lambda: dit(new(1, 16, 3, 50, 52), new(1), new(1, 30, 4096),
                                            new(1, 257, 1280), new(1, 20, 3, 50, 52))),
            "VAE decode": ("convolutions", lambda: vae.decode(new(1, 16, 3, 30, 52))),
            "VAE encode": ("convolutions", lambda: vae.encode(new(1, 3, 9, 240, 416))),
            "UMT5": ("products", lambda: umt5(ids, ids)),
            "CLIP": ("products", lambda: clip(new(1, 3, 224, 224)))}


@torch.no_grad()
def main():
    rate = rates()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for kind, value in rate.items():
        print(f"{kind}: {value / 1e9:.0f} GFLOP/s")
    with torch.device("meta"):
        for name, (kind, forward) in networks().items():
            with FlopCounterMode(display=False) as counter:
                forward()
            flops = counter.get_total_flops()
            print(f"{name}: {flops / 1e9:.0f} GFLOP, {flops / rate[kind]:.2f} s at the rate of {kind}")
    for dtype in (torch.bfloat16, torch.float32):
        old = torch.empty(5120, 5120, dtype=dtype)
        new = seconds(lambda: torch.full((5120, 5120), 1.0, dtype=dtype))
        again = seconds(lambda: old.fill_(1))
        print(f"fill 5120 x 5120 {dtype}: {1e3 * new:.0f} ms of new memory, {1e3 * again:.0f} ms of old")


if __name__ == "__main__":
    main()
