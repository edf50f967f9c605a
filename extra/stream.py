"""What does not fit the GPU: blocks streamed from CPU memory, and a VAE that decodes in tiles.

sample.py enters this file only where a network's blocks or a video's decoding exceed the free memory, or with
--offload. By arithmetic, the 14B model then makes 81 frames of 480 x 832 within 8 GB.

Letters in the shapes: B batch; T latent frames, H W their height and width; F = 4 T - 3 frames, h = 8 H, w = 8 W.
"""
import itertools
import math
import sys
from functools import partial

import torch
from torch import nn

import wan_fp4

# ----------------------------------------------------------------------------------------------------
# Blocks, one on the GPU at a time
# ----------------------------------------------------------------------------------------------------

class StreamedBlocks(nn.ModuleList):
    """A network's blocks in CPU memory or mapped files, each on the GPU only while it computes.

    Iterating gives them in order, as callables. While one block computes, the next is copied: to one of two
    pinned buffers, since only pinned memory is copied asynchronously, and from there, on a stream of its own,
    to one of two buffers on the GPU. On a CPU, for tests, the same copies are made one after another.
    """

    def __init__(self, blocks, device):
        super().__init__(blocks)
        device = torch.device(device)
        self.cuda_device = device if device.type == "cuda" else None
        self.tensors = [dict(block.named_parameters()) | dict(block.named_buffers()) for block in blocks]
        size = max(sum(padded_bytes(t) for t in tensors.values()) for tensors in self.tensors)
        pin = self.cuda_device is not None
        self.pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        if self.cuda_device:
            self.copy_stream = torch.cuda.Stream(device)
            self.copied = [torch.cuda.Event() for _ in range(2)]  # pinned buffer -> GPU
            self.computed = [torch.cuda.Event() for _ in range(2)]  # the block in the GPU's buffer

    def __iter__(self):
        if self.cuda_device is None:
            for i in range(len(self)):
                yield partial(call_with, self[i], self.fetch(i))
            return
        current = torch.cuda.current_stream(self.cuda_device)
        self.copy_stream.wait_stream(current)  # the buffers' memory may still be in use there
        try:
            views = self.fetch(0)
            for i in range(len(self)):
                current.wait_event(self.copied[i % 2])
                try:
                    yield partial(call_with, self[i], views)
                finally:  # also if the block raises or the loop is left
                    self.computed[i % 2].record(current)
                if i + 1 < len(self):
                    views = self.fetch(i + 1)  # block i is queued on the GPU but still computing
        finally:
            current.wait_stream(self.copy_stream)  # before the buffers' memory is used for anything else

    def fetch(self, i):
        """Start copying block i. Returns its tensors {name: tensor}, views of the GPU's buffer."""
        pinned, slot, views, at = self.pinned[i % 2], self.slots[i % 2], {}, 0
        if self.cuda_device:
            self.copied[i % 2].synchronize()  # wait until the pinned buffer is free again
        for name, tensor in self.tensors[i].items():
            part = slice(at, at + tensor.nbytes)
            pinned[part].copy_(tensor.reshape(-1).view(torch.uint8))
            views[name] = slot[part].view(tensor.dtype).view(tensor.shape)
            at += padded_bytes(tensor)
        if not self.cuda_device:
            slot[:at].copy_(pinned[:at])
            return views
        with torch.cuda.stream(self.copy_stream):
            self.copy_stream.wait_event(self.computed[i % 2])
            slot[:at].copy_(pinned[:at], non_blocking=True)
            self.copied[i % 2].record()
        return views


def padded_bytes(tensor):
    return (tensor.nbytes + 255) // 256 * 256  # keeps every view aligned


def call_with(module, tensors, *args):
    return torch.func.functional_call(module, tensors, args)


def stream_blocks(network, working, device, free):
    """Stream a network's blocks from CPU memory to a device with `free` bytes, of which a forward needs `working`
    besides two blocks. Says so, and warns if even that is too much."""
    network.blocks = StreamedBlocks(network.blocks, device)
    needed = working + sum(slot.nbytes for slot in network.blocks.slots)
    print(f"{type(network).__name__}: streaming its blocks from CPU memory, two at a time: needs "
          f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}")
    if needed > free:
        print(f"sample.py: warning: {device} has less free memory than this needs even when streaming; if it "
              f"runs out, try fewer --frames or a smaller --size", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------
# Decoding in tiles
# ----------------------------------------------------------------------------------------------------

TILE_OVERLAP = 8  # latents that two neighboring tiles share, or more


def decode_tiled(vae, latents, free, needed):
    """vae.decode_chunks for latents (1, 16, T, H, W) whose decoding needs more bytes than are free: yields the
    video (1, 3, 1, h, w), then (1, 3, 4, h, w) each, on the CPU."""
    tile = tile_side(latents, free, needed)
    print(f"decode: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: decoding in tiles of "
          f"{8 * tile} pixels")
    yield from wan_fp4.chunks(decode_tiles(vae, latents, tile).clamp(-1, 1), 4)


def tile_side(latents, free, needed):
    """The side, in latents, of the tiles that decode in `free` bytes, if whole frames need `needed`."""
    side = math.isqrt(int(latents[0, 0, 0].numel() * free / needed))
    return max(2 * TILE_OVERLAP, side)


def decode_tiles(vae, latents, tile, mine=slice(None)):
    """Latents (B, 16, T, H, W) -> video (B, 3, F, h, w) on the CPU, from squares of `tile` latents, decoded one
    after another. With `mine`, only these tiles' part of the sum.

    Neighboring tiles overlap and are blended. The layers at the size of the latents, with the attention, still
    see whole frames, so pixels far from any overlap do not change. The device holds what one tile needs; the CPU
    holds those layers' output and the video.
    """
    b, _, _, height, width = latents.shape
    mean, std = wan_fp4.latent_statistics(latents.device, vae.cfg.z_dim)
    z, cache = (latents * std + mean).to(vae.dtype), {}
    small = [vae.decoder.begin(vae.conv2(x, cache), cache).cpu() for x in wan_fp4.chunks(z, 1)]  # (B, C, 1, H, W)
    video = torch.zeros(b, 3, 4 * len(small) - 3, 8 * height, 8 * width)
    places = list(itertools.product(tiles(height, tile), tiles(width, tile)))
    for (top, bottom, rows), (left, right, columns) in places[mine]:
        weight, cache, start = rows[:, None] * columns, {}, 0
        for x in small:
            x = x[..., top:bottom, left:right].to(latents.device)  # (B, C, 1, tile, tile)
            x = vae.decoder.upsample(x, cache).float().cpu()  # (B, 3, 1 or 4, 8 * tile, 8 * tile)
            stop = start + x.shape[2]
            video[:, :, start:stop, 8 * top:8 * bottom, 8 * left:8 * right] += weight * x
            start = stop
    return video


def tiles(length, tile):
    """Cut `length` latents into overlapping tiles, evenly spaced: [(start, stop, weight of each pixel), ...].

    The weights (8 * (stop - start),) of the tiles add up to 1 at every pixel. Each is the distance to the tile's
    ends, up to TILE_OVERLAP latents, divided by the sum of those of all tiles; an end at the edge of the frame
    does not count.
    """
    last = max(0, length - tile)
    count = 1 + -(-last // (tile - TILE_OVERLAP))
    starts = [last * i // max(1, count - 1) for i in range(count)]
    pixel, weights = (torch.arange(8 * length) + 0.5) / (8 * TILE_OVERLAP), []
    for start in starts:
        rise = pixel - start / TILE_OVERLAP if start > 0 else torch.ones_like(pixel)
        fall = (start + tile) / TILE_OVERLAP - pixel if start < last else torch.ones_like(pixel)
        weights.append(rise.minimum(fall).clamp(0, 1))
    total = sum(weights)
    return [(start, min(start + tile, length), (weight / total)[8 * start:8 * (start + tile)])
            for start, weight in zip(starts, weights)]
