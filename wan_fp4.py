"""Wan2.1 image-to-video: the networks that turn a picture and a prompt into a video, and their checkpoints.

    UMT5Encoder   token ids -> text features                   once per prompt
    CLIPVision    the picture at 224 x 224 -> image tokens     once per picture
    WanVAE        video <-> latents, 8 x 8 x 4 times smaller   encodes the picture, decodes the result
    WanDiT        noisy latents -> velocity                    once per sampling step: most of the run time
    IFNet         two frames -> the frame between them         RIFE, not part of Wan: raises the frame rate

Wan is a flow model: x_sigma = (1 - sigma) * x0 + sigma * noise. The DiT predicts the velocity noise - x0 from
x_sigma and t = 1000 * sigma. The picture conditions it in three ways: its VAE latents and a mask of the given
frames are concatenated with the noisy latents, and its CLIP tokens enter cross-attention.

Module names are the tensor names of the official checkpoints, and all sizes are read from the tensors'
shapes, so the 14B model, the demo and the tests run the same code. The loaders keep every Linear as the file
stores it (NVFP4, MXFP8, FP8 or plain: quant.QuantLinear), and LoRAs run as side branches of the Linears.
Architecture: the Wan2.1 report (https://arxiv.org/abs/2503.20314) and https://github.com/Wan-Video/Wan2.1.

For callers: the five networks with their configs; load_dit, load_vae, load_umt5, load_clip, load_ifnet;
read_header, read_tensors, tensor_names, shards; check_loras, attach_lora; use_fp8_attention; for several GPUs,
join_ranks, Ranks and SplitDiT.

Letters in the shapes, where each network has its own D:
    B batch   F, h, w frames, height, width in pixels   T = 1 + (F - 1) / 4, H = h / 8, W = w / 8 in latents
    N = T * H/2 * W/2 video tokens   L text tokens   I image tokens (257)   D width   d head width   C channels
"""
import argparse
import functools
import itertools
import json
import math
import os
import platform
import re
import stat
import sys
import threading
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import nn

from quant import QuantLinear, compiled_on_cuda, default_dtype, default_mode, project, read_marker, write_marker

# ----------------------------------------------------------------------------------------------------
# DiT: the diffusion transformer
# ----------------------------------------------------------------------------------------------------

TEXT_TOKENS = 512  # training padded every prompt to this length and did not mask the padding


@dataclass(frozen=True)
class DiTConfig:
    dim: int = 5120
    ffn_dim: int = 13824
    num_blocks: int = 40
    head_dim: int = 128
    in_dim: int = 36  # 16 noisy latents, 4 mask, 16 latents of the picture
    out_dim: int = 16
    text_dim: int = 4096
    image_dim: int = 1280
    freq_dim: int = 256


def normal(*shape, std=1.0):
    """A parameter with values from a normal distribution. Left empty on the meta device, where loaders build the
    networks: there is nothing to fill, and meta arithmetic would import torch's compiler."""
    values = torch.empty(shape)
    return nn.Parameter(values if values.is_meta else values.normal_(std=std))


def timestep_embedding(t, dim):
    """Times t (B,) -> (B, dim): the cosines, then the sines, of t * 10000 ** (-i / (dim / 2)).

    Computed in float64: angles reach 1000 radians, where float32 is off by 6e-5.
    """
    freqs = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angles = t.double()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()  # (B, dim)


def rope_3d(frames, height, width, head_dim, device):
    """Rotary position embedding (RoPE, https://arxiv.org/abs/2104.09864) for three axes: the cosines and sines of
    the angles, (2, N, d/2).

    A head's c = d/2 pairs are divided among the axes: the first c - 2 * (c // 3) rotate with t, the next
    c // 3 with h and the last c // 3 with w. Angles are computed in float64.
    """
    c = head_dim // 2
    axes = []
    for n, pairs in ((frames, c - 2 * (c // 3)), (height, c // 3), (width, c // 3)):
        freqs = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        angles = torch.arange(n, dtype=torch.float64, device=device)[:, None] * freqs  # (n, pairs)
        axes.append(torch.stack([angles.cos(), angles.sin()]).float())  # (2, n, pairs)
    t, h, w = axes
    grid = (2, frames, height, width, -1)
    rope = torch.cat([t[:, :, None, None].expand(grid), h[:, None, :, None].expand(grid),
                      w[:, None, None].expand(grid)], dim=-1)
    return rope.flatten(1, 3)  # (2, N, d/2)


def apply_rope(x, rope):
    """Rotate the interleaved pairs of x (B, heads, N, d) by rope (2, N, d/2)."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, heads, N, d/2, 2)
    if not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(pairs) * torch.complex(*rope)  # (B, heads, N, d/2)
        return torch.view_as_real(pairs).flatten(-2).to(x.dtype)  # (B, heads, N, d)
    (a, b), (cos, sin) = pairs.unbind(-1), rope  # the same; torch.compile does not fuse complex numbers
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)  # (B, heads, N, d)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return rms_norm(x, self.weight)


@compiled_on_cuda
def rms_norm(x, weight):
    return F.rms_norm(x.float(), weight.shape, weight, 1e-6).to(x.dtype)


@compiled_on_cuda
def rms_norm_and_rope(x, weight, rope, head_dim):
    """RMSNorm, heads split and rotated: (B, N, D) -> (B, heads, N, d)."""
    y = F.rms_norm(x.float(), weight.shape, weight, 1e-6)  # (B, N, D)
    return apply_rope(split_heads(y, head_dim), rope).to(x.dtype)  # (B, heads, N, d)


@compiled_on_cuda
def layer_norm(x, weight, bias, dtype):
    """LayerNorm in `dtype`. weight and bias are (D,) or, if each video of the batch has its own, (B, 1, D)."""
    if weight.dim() == 1:
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6).to(dtype)
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), weight).to(dtype)


@compiled_on_cuda
def add_gated(x, y, gate):
    return torch.addcmul(x, gate, y.float())  # x + gate * y


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, d)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, D)


class SelfAttention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)  # over D, before the heads are split
        self.attention = F.scaled_dot_product_attention  # or fp8_attention; SplitDiT wraps it

    def forward(self, x, rope):
        q, k, v = project(x, self.q, self.k, self.v)  # (B, N, D) each
        q = rms_norm_and_rope(q, self.norm_q.weight, rope, self.head_dim)  # (B, heads, N, d)
        k = rms_norm_and_rope(k, self.norm_k.weight, rope, self.head_dim)  # (B, heads, N, d)
        y = self.attention(q, k, split_heads(v, self.head_dim))  # (B, heads, N, d)
        return self.o(join_heads(y))  # (B, N, D)


class CrossAttention(nn.Module):
    """One query attends to the text tokens and, separately, to the image tokens; the results are added."""

    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k, self.norm_k_img = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)

    def forward(self, x, text, text_bias, image):
        q = split_heads(self.norm_q(self.q(x)), self.head_dim)  # (B, heads, N, d)
        k, v = project(text, self.k, self.v)  # (B, L + 1, D) each
        k, v = split_heads(self.norm_k(k), self.head_dim), split_heads(v, self.head_dim)  # (B, heads, L + 1, d)
        k_img, v_img = project(image, self.k_img, self.v_img)  # (B, I, D) each
        k_img = split_heads(self.norm_k_img(k_img), self.head_dim)  # (B, heads, I, d)
        v_img = split_heads(v_img, self.head_dim)  # (B, heads, I, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=text_bias)  # (B, heads, N, d)
        y = y + F.scaled_dot_product_attention(q, k_img, v_img)
        return self.o(join_heads(y))  # (B, N, D)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a float32 residual stream x (B, N, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.modulation = normal(1, 6, cfg.dim, std=cfg.dim ** -0.5)
        self.self_attn = SelfAttention(cfg.dim, cfg.head_dim)
        self.norm3 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.cross_attn = CrossAttention(cfg.dim, cfg.head_dim)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU("tanh"),
                                 nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x, e0, rope, text, text_bias, image):
        dtype = text.dtype  # the Linears' compute dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).chunk(6, dim=1)  # (B, 1, D) each
        y = layer_norm(x, 1 + scale1, shift1, dtype)  # (B, N, D)
        x = add_gated(x, self.self_attn(y, rope), gate1)  # (B, N, D)
        y = layer_norm(x, self.norm3.weight, self.norm3.bias, dtype)  # (B, N, D)
        x = x + self.cross_attn(y, text, text_bias, image)  # (B, N, D)
        y = layer_norm(x, 1 + scale2, shift2, dtype)  # (B, N, D)
        return add_gated(x, self.ffn(y), gate2)  # (B, N, D)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.modulation = normal(1, 2, cfg.dim, std=cfg.dim ** -0.5)
        self.head = nn.Linear(cfg.dim, 4 * cfg.out_dim)  # a patch of 2 x 2 latents

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)  # (B, 1, D) each
        x = layer_norm(x, 1 + scale, shift, torch.float32)  # (B, N, D)
        return self.head(x)  # (B, N, 4 * 16)


class WanDiT(nn.Module):
    """Predicts the velocity noise - x0 from noisy latents."""

    def __init__(self, cfg=DiTConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype of attention and of the blocks' Linears; load_weights sets it
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, cfg.dim), nn.GELU("tanh"),
                                            nn.Linear(cfg.dim, cfg.dim))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(),
                                            nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.img_emb = nn.ModuleDict({"proj": nn.Sequential(
            nn.LayerNorm(cfg.image_dim), nn.Linear(cfg.image_dim, cfg.image_dim), nn.GELU(),
            nn.Linear(cfg.image_dim, cfg.dim), nn.LayerNorm(cfg.dim))})
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_blocks))
        self.head = Head(cfg)

    def embed_text(self, text):
        """UMT5's features (B, L, UMT5's D), L <= 512 -> (B, L + 1, D) and an attention bias (1, 1, 1, L + 1).

        The model was trained on prompts padded with zeros to 512 tokens. The padding tokens are identical, so
        one of them stands for all 512 - L: adding log(512 - L) to its logit gives it that weight in the softmax.
        """
        b, length, width = text.shape
        if length > TEXT_TOKENS:
            raise ValueError(f"text: got {length} tokens, expected at most {TEXT_TOKENS}; shorten the prompt")
        padding = text.new_zeros(b, 1, width, dtype=self.dtype)
        text = torch.cat([text.to(self.dtype), padding], dim=1)  # (B, L + 1, UMT5's D)
        bias = torch.zeros(1, 1, 1, length + 1, dtype=self.dtype, device=text.device)
        bias[..., -1] = math.log(TEXT_TOKENS - length) if length < TEXT_TOKENS else -math.inf
        return self.text_embedding(text), bias

    def prepare(self, x, t, text, image, y):
        """forward's arguments -> x, e, context: tokens x (B, N, D), the time embedding e (B, D) for the head,
        and the arguments that every block takes after x."""
        _, _, frames, height, width = x.shape
        if height % 2 or width % 2 or y.shape[2:] != x.shape[2:]:
            raise ValueError(f"WanDiT: got x {tuple(x.shape)} and y {tuple(y.shape)}, expected the same "
                             f"T, H, W with H and W even; make the picture's sides multiples of 16 pixels")
        x = self.patch_embedding(torch.cat([x.float(), y.float()], dim=1))  # (B, D, T, H/2, W/2)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        rope = rope_3d(frames, height // 2, width // 2, self.cfg.head_dim, x.device)  # (2, N, d/2)
        e = self.time_embedding(timestep_embedding(t, self.cfg.freq_dim))  # (B, D)
        e0 = self.time_projection(e).unflatten(1, (6, -1))  # (B, 6, D)
        text, text_bias = self.embed_text(text)  # (B, L + 1, D), (1, 1, 1, L + 1)
        image = self.img_emb["proj"](image.float()).to(self.dtype)  # (B, I, D)
        return x, e, (e0, rope, text, text_bias, image)

    def unpatchify(self, x, grid):
        """The head's output (B, N, 64) -> velocity (B, 16, T, H, W), where grid = (T, H, W)."""
        return rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", t=grid[0], h=grid[1] // 2, p=2, q=2)

    def forward(self, x, t, text, image, y):
        """x (B, 16, T, H, W) noisy latents; t (B,) = 1000 * sigma; text (B, L, UMT5's D), not padded or zero past
        the prompt; image (B, I, CLIP's D); y (B, 20, T, H, W) mask and latents of the picture
        -> velocity (B, 16, T, H, W) in float32. Raises ValueError for odd H or W, a y of another size than x,
        and L > 512.
        """
        grid = x.shape[2:]
        x, e, context = self.prepare(x, t, text, image, y)  # (B, N, D)
        for block in self.blocks:
            x = block(x, *context)  # (B, N, D)
        return self.unpatchify(self.head(x, e), grid)  # (B, 16, T, H, W)


# ----------------------------------------------------------------------------------------------------
# 8-bit self-attention
# ----------------------------------------------------------------------------------------------------

def fp8_attention(q, k, v):
    """Self-attention with q, k, v and the probabilities in E4M3: (B, heads, N, d) each -> (B, heads, N, d).

    Three steps, which would not change y in exact arithmetic, reduce the rounding error:
    - The mean of k over the tokens is subtracted from k. All logits of a row change by the same number, which the
      softmax ignores.
    - q and k are rotated by a Hadamard matrix. q @ k.T stays the same, but a few large channels are spread over
      all, so that their rounding errors average out.
    - The mean of v over the tokens is subtracted from v and added to y, as the probabilities of a row sum to one.
      Probabilities below 2 ** -10 become 0 in E4M3; without this step, y would lose their share of the mean.
    """
    dtype = v.dtype
    q, k, v, logit_scale, v_scale, v_mean = fp8_operands(q, k, v)
    y = (flex_attention() if has_fp8_kernel(q.device) else emulate_flex_attention)(q, k, v, logit_scale)
    return restore_v(y, v_scale, v_mean, dtype)  # (B, heads, N, d)


@compiled_on_cuda
def fp8_operands(q, k, v):
    """q, k, v -> q, k, v in E4M3, the scale of the logits (B, heads, 1, 1), and v's scale and mean, each
    (B, heads, 1, d)."""
    H = hadamard(q.shape[-1], q.dtype, q.device)  # (p, p)
    q, k = ((x.unflatten(-1, (-1, len(H))) @ H).flatten(-2) for x in (q, k))  # (B, heads, N, d) each
    v_mean = v.mean(2, keepdim=True, dtype=torch.float32)  # (B, heads, 1, d)
    q, q_scale = to_e4m3(q.float(), (2, 3))  # (B, heads, N, d), (B, heads, 1, 1)
    k, k_scale = to_e4m3(k - k.mean(2, keepdim=True, dtype=torch.float32), (2, 3))  # the same
    v, v_scale = to_e4m3(v - v_mean, 2)  # (B, heads, N, d), (B, heads, 1, d): a scale for each channel
    return q, k, v, q_scale * k_scale / len(H) / q.shape[-1] ** 0.5, v_scale, v_mean


def hadamard(d, dtype, device):
    """The Hadamard matrix H (p, p), where p is the largest power of two that divides d. H @ H.T = p * I, and all
    entries are 1 or -1, which every dtype represents exactly."""
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while d % (2 * len(H)) == 0:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])  # (2p, 2p)
    return H


def to_e4m3(x, dims):
    """x float32 -> x / scale in E4M3, and the scale, which `dims` share."""
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


@compiled_on_cuda
def restore_v(y, v_scale, v_mean, dtype):
    return torch.addcmul(v_mean, y.float(), v_scale).to(dtype)


def emulate_flex_attention(q, k, v, logit_scale):
    """What FlexAttention's kernels compute from E4M3 operands, except that these scale the probabilities by the
    largest logit so far, and correct the sum when a larger one follows."""
    k, v, out = k.float().transpose(2, 3), v.float(), []
    few = max(1, 2 ** 26 // v[..., 0].numel())  # rows whose logits take 256 MB; N x N would not fit memory
    for rows in q.split(few, dim=2):  # (B, heads, few, d)
        logits = rows.float() @ k * logit_scale  # (B, heads, few, N)
        p = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # (B, heads, few, N)
        y = p.to(torch.float8_e4m3fn).float() @ v / p.sum(-1, keepdim=True)  # (B, heads, few, d)
        out.append(y.to(torch.float8_e4m3fn))  # the kernels return y in q's dtype
    return torch.cat(out, dim=2)  # (B, heads, N, d)


@functools.cache
def flex_attention():
    """FlexAttention, compiled (https://arxiv.org/abs/2412.05496). torch does not advertise its float8 kernels."""
    from torch.nn.attention import flex_attention as flex

    def attend(q, k, v, logit_scale):
        scale = logit_scale[..., 0, 0]  # (B, heads)
        return flex.flex_attention(q, k, v, lambda logit, b, head, i, j: logit * scale[b, head], scale=1.0)
    return torch.compile(attend)


def has_fp8_kernel(device):
    """Whether tensor cores of this device multiply in E4M3: CUDA from sm_89."""
    device = torch.device(device)
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def use_fp8_attention(dit, everywhere=False):
    """Use fp8_attention in the blocks of a WanDiT, except in those that its file lists as too sensitive, unless
    `everywhere`. Returns the indices of the excepted blocks. Call it before the blocks are streamed."""
    kept = [] if everywhere else dit.bf16_attention
    for i, block in enumerate(dit.blocks):
        block.self_attn.attention = F.scaled_dot_product_attention if i in kept else fp8_attention
    return kept


# ----------------------------------------------------------------------------------------------------
# Several GPUs: one process for each, started by torchrun
# ----------------------------------------------------------------------------------------------------
#
# With one GPU, skip this section. torchrun starts the same program R times; each process is a rank, with a GPU of
# its own. Without torchrun there is one rank, which has nothing to share.
#
# Ulysses (https://arxiv.org/abs/2309.14509) splits the tokens of a video: each rank has n = ceil(N / R) of them.
# Only self-attention mixes tokens, and it treats heads separately. So an all-to-all before it gives each rank all
# tokens of heads / R heads, and another one after it returns n tokens of all heads. The result differs from that
# of a single rank by the order of sums and, on tensor cores, by the tensor scale of the activations, which each
# rank computes from its own tokens.


@dataclass(frozen=True)
class Ranks:
    """The number of processes that work together, and which of them this one is."""
    rank: int = 0
    size: int = 1

    def once(self, work):
        """Call work() in rank 0 only, and return its result in every rank, with tensors on rank 0's GPU copied to
        each rank's own."""
        if self.size == 1:
            return work()
        result, message = None, [None]
        if self.rank == 0:
            result, buffer = work(), BytesIO()
            torch.save(result, buffer)
            message = [buffer.getvalue()]
        dist.broadcast_object_list(message)
        if self.rank == 0:
            return result
        own = {"cuda:0": f"cuda:{os.environ['LOCAL_RANK']}"}
        return torch.load(BytesIO(message[0]), map_location=own, weights_only=False)

    def gather(self, value):
        """[the value of rank 0, of rank 1, ...], for every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, x):
        """Add the other ranks' tensors to x, in place. Returns x."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def group(self, size):
        """The process group of `size` consecutive ranks to which this one belongs. Every rank must call it."""
        groups = [dist.new_group(range(i, i + size)) for i in range(0, self.size, size)]
        return groups[self.rank // size]

    def device(self, name):
        """The device of this rank: as named, but with several ranks, "cuda" gives each its own GPU. Raises
        ValueError if the machine has too few, and for several ranks with a GPU's number, such as cuda:1."""
        if self.size == 1 or not name.startswith("cuda"):
            return name
        ranks, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if name != "cuda" or ranks > gpus:
            raise ValueError(f"--device {name}: got {ranks} ranks on a machine with {gpus} GPUs, expected "
                             f"--device cuda and a GPU for each; lower torchrun's --nproc-per-node")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def join_ranks():
    """A context that gives the Ranks that torchrun started. Within it, only rank 0 prints.

    The first exception in any rank is raised again in that rank, after "rank 1 (HOST): " is printed to stderr.
    All other ranks end within seconds with exit code 2, even in the middle of a transfer. Raises ValueError if
    ranks have different versions of torch, and ConnectionError if another rank has disappeared.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    threading.Thread(target=end_after_failure, args=[store.clone()], daemon=True).start()
    out, err = (sys.stdout, sys.stderr) if rank == 0 else [open(os.devnull, "w")] * 2
    try:
        with redirect_stdout(out), redirect_stderr(err):
            ranks = meet(store, rank, size)
            yield ranks
            ranks.gather("finished")  # no rank leaves while others still need it
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        if store.add("failures", 1) > 1:
            time.sleep(60)  # another rank failed first and reports it; end_after_failure ends this one
        print(f"rank {rank} ({platform.node()}): ", end="", file=sys.stderr, flush=True)
        # The gloo backend also raises plain RuntimeErrors, which only their text identifies
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError("lost the connection to another rank; see torchrun's report on it") from None
        raise


def meet(store, rank, size):
    """Connect this rank to all others. Raises ValueError if its version of torch is not that of rank 0."""
    if rank == 0:
        store.set("torch", torch.__version__)
    version = store.get("torch").decode()
    if version != torch.__version__:
        raise ValueError(f"got torch {torch.__version__}, expected {version} as in rank 0; install that version")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=7))
    return Ranks(rank, size)


def end_after_failure(store):
    """End this process 2 seconds after any rank has failed, which leaves that rank time to print its message."""
    with suppress(dist.DistError):  # the machine that keeps the store is lost
        while store.add("failures", 0) == 0:
            time.sleep(0.5)
    time.sleep(2)
    os._exit(2)


class TokenSplit:
    """One video's N tokens, split over the R ranks of a process group."""

    def __init__(self, group):
        self.group, self.size, self.tokens = group, dist.get_world_size(group), 0

    def share(self, x):
        """This rank's tokens: (..., N, C) -> (..., n, C). If R does not divide N, zeros are appended first."""
        self.tokens = x.shape[-2]
        x = F.pad(x, (0, 0, 0, -self.tokens % self.size))  # (..., R * n, C)
        return x.chunk(self.size, dim=-2)[dist.get_rank(self.group)].clone()  # (..., n, C), a copy: frees x

    def gather(self, x):
        """The inverse of share, for (B, n, C): every rank gets (B, N, C)."""
        parts = [torch.empty_like(x) for _ in range(self.size)]  # (B, n, C) each
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)[:, :self.tokens]  # (B, N, C)

    def exchange(self, x):
        """All-to-all on x (R, ...): part i goes to rank i; part i of the result comes from rank i."""
        result = torch.empty_like(x)
        dist.all_to_all_single(result, x, group=self.group)
        return result

    def all_tokens(self, x):
        """(B, heads, n, d) of this rank's tokens -> (B, heads/R, N, d) of its heads."""
        x = rearrange(x, "b (r heads) n d -> r b heads n d", r=self.size).contiguous()  # (R, B, heads/R, n, d)
        x = rearrange(self.exchange(x), "r b heads n d -> b heads (r n) d")  # (B, heads/R, R * n, d)
        return x[:, :, :self.tokens]  # (B, heads/R, N, d), without the padding

    def all_heads(self, x):
        """The inverse: (B, heads/R, N, d) -> (B, heads, n, d)."""
        x = F.pad(x, (0, 0, 0, -self.tokens % self.size))  # (B, heads/R, R * n, d)
        x = rearrange(x, "b heads (r n) d -> r b heads n d", r=self.size).contiguous()  # (R, B, heads/R, n, d)
        return rearrange(self.exchange(x), "r b heads n d -> b (r heads) n d")  # (B, heads, n, d)

    def attention(self, whole, q, k, v):
        """Self-attention by the function `whole` over all tokens: (B, heads, n, d) each -> (B, heads, n, d)."""
        return self.all_heads(whole(*map(self.all_tokens, (q, k, v))))


class SplitDiT(nn.Module):
    """A WanDiT that computes each velocity together with the other ranks of a process group. All of them must
    call it with the same arguments; all get the same velocity. It changes the WanDiT's self-attention for good:
    make it before the blocks are streamed, and call only it from then on. Raises ValueError if the number of
    heads is not a multiple of R."""

    def __init__(self, dit, group):
        super().__init__()
        self.dit, self.split = dit, TokenSplit(group)
        heads = dit.cfg.dim // dit.cfg.head_dim
        if heads % self.split.size:
            counts = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(f"the model's {heads} heads: got {self.split.size} ranks that share them, expected "
                             f"{counts}; start torchrun with that many ranks (twice as many with --cfg), or make "
                             f"at least one video per rank")
        for block in dit.blocks:
            block.self_attn.attention = functools.partial(self.split.attention, block.self_attn.attention)

    def forward(self, x, t, text, image, y):
        grid = x.shape[2:]
        x, e, (e0, rope, *context) = self.dit.prepare(x, t, text, image, y)  # (B, N, D)
        x, rope = self.split.share(x), self.split.share(rope)  # (B, n, D), (2, n, d/2)
        for block in self.dit.blocks:
            x = block(x, e0, rope, *context)  # (B, n, D)
        x = self.split.gather(self.dit.head(x, e))  # (B, N, 64)
        return self.dit.unpatchify(x, grid)  # (B, 16, T, H, W)


# ----------------------------------------------------------------------------------------------------
# VAE: causal 3-D convolutions, 8 times smaller in space and 4 times in time
# ----------------------------------------------------------------------------------------------------
#
# The first frame is compressed alone, then every four frames become one latent frame: T = 1 + (F - 1) / 4.
# Temporal convolutions see only the past, so a video is processed in chunks. Each stateful layer keeps the
# last frames of its input for the next chunk, in a dict `cache` from layer to frames. Memory does not grow
# with the length of the video, and the result does not depend on where it is cut.

LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
TILE_OVERLAP = 8  # latents shared by two neighboring tiles


@dataclass(frozen=True)
class VAEConfig:
    dims: tuple = (96, 192, 384, 384)  # channels of each level, full resolution first
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    temporal_downsample: tuple = (False, True, True)  # which steps down also halve time
    z_dim: int = 16  # latent channels


def channels_last(x):
    """x (B, C, t, h, w) in the memory format in which oneDNN and cuDNN convolve; usually no copy."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def conv3d(x, conv, padding=(0, 0, 0)):
    """Apply an nn.Conv3d. In float32 on a CPU always with oneDNN: F.conv3d chooses a slower loop for small
    single videos."""
    x = channels_last(x)
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, 1)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding)


class CausalConv3d(nn.Conv3d):
    """Convolution over (B, C, t, h, w) that sees only the present and the past."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, cache):
        if self.kernel_size[0] == 1:
            return conv3d(x, self)  # (B, C', t, h, w)
        if self not in cache and x.shape[2] == 1:
            # The first frame's past is zeros, so only the last temporal tap counts: a third of the work
            cache[self] = channels_last(F.pad(x, (0, 0, 0, 0, 1, 0)))  # (B, C, 2, h, w)
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return y[:, :, None]  # (B, C', 1, h, w)
        x = torch.cat([cache[self], x], dim=2) if self in cache else F.pad(x, (0, 0, 0, 0, 2, 0))
        cache[self] = x[:, :, -2:].clone()  # (B, C, 2, h, w); a view would keep all of x in memory
        return conv3d(x, self, self.padding)  # (B, C', t, h, w)


class ChannelNorm(nn.Module):
    """RMS norm over the channels of (B, C, ...): x / rms(x) * gamma."""

    def __init__(self, dim, ndim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * ndim))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-12)
        return (x * (x.shape[1] ** 0.5 / norm)).mul_(self.gamma)


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(c_in, 3), nn.SiLU(inplace=True), CausalConv3d(c_in, c_out, (3, 3, 3)),
            ChannelNorm(c_out, 3), nn.SiLU(inplace=True), nn.Identity(),  # dropout, in training
            CausalConv3d(c_out, c_out, (3, 3, 3)))
        self.shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x, cache):
        skip = x if self.shortcut is None else self.shortcut(x, cache)  # (B, C', t, h, w)
        return run_layers(self.residual, x, cache) + skip  # (B, C', t, h, w)


def to_frames(x):
    """(B, C, t, h, w) -> (Bt, C, h, w). For one video this is a view in the same memory format; flatten would
    lose the strides of channels-last if t = 1."""
    return x[0].transpose(0, 1) if len(x) == 1 else x.transpose(1, 2).flatten(0, 1)


def to_video(x, b):
    return x.unflatten(0, (b, -1)).transpose(1, 2)  # (Bt, C, h, w) -> (B, C, t, h, w)


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, dim):
        super().__init__()
        self.norm = ChannelNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        b, _, _, h, _ = x.shape
        y = self.to_qkv(self.norm(to_frames(x)))  # (Bt, 3C, h, w)
        y = rearrange(y, "n c h w -> n 1 (h w) c").contiguous()  # (Bt, 1, hw, 3C); fused kernels need this order
        q, k, v = y.chunk(3, dim=-1)  # (Bt, 1, hw, C) each
        y = F.scaled_dot_product_attention(q, k, v)  # (Bt, 1, hw, C)
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=h))  # (Bt, C, h, w)
        return x + to_video(y, b)  # (B, C, t, h, w)


class Downsample(nn.Module):
    """Halve height and width and, with time_conv, also time, except for the first frame."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, cache):
        x = to_video(self.resample(to_frames(x)), len(x))  # (B, C, t, h/2, w/2)
        if self.time_conv is None:
            return x
        past = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        if past is None:
            return x
        return conv3d(torch.cat([past, x], dim=2), self.time_conv)  # (B, C, t/2, h/2, w/2)


class Upsample(nn.Module):
    """Double height and width and, with time_conv, also time, except for the first frame."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"),
                                      nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x, cache):
        if self.time_conv is not None:
            if self in cache:  # time_conv starts at the second latent frame
                x = self.time_conv(x, cache)  # (B, 2C, t, h, w)
                x = channels_last(rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2))  # (B, C, 2t, h, w)
            cache[self] = True
        return to_video(self.resample(to_frames(x)), len(x))  # (B, C/2, 2t, 2h, 2w)


STATEFUL = CausalConv3d, ResidualBlock, Downsample, Upsample


def run_layers(layers, x, cache):
    """Apply layers in order; stateful ones take the cache too."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, STATEFUL) else layer(x)
    return x


def middle_layers(dim):
    return nn.Sequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def head_layers(dim, c_out):
    return nn.Sequential(ChannelNorm(dim, 3), nn.SiLU(inplace=True), CausalConv3d(dim, c_out, (3, 3, 3)))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, layers = cfg.dims[0], []
        self.conv1 = CausalConv3d(3, c, (3, 3, 3))
        for level, dim in enumerate(cfg.dims):
            for _ in range(cfg.num_res_blocks):
                layers.append(ResidualBlock(c, dim))
                c = dim
            if level < len(cfg.temporal_downsample):
                layers.append(Downsample(c, cfg.temporal_downsample[level]))
        self.downsamples = nn.Sequential(*layers)
        self.num_full = cfg.num_res_blocks + 1  # layers at full size; the last one halves it
        self.middle = middle_layers(c)
        self.head = head_layers(c, 2 * cfg.z_dim)

    def forward(self, x, cache):
        # Layers at full size need the most memory, so they take two frames at a time, with the same result
        small = [run_layers(self.downsamples[:self.num_full], self.conv1(frames, cache), cache)
                 for frames in x.split(2, dim=2)]
        x = torch.cat(small, dim=2)  # (B, C, t, h/2, w/2)
        x = run_layers(self.downsamples[self.num_full:], x, cache)  # (B, C', t/4, h/8, w/8)
        x = run_layers(self.middle, x, cache)
        return run_layers(self.head, x, cache)  # (B, 2 * 16, t/4, h/8, w/8)


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, layers = cfg.dims[-1], []
        self.conv1 = CausalConv3d(cfg.z_dim, c, (3, 3, 3))
        self.middle = middle_layers(c)
        for level, dim in reversed(list(enumerate(cfg.dims))):
            for _ in range(cfg.num_res_blocks + 1):
                layers.append(ResidualBlock(c, dim))
                c = dim
            if level > 0:
                layers.append(Upsample(c, cfg.temporal_downsample[level - 1]))
                c //= 2
        self.upsamples = nn.Sequential(*layers)
        self.num_small = len(layers) - cfg.num_res_blocks - 2  # layers before the last upsampling
        self.head = head_layers(c, 3)

    def begin(self, x, cache):
        """The layers at the size of the latents. Among them is the only one that sees a whole frame."""
        x = self.conv1(x, cache)  # (B, C', t, H, W)
        return run_layers(self.middle, x, cache)

    def upsample(self, x, cache):
        """The layers from there to pixels. They see only a neighborhood, so they also decode tiles."""
        x = run_layers(self.upsamples[:self.num_small], x, cache)  # (B, C, 4t, 4H, 4W)
        large = [run_layers(self.head, run_layers(self.upsamples[self.num_small:], frames, cache), cache)
                 for frames in x.split(2, dim=2)]  # two frames at a time, as in the encoder
        return torch.cat(large, dim=2)  # (B, 3, 4t, 8H, 8W)

    def forward(self, x, cache):
        return self.upsample(self.begin(x, cache), cache)


class WanVAE(nn.Module):
    """Videos (B, 3, F, h, w) in [-1, 1] <-> normalized latents (B, 16, T, H, W)."""

    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype; load_weights sets it
        self.encoder = Encoder(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, (1, 1, 1))
        self.decoder = Decoder(cfg)

    def encode(self, video):
        """Video (B, 3, F, h, w) in [-1, 1] -> normalized latents (B, 16, T, H, W) in float32: the mean of the
        posterior. Raises ValueError unless F = 4k + 1 and h and w are multiples of 8."""
        _, _, frames, h, w = video.shape
        if frames % 4 != 1 or h % 8 or w % 8:
            raise ValueError(f"WanVAE.encode: got {frames} frames of {h} x {w}, expected 4k + 1 frames with "
                             f"both sides multiples of 8; crop or resize the video")
        cache = {}
        moments = [self.conv1(self.encoder(x.to(self.dtype), cache), cache) for x in chunks(video, 4)]
        z = torch.cat(moments, dim=2)[:, :self.cfg.z_dim].float()  # (B, 16, T, H, W); the rest is log-variance
        mean, std = latent_statistics(video.device, self.cfg.z_dim)
        return (z - mean) / std

    def decode_chunks(self, latents, tile=None, ranks=Ranks()):
        """Yields the decoded video in chunks: (B, 3, 1, h, w) for the first latent frame, then (B, 3, 4, h, w).

        tile: None, or a number of latents, at least 2 * TILE_OVERLAP. Squares of that side are decoded one
        after another and assembled on the CPU, so device memory is that of one tile. Neighboring tiles overlap
        and are blended. Attention still sees whole frames, so pixels far from any overlap do not change.
        ranks: they share the tiles; every one must call this, and gets the whole video.
        """
        mean, std = latent_statistics(latents.device, self.cfg.z_dim)
        z, cache = (latents * std + mean).to(self.dtype), {}
        small = (self.decoder.begin(self.conv2(x, cache), cache) for x in chunks(z, 1))  # (B, C', 1, H, W) each
        if tile is None:
            for x in small:
                yield self.decoder.upsample(x, cache).float().clamp(-1, 1)
        else:
            yield from chunks(self.decode_tiles(list(small), tile, ranks).clamp(-1, 1), 4)

    def decode_tiles(self, small, tile, ranks):
        """What Decoder.begin gave for each latent frame -> the video (B, 3, F, h, w) on the CPU."""
        b, _, _, height, width = small[0].shape
        video = torch.zeros(b, 3, 4 * len(small) - 3, 8 * height, 8 * width)
        places = list(itertools.product(tiles(height, tile), tiles(width, tile)))
        for (top, bottom, rows), (left, right, columns) in places[ranks.rank::ranks.size]:
            weight, cache, start = rows[:, None] * columns, {}, 0
            for x in small:
                x = self.decoder.upsample(x[..., top:bottom, left:right], cache).float().cpu()
                stop = start + x.shape[2]
                place = video[:, :, start:stop, 8 * top:8 * bottom, 8 * left:8 * right]
                place += weight * x  # (B, 3, 1 or 4, 8 * tile, 8 * tile)
                start = stop
        return ranks.sum(video)

    def decode(self, latents):
        """Normalized latents (B, 16, T, H, W) -> video (B, 3, F, h, w) in [-1, 1], float32."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2)


def tiles(length, tile):
    """Cut `length` latents into overlapping tiles: [(start, stop, weight of each pixel (8 * tile,)), ...].

    A weight falls linearly towards a tile's edges, except at the edges of the frame. Weights add up to 1.
    """
    last = max(0, length - tile)
    starts = [*range(0, last, tile - TILE_OVERLAP), last]
    pixel, weights = (torch.arange(8 * length) + 0.5) / (8 * TILE_OVERLAP), []
    for start in starts:
        rise = pixel - start / TILE_OVERLAP if start > 0 else torch.ones_like(pixel)
        fall = (start + tile) / TILE_OVERLAP - pixel if start < last else torch.ones_like(pixel)
        weights.append(rise.minimum(fall).clamp(0, 1))
    total = sum(weights)
    return [(start, min(start + tile, length), (weight / total)[8 * start:8 * (start + tile)])
            for start, weight in zip(starts, weights)]


def latent_statistics(device, z_dim):
    """Mean and standard deviation of each latent channel, (1, z_dim, 1, 1, 1) each."""
    return torch.tensor([LATENT_MEAN, LATENT_STD], device=device)[:, None, :z_dim, None, None, None]


def chunks(x, size):
    """Cut (B, C, t, h, w) in time: the first frame alone, then pieces of `size` frames."""
    return [x[:, :, :1], *(x[:, :, 1:].split(size, dim=2) if x.shape[2] > 1 else ())]


# ----------------------------------------------------------------------------------------------------
# UMT5: the text encoder
# ----------------------------------------------------------------------------------------------------
#
# T5's encoder (https://arxiv.org/abs/1910.10683) with a gated feed-forward; UMT5
# (https://arxiv.org/abs/2304.09151) gives every block a relative position bias of its own.

@dataclass(frozen=True)
class UMT5Config:
    vocab: int = 256384
    dim: int = 4096
    ffn_dim: int = 10240
    num_blocks: int = 24
    heads: int = 64
    inner: int = 4096  # heads * head width
    buckets: int = 32


def relative_buckets(length, buckets, device):
    """(L, L): the bucket of each key's distance from each query.

    Half of the buckets are for keys after the query. Within each half, one half is for exact distances and the
    other grows logarithmically up to a distance of 128.
    """
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]  # (L, L)
    half = buckets // 2
    exact = half // 2
    far = (distance.abs().clamp(min=1).float() / exact).log() / math.log(128 / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return (distance > 0) * half + torch.where(distance.abs() < exact, distance.abs(), far)


class T5Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.inner // cfg.heads
        self.q, self.k, self.v = (nn.Linear(cfg.dim, cfg.inner, bias=False) for _ in range(3))
        self.o = nn.Linear(cfg.inner, cfg.dim, bias=False)

    def forward(self, x, bias):
        q, k, v = (split_heads(y, self.head_dim) for y in project(x, self.q, self.k, self.v))  # (B, heads, L, d)
        # No division by sqrt(d): T5's initialization of q contains it
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # (B, heads, L, d)
        return self.o(join_heads(y))  # (B, L, D)


class T5FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.fc2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))  # (B, L, D)


class T5Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = RMSNorm(cfg.dim)
        self.attn = T5Attention(cfg)
        self.norm2 = RMSNorm(cfg.dim)
        self.ffn = T5FeedForward(cfg)
        table = normal(cfg.buckets, cfg.heads, std=(2 * cfg.buckets * cfg.heads) ** -0.5)
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding.from_pretrained(table, freeze=False)})

    def forward(self, x, buckets, mask):
        table = self.pos_embedding["embedding"].weight.t().contiguous()  # (heads, buckets)
        bias = table.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)  # (heads, L, L)
        bias = bias + mask  # (B, heads, L, L), contiguous, as fused attention needs it
        x = x + self.attn(self.norm1(x), bias.to(x.dtype))  # (B, L, D)
        return x + self.ffn(self.norm2(x))  # (B, L, D)


class UMT5Encoder(nn.Module):
    def __init__(self, cfg=UMT5Config()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype; load_weights sets it
        self.token_embedding = nn.Embedding.from_pretrained(normal(cfg.vocab, cfg.dim), freeze=False)
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.num_blocks))
        self.norm = RMSNorm(cfg.dim)

    def forward(self, ids, mask):
        """Token ids (B, L) and mask (B, L), 1 for the prompt and 0 for padding -> features (B, L, D), zero
        where the mask is 0."""
        table = self.token_embedding  # 2 GB at full size, of which a prompt needs a few rows: stays on the CPU
        x = table(ids.to(table.weight.device)).to(ids.device, self.dtype)  # (B, L, D)
        buckets = relative_buckets(ids.shape[1], self.cfg.buckets, ids.device)  # (L, L)
        hide = torch.zeros(mask.shape, device=ids.device).masked_fill(mask == 0, -math.inf)  # (B, L)
        hide = hide[:, None, None]  # (B, 1, 1, L): the same for every head and query
        for block in self.blocks:
            x = block(x, buckets, hide)  # (B, L, D)
        return self.norm(x) * (mask != 0)[..., None]


# ----------------------------------------------------------------------------------------------------
# CLIP: the image tower
# ----------------------------------------------------------------------------------------------------
#
# ViT-H/14 of CLIP (https://arxiv.org/abs/2103.00020), as OpenCLIP trained it with XLM-RoBERTa.

@dataclass(frozen=True)
class CLIPConfig:
    dim: int = 1280
    ffn_dim: int = 5120
    num_blocks: int = 31  # the file has 32; Wan uses the output of the second-to-last
    head_dim: int = 80
    patch: int = 14
    tokens: int = 257  # CLS and 16 x 16 patches


class CLIPAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.to_qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)  # (B, I, D) each
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))  # (B, heads, I, d) each
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (B, I, D)


class CLIPBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.attn = CLIPAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.dim)
        self.mlp = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU(), nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x, dtype):
        x = x + self.attn(self.norm1(x).to(dtype))  # (B, I, D)
        return x + self.mlp(self.norm2(x).to(dtype))  # (B, I, D)


class CLIPVision(nn.Module):
    def __init__(self, cfg=CLIPConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype of the Linears; load_weights sets it
        self.image_size = cfg.patch * math.isqrt(cfg.tokens - 1)  # 224 pixels on a side
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch, bias=False)
        self.cls_embedding = normal(1, 1, cfg.dim, std=cfg.dim ** -0.5)
        self.pos_embedding = normal(1, cfg.tokens, cfg.dim, std=cfg.dim ** -0.5)
        self.pre_norm = nn.LayerNorm(cfg.dim)
        self.transformer = nn.ModuleList(CLIPBlock(cfg) for _ in range(cfg.num_blocks))

    def forward(self, pixels):
        """Normalized pixels (B, 3, 224, 224) -> tokens (B, I, D), with no norm after the last block."""
        x = self.patch_embedding(pixels.float()).flatten(2).transpose(1, 2)  # (B, I - 1, D)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], dim=1)  # (B, I, D)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer:
            x = block(x, self.dtype)  # (B, I, D)
        return x


# ----------------------------------------------------------------------------------------------------
# IFNet: the frame between two frames
# ----------------------------------------------------------------------------------------------------
#
# RIFE (https://arxiv.org/abs/2011.06294) in the layout of versions 4.25 and 4.26. For every pixel of the new
# frame, a flow points to the same thing in a and in b; both frames are warped along it and mixed by a mask.
# Five blocks refine flow and mask from coarse to fine, each from the frames as warped so far.
# Only convolutions run in the compute dtype: bfloat16 positions would be off by whole pixels.

IFNET_SCALES = (16, 8, 4, 2, 1)  # each block sees the frames reduced by this factor


@dataclass(frozen=True)
class IFNetConfig:
    dims: tuple = (192, 128, 96, 64, 32)  # channels of each block
    num_convs: int = 8  # residual convolutions per block
    encoder: int = 16  # channels inside the frame encoder
    features: int = 4  # channels that the frame encoder returns
    hidden: int = 8  # channels that a block passes to the next


def warp(x, flow):
    """Sample x (B, C, h, w) where flow (B, 2, h, w) points: pixels to the right, pixels down. Positions outside
    take the border's value."""
    h, w = x.shape[2:]
    across, down = (torch.linspace(-1, 1, n, device=x.device) for n in (w, h))
    across = across + flow[:, 0] * (2 / (w - 1))  # (B, h, w)
    down = down[:, None] + flow[:, 1] * (2 / (h - 1))  # (B, h, w)
    grid = torch.stack([across, down], dim=-1)  # (B, h, w, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=True)  # (B, C, h, w)


class FrameEncoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cnn0 = nn.Conv2d(3, cfg.encoder, 3, stride=2, padding=1)
        self.cnn1 = nn.Conv2d(cfg.encoder, cfg.encoder, 3, padding=1)
        self.cnn2 = nn.Conv2d(cfg.encoder, cfg.encoder, 3, padding=1)
        self.cnn3 = nn.ConvTranspose2d(cfg.encoder, cfg.features, 4, stride=2, padding=1)

    def forward(self, x):
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            x = F.leaky_relu(layer(x), 0.2)  # (B, C, h/2, w/2)
        return self.cnn3(x)  # (B, features, h, w)


class ResConv(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.beta = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return F.leaky_relu(torch.addcmul(x, self.conv(x), self.beta.to(x.dtype)), 0.2)


class IFBlock(nn.Module):
    def __init__(self, c_in, dim, cfg):
        super().__init__()
        self.conv0 = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(c, c_out, 3, stride=2, padding=1), nn.LeakyReLU(0.2))
            for c, c_out in ((c_in, dim // 2), (dim // 2, dim))))
        self.convblock = nn.Sequential(*(ResConv(dim) for _ in range(cfg.num_convs)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(dim, 4 * (5 + cfg.hidden), 4, stride=2, padding=1),
                                      nn.PixelShuffle(2))

    def forward(self, x, scale, dtype):
        x = F.interpolate(x, scale_factor=1 / scale, mode="bilinear").to(dtype)  # (B, C, h/s, w/s)
        x = self.convblock(self.conv0(x))  # (B, D, h/4s, w/4s)
        x = self.lastconv(x).float()  # (B, 5 + hidden, h/s, w/s)
        return F.interpolate(x, scale_factor=scale, mode="bilinear")  # (B, 5 + hidden, h, w)


class IFNet(nn.Module):
    """Predicts the frame between two frames."""

    def __init__(self, cfg=IFNetConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype of the convolutions; load_weights sets it
        self.encode = FrameEncoder(cfg)
        frames = 2 * (3 + cfg.features) + 1  # both frames with their features, and the time
        before = 4 + 1 + cfg.hidden  # from the block before: flow, mask, hidden
        for i, dim in enumerate(cfg.dims):
            self.add_module(f"block{i}", IFBlock(frames + before if i else frames, dim, cfg))

    def forward(self, a, b, t=0.5):
        """Frames a (at time 0) and b (at time 1), (B, 3, h, w) in [0, 1] -> the frame at time t, (B, 3, h, w) in
        [0, 1], float32. Raises ValueError for frames of other or different shapes."""
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3:
            raise ValueError(f"IFNet: got frames {tuple(a.shape)} and {tuple(b.shape)}, expected both "
                             f"(B, 3, h, w) of one size; resize one to the size of the other")
        h, w = a.shape[2:]
        x = torch.cat([a, b]).float().clamp(0, 1)  # (2B, 3, h, w)
        # The coarsest block sees 1/16 and halves it twice. RIFE pads with black, which shows at the edges
        x = F.pad(x, (0, -w % 64, 0, -h % 64), mode="replicate")  # (2B, 3, h', w')
        x = torch.cat([x, self.encode(x.to(self.dtype)).float()], dim=1)  # (2B, 3 + features, h', w')
        time = x.new_full((len(a), 1, *x.shape[2:]), t)  # (B, 1, h', w')
        warped, rest, flow = x, [], 0
        for i, scale in enumerate(IFNET_SCALES):
            known = [*warped[:, :3].chunk(2), *warped[:, 3:].chunk(2), time, *rest]  # (B, ., h', w') each
            out = self.get_submodule(f"block{i}")(torch.cat(known, dim=1), scale, self.dtype)
            flow = flow + out[:, :4] * scale  # (B, 4, h', w'): right and down in a, then in b
            warped = warp(x, torch.cat(flow.chunk(2, dim=1)))  # (2B, 3 + features, h', w')
            rest = [out[:, 4:], flow / (scale / 2)]  # the flow in pixels of the next block's size
        a, b = warped[:, :3].chunk(2)  # (B, 3, h', w') each
        return torch.lerp(b, a, out[:, 4:5].sigmoid())[..., :h, :w].clamp(0, 1)  # (B, 3, h, w)


# ----------------------------------------------------------------------------------------------------
# Reading files
# ----------------------------------------------------------------------------------------------------

PICKLES = ".pth", ".pkl"  # written by torch.save; they have no header
DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


@contextmanager
def reading(path, kind):
    """A context in which libraries read a file. The one place that maps whatever they raise for a damaged file to
    ValueError, in one line. Only regular files are read: a FIFO or a device may never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a folder, pipe or device: only regular files are read")
        open(path, "rb").close()  # safetensors reports a missing permission as a missing file
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
    except Exception as error:  # torch interprets the bytes of a pickle, so a damaged one can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path}: not a {kind} ({reason}); download it again, or name another file") from None


def shards(path):
    """The files that a path stands for: the file itself, the shards listed by an index .json, or a folder's.

    Raises FileNotFoundError for a missing path, and ValueError for a folder that does not hold exactly one
    model or an index without weight_map. Whether the listed shards exist is not checked.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise ValueError(f"{path}: got {len(indices)} models, expected one; "
                             f"name one of {', '.join(map(str, indices))}")
        files = read_index(indices[0]) if indices else sorted(path.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path}: got no .safetensors file, expected a model; name its file or folder")
        return files
    return read_index(path) if path.suffix == ".json" else [path]


def read_index(path):
    """The shards that an index .json lists."""
    with reading(path, "shard index"):
        content = json.loads(path.read_text())
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not files or not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path}: got no weight_map, expected one from tensor names to file names; "
                         f"name the model's .safetensors.index.json or its folder")
    return [path.parent / name for name in sorted(set(files.values()))]


def read_header(path):
    """A safetensors file's metadata {str: str} and {tensor name: (dtype name, shape)}; reads no tensor. Raises
    FileNotFoundError or another OSError, and ValueError for a file that is not in safetensors format."""
    with reading(path, "safetensors file"), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        stored = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        return file.metadata() or {}, stored


def read_pickle(path):
    """The tensors of a file written by torch.save, memory-mapped. Runs no code from the file (weights only)."""
    with reading(path, "file of torch weights"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    entries = tensors.items() if isinstance(tensors, dict) else [(f"a {type(tensors).__name__}", None)]
    for name, tensor in entries:
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not (isinstance(name, str) and plain and not tensor.is_meta and not tensor.is_quantized):
            raise ValueError(f"{path}: {name}: got {type(tensor).__name__}, expected a dict from names to plain "
                             f"tensors; save the model's state_dict")
    return tensors


def read_safetensors(path):
    """The tensors of a safetensors file, memory-mapped, and its metadata."""
    with reading(path, "safetensors file"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_tensors(path):
    """A checkpoint's tensors by bare name, memory-mapped, and its metadata. path: a .safetensors, .pth or .pkl
    file, an index .json, or a folder of shards. A layer whose format is only in the metadata gets a comfy_quant
    tensor."""
    tensors, markers, metadata = {}, {}, {}
    for file in shards(path):
        stored, own = (read_pickle(file), {}) if file.suffix in PICKLES else read_safetensors(file)
        for name, tensor in stored.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{file}: {name[:200]}: got {tensor.dtype}, expected a dtype such as "
                                 f"torch.bfloat16; convert the file")
        tensors |= {bare_name(name): tensor for name, tensor in stored.items()}
        markers |= header_markers(own, file)
        metadata |= own
    add_markers(tensors, markers, path)
    if is_lightx2v(tensors) and (marked := [name for name in tensors if name.endswith(".comfy_quant")]):
        raise ValueError(f"{path}: got layers in LightX2V's NVFP4 layout and {min(marked)[:200]}, expected one "
                         f"layout; the file mixes two: download it again")
    return tensors, metadata


def is_lightx2v(names):
    """Whether a file with these tensors is in LightX2V's NVFP4 layout (quant.from_lightx2v)."""
    return any(name.endswith((".input_absmax", ".input_global_scale")) for name in names)


def header_markers(metadata, path):
    """{marker's name: marker} for the layers that a file's header lists in _quantization_metadata."""
    text = metadata.get("_quantization_metadata", "{}")
    try:
        layers = json.loads(text).get("layers", {})
        return {f"{bare_name(layer)}.comfy_quant": write_marker(info) for layer, info in layers.items()}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f'{path}: _quantization_metadata in its header: got {text[:100]!r}, expected JSON with '
                         f'"layers": {{NAME: {{"format": ...}}}}; download the file again') from None


def add_markers(tensors, markers, path):
    """Give layers without a comfy_quant tensor the header's marker. Raises ValueError if a layer has both and
    they disagree, because programs differ in which one they follow."""
    def meaning(marker, where):
        info = read_marker(marker, where)
        full = " at full precision" if info.get("full_precision_matrix_mult") else ""
        return info["format"] + full + (" in two passes" if info.get("two_pass") else "")

    for name, marker in markers.items():
        if name.removesuffix("comfy_quant") + "weight" in tensors:
            header = meaning(marker, f"{path}: {name} in the header's _quantization_metadata")
            stored = meaning(tensors.setdefault(name, marker), f"{path}: {name}")
            if stored != header:
                raise ValueError(f"{path}: {name}: got {stored} in the tensor and {header} in the header's "
                                 f"_quantization_metadata, expected the same in both; convert the model again")


def tensor_names(path):
    """The bare names of a checkpoint's tensors, without reading them. Raises as read_tensors does."""
    stored = (read_pickle(file) if file.suffix in PICKLES else read_header(file)[1] for file in shards(path))
    return {bare_name(name) for names in stored for name in names}


# ----------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------

# Added by ComfyUI, diffusers (not before CLIP's own transformer.0.), OpenCLIP, DataParallel and PEFT
PREFIXES = re.compile(
    r"^((model\.)?diffusion_model\.|transformer\.(?!\d)|visual\.|module\.|base_model\.model\.)+")

# Patterns that turn the names of other libraries into the official ones, applied in order. ComfyUI's text and
# image encoders use the names of transformers.
DIFFUSERS_DIT = (
    (r"^condition_embedder\.time_proj\b", "time_projection.1"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\b", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\b", r"\1_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1\b", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\b", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\b", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2\b", "img_emb.proj.4"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])\b", r"_attn.\1"), (r"_attn\.to_out\.0\b", "_attn.o"),
    (r"_attn\.add_([kv])_proj\b", r"_attn.\1_img"), (r"\bnorm_added_k\b", "norm_k_img"),
    (r"\.ffn\.net\.0\.proj\b", ".ffn.0"), (r"\.ffn\.net\.2\b", ".ffn.2"),
    (r"^(blocks\.\d+)\.norm2\b", r"\1.norm3"),  # diffusers numbers the norms in the order of use
    (r"^scale_shift_table$", "head.modulation"), (r"\bscale_shift_table$", "modulation"),
    (r"^proj_out\b", "head.head"))
DIFFUSERS_VAE = (
    (r"^quant_conv\b", "conv1"), (r"^post_quant_conv\b", "conv2"),
    (r"coder\.conv_in\b", "coder.conv1"), (r"\.down_blocks\.", ".downsamples."),
    (r"coder\.norm_out\b", "coder.head.0"), (r"coder\.conv_out\b", "coder.head.2"),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.norm1\.gamma$", ".residual.0.gamma"), (r"(\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.gamma$", ".residual.3.gamma"), (r"(\.\d+)\.conv2\.", r"\1.residual.6."))
TRANSFORMERS_UMT5 = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."), (r"^encoder\.block\.(\d+)\.", r"blocks.\1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."), (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."), (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."))
TRANSFORMERS_CLIP = (
    (r"^vision_model\.", ""), (r"^embeddings\.class_embedding$", "cls_embedding"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embedding"), (r"^embeddings\.", ""),
    (r"^pre_layrnorm\.", "pre_norm."), (r"^post_layernorm\.", "post_norm."),  # transformers' spelling
    (r"^encoder\.layers\.(\d+)\.", r"transformer.\1."), (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.2."))


def bare_name(name):
    """A tensor's name without the prefixes that programs add."""
    return PREFIXES.sub("", name)


def official_name(name, table):
    """A bare name of a tensor or layer, official or as in the table -> the official name."""
    for pattern, official in table:
        name = re.sub(pattern, official, name)
    return name


def official_dit_name(name):
    return official_name(name, DIFFUSERS_DIT)


def official_vae_name(name, blocks):
    """The decoder's layers have one number in the official names. In diffusers' they are numbered by level and
    kind: `blocks` residual blocks, then the upsampler."""
    def flat(match):
        level, kind, i = int(match[1]), match[2], int(match[3])
        return f".upsamples.{level * (blocks + 1) + (i if kind == 'resnets' else blocks)}."
    return official_name(re.sub(r"\.up_blocks\.([0-9]{1,4})\.(\w+)\.([0-9]{1,4})\.", flat, name), DIFFUSERS_VAE)


def count(tensors, prefix):
    """The number of numbered modules under a prefix: 40 for "blocks." if there are blocks.0 to blocks.39.

    Numbers after a gap do not count: a tensor named blocks.999999999 must not make a billion blocks.
    """
    numbers = {name[len(prefix):].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return next(i for i in itertools.count() if str(i) not in numbers)


# ----------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------

CONVOLUTIONS = nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d


def build(network, config, tensors, path):
    """The network on the meta device, where it takes no memory, with sizes read from the tensors.

    config(shape) gives the network's config. shape(name, *sizes) is the shape of a tensor (of a quantized weight,
    the shape it stands for), after a check against the sizes that the network fixes, None elsewhere.
    """
    advice = f"check that the file is a complete {network.__name__} checkpoint of Wan2.1"

    def shape(name, *sizes):
        if name not in tensors:
            raise ValueError(f"{path}: {name}: got nothing, expected a tensor; {advice}")
        got = stored_shape(tensors, name, path)
        if len(got) != len(sizes) or any(n == 0 or size not in (None, n) for n, size in zip(got, sizes)):
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"{path}: {name}: got shape {got}, expected ({expected}), none of them 0; {advice}")
        return got

    with torch.device("meta"):
        return network(config(shape))


def stored_shape(tensors, name, path):
    """A tensor's shape; of a quantized weight, that of the weight before it was quantized."""
    shape, layer = tuple(tensors[name].shape), name.removesuffix(".weight")
    if tensors[name].dtype == torch.uint8 and shape:
        shape = *shape[:-1], 2 * shape[-1]  # two codes in a byte
    marker = f"{layer}.comfy_quant"
    if layer == name or marker not in tensors:
        return shape
    return tuple(read_marker(tensors[marker], f"{path}: {marker}").get("orig_shape", shape))


def check_size(path, name, got, ok, expected):
    """Refuse a size with which the network could be built but not run."""
    if not ok:
        raise ValueError(f"{path}: {name}: got {got}, expected {expected}; check that the file is for Wan2.1")


def load_weights(model, tensors, path, device, dtype=None, float32=(), stream=False, mode=None, activations=None):
    """Give a model on the meta device its tensors. Returns it in eval mode; path is for error messages.

    Linears become QuantLinears that keep the tensors as stored and compute in `dtype`, as convolutions do, or
    in float32 if their name begins with one of `float32`. All other parameters become float32. Every tensor
    moves to `device` once, except the token table and, with stream, the blocks, which stay in CPU memory.
    mode and activations are those of load_dit. Raises ValueError for missing and unexpected tensors and for
    wrong shapes.
    """
    dtype = dtype or default_dtype(device)
    modules, linears, state = dict(model.named_modules()), {}, {}
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        module = modules.get(layer)
        stays = layer == "token_embedding" or suffix == "comfy_quant" or (stream and name.startswith("blocks."))
        tensor = tensor if stays else tensor.to(device)
        if isinstance(module, nn.Linear):
            linears.setdefault(layer, {})[suffix] = tensor
        elif name in parameters:
            check_parameter(f"{path}: {name}", tensor, parameters[name])
            half = isinstance(module, CONVOLUTIONS) and not name.startswith(float32)
            state[name] = tensor if layer == "token_embedding" else tensor.to(dtype if half else torch.float32)
        else:
            state[name] = tensor  # assign_state reports it
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            compute = torch.float32 if name.startswith(float32) else dtype
            layer = QuantLinear.from_tensors(f"{path}: {name}", linears.pop(name, {}), module.in_features,
                                             module.out_features, bias=module.bias is not None,
                                             compute_dtype=compute, mode=mode or default_mode(device),
                                             activations=activations)
            model.set_submodule(name, layer)
            state |= layer.state_dict(prefix=f"{name}.")
    assign_state(model, state, path)
    model.dtype = dtype
    return model.eval()


def check_parameter(where, tensor, parameter):
    if tensor.shape != parameter.shape:
        raise ValueError(f"{where}: got shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}; "
                         f"check that all tensors are of one model size")
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: got {tensor.dtype}, expected a float dtype; only Linears may be quantized")


def assign_state(model, state, path):
    """load_state_dict, with error messages that name the file, the tensor, what was got and what was expected."""
    missing, unexpected = model.requires_grad_(False).load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        name, *others = sorted(missing or unexpected)
        problem = (f"got nothing, expected shape {tuple(model.get_parameter(name).shape)}" if missing
                   else "got a tensor that no layer takes, expected none")
        more = f" and {len(others)} more" if others else ""
        name = name if missing else repr(name)[1:-1][:200]  # without the line breaks that it may hold
        raise ValueError(f"{path}: {name}{more}: {problem}; check that the file is a complete "
                         f"{type(model).__name__} checkpoint, with no gap in its layers' numbers")


def head_width(dim, metadata, default, path):
    """The head width: head_dim of the file's metadata, or the default."""
    text = metadata.get("head_dim", str(default))
    head_dim = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if head_dim == 0 or head_dim % 2 or dim % head_dim:
        raise ValueError(f"{path}: head width: got {text[:50]}, expected an even divisor of the model's width "
                         f"{dim}; set head_dim in the file's metadata")
    return head_dim


def load_dit(path, device="cpu", dtype: torch.dtype | None = None, loras=(), stream: bool = False,
             mode: str | None = None, activations: str | None = None) -> WanDiT:
    """The diffusion transformer of a plain or quantized checkpoint, in eval mode.

    path    as for read_tensors; official, ComfyUI's and diffusers' names are read
    dtype   compute dtype of the Linears: by default quant.default_dtype(device). Weights stay as
            stored and, on a CPU, memory-mapped.
    loras   (file, strength) pairs; the model's attribute `loras` says in a line for each what was used
    stream  keep the blocks in CPU memory, for sample.StreamedBlocks
    mode, activations   of the quantized Linears, as for QuantLinear.from_tensors; the default mode is
            quant.default_mode(device)

    Raises FileNotFoundError; ValueError for missing or unexpected tensors, wrong shapes, unknown formats, a
    LoRA that does not fit, and a checkpoint that needs a LoRA that is not given.
    """
    tensors, metadata = read_tensors(path)
    check_loras(path, metadata, loras)
    tensors = {official_dit_name(name): tensor for name, tensor in tensors.items()}
    dit = dit_from_tensors(tensors, metadata, path, device, dtype, stream, mode, activations)
    dit.loras = [attach_lora(dit, file, strength) for file, strength in loras]
    return dit


def dit_from_tensors(tensors, metadata, path, device="cpu", dtype=None, stream=False, mode=None,
                     activations=None):
    """load_dit from tensors by official name and the file's metadata; path is for error messages."""
    def config(shape):
        dim, in_dim = shape("patch_embedding.weight", None, 36, 1, 2, 2)[:2]
        freq_dim = shape("time_embedding.0.weight", dim, None)[1]
        check_size(path, "time_embedding.0.weight: in_features", freq_dim, freq_dim % 2 == 0, "an even number")
        return DiTConfig(dim=dim, in_dim=in_dim, out_dim=shape("head.head.bias", 64)[0] // 4,
                         ffn_dim=shape("blocks.0.ffn.0.bias", None)[0], num_blocks=count(tensors, "blocks."),
                         head_dim=head_width(dim, metadata, 128, path),
                         text_dim=shape("text_embedding.0.weight", dim, None)[1],
                         image_dim=shape("img_emb.proj.0.weight", None)[0],
                         freq_dim=freq_dim)

    dit = load_weights(build(WanDiT, config, tensors, path), tensors, path, device, dtype,
                       float32=("patch_embedding", "time_", "img_emb", "head"), stream=stream, mode=mode,
                       activations=activations)
    kept = metadata.get("bf16_attention", "")  # the blocks that convert.py found too sensitive for E4M3
    if not re.fullmatch("([0-9]{1,4}(,[0-9]{1,4})*)?", kept):
        raise ValueError(f"{path}: bf16_attention in its metadata: got {kept[:50]!r}, expected the numbers of "
                         f"blocks, such as 0,39; remove it")
    dit.bf16_attention = [int(number) for number in kept.split(",") if number]
    return dit


def load_vae(path, device="cpu", dtype: torch.dtype | None = None) -> WanVAE:
    """The video autoencoder, in eval mode. dtype is its compute dtype; arguments and errors as for load_dit."""
    tensors, _ = read_tensors(path)
    blocks = count(tensors, "decoder.up_blocks.0.resnets.")  # per level, under diffusers' names
    tensors = {official_vae_name(name, blocks): tensor for name, tensor in tensors.items()}

    def config(shape):
        num_layers, dims, temporal = count(tensors, "encoder.downsamples."), [], []
        for i in range(num_layers):
            layer = f"encoder.downsamples.{i}."
            if layer + "resample.1.weight" in tensors:  # the last layer of a level
                dims.append(shape(layer + "resample.1.bias", None)[0])
                temporal.append(layer + "time_conv.weight" in tensors)
        return VAEConfig(dims=(*dims, shape("encoder.head.0.gamma", None, 1, 1, 1)[0]),
                         num_res_blocks=(num_layers - len(dims)) // (len(dims) + 1),
                         temporal_downsample=tuple(temporal), z_dim=shape("conv2.bias", 16)[0])

    return load_weights(build(WanVAE, config, tensors, path), tensors, path, device, dtype)


def load_umt5(path, device="cpu", dtype: torch.dtype | None = None, stream: bool = False) -> UMT5Encoder:
    """The text encoder, in eval mode. Arguments and errors as for load_dit; official, ComfyUI's and
    transformers' names are read. Where the default dtype is float16, the default here is float32: T5's
    activations exceed float16's range."""
    if dtype is None and default_dtype(device) == torch.float16:
        dtype = torch.float32
    tensors, _ = read_tensors(path)
    tensors = {official_name(name, TRANSFORMERS_UMT5): tensor for name, tensor in tensors.items()
               if name not in ("spiece_model", "scaled_fp8")}  # ComfyUI's tokenizer and its mark of FP8 files

    def config(shape):
        vocab, dim = shape("token_embedding.weight", None, None)
        buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", None, None)
        inner = shape("blocks.0.attn.q.weight", None, dim)[0]
        check_size(path, "blocks.0.pos_embedding.embedding.weight: buckets", buckets, buckets % 4 == 0,
                   "a multiple of 4")
        check_size(path, "blocks.0.attn.q.weight: out_features", inner, inner % heads == 0,
                   f"a multiple of the {heads} heads")
        return UMT5Config(vocab=vocab, dim=dim, ffn_dim=shape("blocks.0.ffn.fc1.weight", None, dim)[0],
                          num_blocks=count(tensors, "blocks."), heads=heads, buckets=buckets, inner=inner)

    return load_weights(build(UMT5Encoder, config, tensors, path), tensors, path, device, dtype, stream=stream)


def load_clip(path, device="cpu", dtype: torch.dtype | None = None) -> CLIPVision:
    """The image tower, in eval mode, without its last block, which Wan does not use. Arguments and errors as
    for load_dit; official, ComfyUI's and transformers' names are read."""
    tensors, metadata = read_tensors(path)
    tensors = {official_name(name, TRANSFORMERS_CLIP): tensor for name, tensor in tensors.items()}
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", part) for part in (".q_proj.", ".k_proj.", ".v_proj.")]
        if all(part in tensors for part in parts):
            tensors[name.replace(".self_attn.q_proj.", ".attn.to_qkv.")] = merge(
                [tensors.pop(part) for part in parts], name, path)
    for name in tensors.keys() & {"cls_embedding", "pos_embedding"}:  # stored by transformers as (D,), (I, D)
        tensors[name] = tensors[name][(None,) * (3 - tensors[name].dim())]  # (1, 1 or I, D)
    last = count(tensors, "transformer.") - 1
    unused = (f"transformer.{last}.", "post_norm.", "head", "textual.", "log_scale", "visual_projection.",
              "position_ids")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}

    def config(shape):
        dim, _, patch, _ = shape("patch_embedding.weight", None, 3, None, None)
        tokens = shape("pos_embedding", 1, None, dim)[1]
        check_size(path, "pos_embedding: tokens", tokens, math.isqrt(tokens - 1) ** 2 == tokens - 1 > 0,
                   "1 more than a square")
        return CLIPConfig(dim=dim, ffn_dim=shape("transformer.0.mlp.0.bias", None)[0], num_blocks=last,
                          head_dim=head_width(dim, metadata, 80, path), patch=patch, tokens=tokens)

    return load_weights(build(CLIPVision, config, tensors, path), tensors, path, device, dtype,
                        float32=("patch_embedding",))


def merge(parts, name, path):
    """The weights or biases of q, k and v in one tensor."""
    kinds = {(part.dtype, tuple(part.shape)) for part in parts}
    (dtype, shape), *others = kinds
    if others or not shape or not dtype.is_floating_point or not name.endswith((".weight", ".bias")):
        raise ValueError(f"{path}: {name}: got q, k and v of {dtype} {shape}, expected one shape, not quantized; "
                         f"use the image tower in bfloat16")
    return torch.cat(parts)


def load_ifnet(path, device="cpu", dtype: torch.dtype | None = None) -> IFNet:
    """The frame interpolator, in eval mode, from RIFE's flownet.pkl of version 4.25 or 4.26 (the lite variants
    have other scales). dtype is its convolutions' compute dtype; arguments and errors as for load_dit."""
    tensors, _ = read_tensors(path)
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.startswith(("teacher.", "caltime."))}  # used in training only

    def config(shape):
        outputs = shape("block0.lastconv.0.bias", None)[0]
        check_size(path, "block0.lastconv.0.bias", outputs, outputs >= 4 * 5, "at least 20 channels")
        dims = (shape(f"block{i}.lastconv.0.weight", None, None, 4, 4)[0] for i in range(5))
        return IFNetConfig(dims=tuple(dims), num_convs=count(tensors, "block0.convblock."),
                           encoder=shape("encode.cnn0.bias", None)[0],
                           features=shape("encode.cnn3.bias", None)[0], hidden=outputs // 4 - 5)

    return load_weights(build(IFNet, config, tensors, path), tensors, path, device, dtype)


# ----------------------------------------------------------------------------------------------------
# LoRA
# ----------------------------------------------------------------------------------------------------
#
# A LoRA file (https://arxiv.org/abs/2106.09685) holds, for some layers, factors: W + strength * alpha / r *
# up @ down, with alpha = r if absent. It may also hold whole differences to weights, biases and modulations.

LORA_PARTS = {"lora_up": "up", "lora_B": "up", "lora_down": "down", "lora_A": "down", "alpha": "alpha",
              "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}  # name's ending -> part


def parse_lora(text):
    """"a.safetensors:0.8" -> (path, strength); without a strength, 1. A file's name may have colons: only a
    number after the last colon is a strength. Raises ValueError if it is infinite."""
    path, _, number = text.rpartition(":")
    try:
        strength = float(number) if path else math.nan
    except ValueError:
        strength = math.nan
    if math.isinf(strength):
        raise ValueError(f"{text}: expected a finite strength, such as 0.8")
    return (Path(text), 1.0) if math.isnan(strength) else (Path(path), strength)


def read_lora(path):
    """A LoRA file -> {official layer name: {part of LORA_PARTS: tensor}}, memory-mapped. Raises ValueError for a
    tensor that is none of these parts."""
    layers = {}
    for name, tensor in read_tensors(path)[0].items():
        layer, _, ending = re.sub(r"(\.default)?\.weight$", "", name).rpartition(".")
        if ending not in LORA_PARTS:
            endings = ", ".join(LORA_PARTS)
            raise ValueError(f"{path}: {repr(name)[1:-1][:200]}: got a tensor that is no part of a LoRA, "
                             f"expected a name that ends in one of {endings}; a whole model is not a LoRA")
        layers.setdefault(official_dit_name(layer), {})[LORA_PARTS[ending]] = tensor
    return layers


def lora_scale(parts, where):
    """alpha / r of a layer's factors up (M, r) and down (r, K); those of a convolution have more dimensions."""
    if not {"up", "down"} <= parts.keys():
        got = " and ".join(part for part in ("up", "down", "alpha") if part in parts)
        raise ValueError(f"{where}: got {got} alone, expected lora_up and lora_down, or lora_B and lora_A; "
                         f"download the LoRA again")
    up, down = parts["up"], parts["down"]
    if up.dim() != down.dim() or up.dim() < 2 or up.shape[1] != down.shape[0] or 0 in up.shape + down.shape:
        raise ValueError(f"{where}: got up {tuple(up.shape)} and down {tuple(down.shape)}, expected (M, r) and "
                         f"(r, K); download the LoRA again")
    rank = len(down)
    alpha = parts.get("alpha", torch.tensor(float(rank))).double()
    if alpha.numel() != 1 or not alpha.isfinite().all():
        raise ValueError(f"{where}: got alpha {str(alpha.tolist())[:50]}, expected one finite number; "
                         f"download the LoRA again")
    return alpha.item() / rank


def lora_terms(path, strength):
    """Yields each term that a LoRA file adds to a parameter: (parameter's name, term's shape, scale, factors).
    The term is scale * up @ down for the factors (up, down), or scale * difference for (difference,). Raises
    ValueError for a file that is not a LoRA, and for factors that do not fit together."""
    for layer, parts in read_lora(path).items():
        if parts.keys() & {"up", "down", "alpha"}:
            scale = strength * lora_scale(parts, f"{path}: {layer}")
            up, down = parts["up"], parts["down"]  # (M, r), (r, K)
            yield f"{layer}.weight", (len(up), *down.shape[1:]), scale, (up, down)
        for part in ("weight", "bias", "modulation"):
            if part in parts:
                yield f"{layer}.{part}", tuple(parts[part].shape), strength, (parts[part],)


def check_loras(path, metadata, loras):
    """Raises ValueError for a file that is not a LoRA, and if the DiT at `path`, according to its metadata,
    needs a LoRA that is not among `loras` (convert.py: --lora-mode absorb)."""
    given = set()
    for file, strength in loras:
        list(lora_terms(file, strength))  # checks the file
        if Path(file).suffix not in PICKLES:
            given.add((read_header(file)[0].get("lora_id"), strength))
    needed = metadata.get("needs_lora")
    if needed and (needed, 1) not in given:
        raise ValueError(f"{path}: its LoRA holds a part of its weights: got {len(loras)} LoRAs, expected "
                         f"{needed} among them, at strength 1; give --lora {needed}")


def attach_lora(model, path, strength: float = 1.0) -> str:
    """Add a LoRA to a model: factors as side branches of its Linears, differences to the parameters they name.

    Returns a line that says how much was used, and what was skipped and why. Raises ValueError if nothing fits,
    for wrong shapes, and for an up without its down. Never writes to a parameter's memory, which may be mapped.
    """
    modules, layers, used, skipped = dict(model.named_modules()), set(), [], []
    for name, _, scale, factors in lora_terms(path, strength):
        layer, _, part = name.rpartition(".")
        layers.add(layer)
        if reason := add_term(modules.get(layer), part, scale, factors, f"{path}: {layer}"):
            skipped.append(f"{layer} ({reason})")
        else:
            used.append(len(factors))
    if not used:
        usual = next(name for name in modules if name.endswith(".q"))
        raise ValueError(f"{path}: got {len(layers)} layers, none of which fits, the first "
                         f"{next(iter(skipped), 'none')}, expected names such as {usual}; "
                         f"use a LoRA for this kind of model")
    differences = f", {used.count(1)} differences" if 1 in used else ""
    more = f", skipped {len(skipped)}: {skipped[0]}" if skipped else ""
    return f"{Path(path).name}: {used.count(2)} layers{differences}{more}"


def add_term(module, part, scale, factors, where):
    """Add scale * up @ down beside a Linear, or scale * difference to a parameter. Returns "", or the reason why
    not."""
    if module is None:
        return "no such layer"
    if len(factors) == 2:
        if not isinstance(module, QuantLinear):
            return "not a Linear"
        up, down = (factor.to(module.weight.device) for factor in factors)
        module.attach_lora(up, down, scale, where)
        return ""
    old, difference = getattr(module, part, None), factors[0]
    if old is None:
        return f"has no {part}"
    if part == "weight" and getattr(module, "format", None):
        return "its weight is quantized: a difference cannot be added"
    if old.shape != difference.shape:
        raise ValueError(f"{where}: got a difference of shape {tuple(difference.shape)}, expected that of its "
                         f"{part}, {tuple(old.shape)}; use a LoRA for a model of this size")
    new = old.float() + scale * difference.to(old.device).float()
    setattr(module, part, nn.Parameter(new.to(old.dtype), requires_grad=False))
    return ""


# ----------------------------------------------------------------------------------------------------
# Programs: what their command lines have in common
# ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage too; one_line_errors prints one line
        raise ValueError(message)


@contextmanager
def one_line_errors(program, interrupted="interrupted"):
    """The one place where a program turns exceptions into a line on stderr and exit code 2, or 130 for Ctrl-C.

    It maps bad input and what libraries raise for damaged files, full disks and too little memory. Any other
    exception is a bug and keeps its traceback. An exception's first note says where it happened.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{program}: {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, SafetensorError, RuntimeError, IndexError, MemoryError, ImportError) as error:
        print(f"{program}: error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def explain(error):
    """An exception in one line: where, what, and what to do."""
    where = f"{error.__notes__[0]}: " if hasattr(error, "__notes__") else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ImportError):
        imports = traceback.extract_tb(error.__traceback__)[-1].line  # from extra.rife import double_frames
        missing = re.search(r"extra\.\w+", imports)
        if missing is None:
            raise error
        return f"{missing[0].replace('.', '/')}.py: not found, but this needs it; get the folder extra/ of the project"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in reason:
        return f"{where}out of memory; try --offload, fewer --frames or a smaller --size, or another --device"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or where.removesuffix(': ')}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, ValueError | OSError):
        return f"{where}{error}"
    return f"{where}{reason}; check that the file is complete and belongs to Wan2.1 I2V"
