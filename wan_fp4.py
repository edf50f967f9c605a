"""Wan2.1 image-to-video: the networks that turn a picture and a prompt into a video, and their checkpoints.

    UMT5Encoder   token ids -> text features                   once per prompt
    CLIPVision    the picture at 224 x 224 -> image tokens     once per picture
    WanVAE        video <-> latents, 8 x 8 x 4 times smaller   encodes the picture, decodes the result
    WanDiT        noisy latents -> velocity                    once per sampling step: most of the run time

Wan is a flow model: x_sigma = (1 - sigma) * x0 + sigma * noise. The DiT predicts the velocity noise - x0 from
x_sigma and t = 1000 * sigma. The picture conditions it in three ways: its VAE latents and a mask of the given
frames are concatenated with the noisy latents, and its CLIP tokens enter cross-attention.

Module names are the tensor names of the official checkpoints, and all sizes are read from the tensors'
shapes, so the 14B model, the demo and the tests run the same code. The loaders keep every Linear as the file
stores it (NVFP4, MXFP8, FP8 or plain: quant.QuantLinear), and LoRAs run as side branches of the Linears.
Architecture: the Wan2.1 report (https://arxiv.org/abs/2503.20314) and https://github.com/Wan-Video/Wan2.1.

In this file, in order: the four networks; reading and writing files; names; the loaders load_dit, load_vae,
load_umt5 and load_clip, and what they have in common; LoRA; what the programs have in common.

Letters in the shapes, where each network has its own D:
    B batch   F, h, w frames, height, width in pixels   T = 1 + (F - 1) / 4, H = h / 8, W = w / 8 in latents
    N = T * H/2 * W/2 video tokens   L text tokens   I image tokens (257)   D width   d head width   C channels
"""
import argparse
import itertools
import json
import math
import os
import re
import stat
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import nn

from quant import QuantLinear, compiled_on_cuda, default_dtype, default_mode, project, write_marker

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
    image_dim: int | None = 1280  # None: no CLIP tokens, as in Wan2.2
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


@compiled_on_cuda
def rms_norm(x, weight):
    """x / rms(x) * weight over the last dimension, computed in float32."""
    return F.rms_norm(x.float(), weight.shape, weight, 1e-6).to(x.dtype)


@compiled_on_cuda
def rms_norm_and_rope(x, weight, rope, head_dim):
    """RMSNorm, heads split and rotated: (B, N, D) -> (B, heads, N, d)."""
    y = F.rms_norm(x.float(), weight.shape, weight, 1e-6)  # (B, N, D)
    return apply_rope(split_heads(y, head_dim), rope).to(x.dtype)  # (B, heads, N, d)


@compiled_on_cuda
def layer_norm(x, weight, bias, dtype):
    """LayerNorm, computed in float32, which x has; the result is cast to `dtype`. weight and bias are (D,) or, if
    each video of the batch has its own, (B, 1, D)."""
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
        self.norm_q, self.norm_k = (nn.RMSNorm(dim) for _ in range(2))  # over D, before the heads are split
        self.attention = F.scaled_dot_product_attention  # extra/ replaces it by other ways to compute the same

    def forward(self, x, rope):
        q, k, v = project(x, self.q, self.k, self.v)  # (B, N, D) each
        q = rms_norm_and_rope(q, self.norm_q.weight, rope, self.head_dim)  # (B, heads, N, d)
        k = rms_norm_and_rope(k, self.norm_k.weight, rope, self.head_dim)  # (B, heads, N, d)
        y = self.attention(q, k, split_heads(v, self.head_dim))  # (B, heads, N, d)
        return self.o(join_heads(y))  # (B, N, D)


class CrossAttention(nn.Module):
    """One query attends to the text tokens and, separately, to the image tokens; the results are added."""

    def __init__(self, dim, head_dim, image_branch):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim) for _ in range(2))
        if image_branch:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.RMSNorm(dim)

    def forward(self, x, text, text_bias, image):
        q = split_heads(rms_norm(self.q(x), self.norm_q.weight), self.head_dim)  # (B, heads, N, d)
        k, v = project(text, self.k, self.v)  # (B, L + 1, D) each
        k = split_heads(rms_norm(k, self.norm_k.weight), self.head_dim)  # (B, heads, L + 1, d)
        v = split_heads(v, self.head_dim)  # (B, heads, L + 1, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=text_bias)  # (B, heads, N, d)
        if image is not None:
            k, v = project(image, self.k_img, self.v_img)  # (B, I, D) each
            k = split_heads(rms_norm(k, self.norm_k_img.weight), self.head_dim)  # (B, heads, I, d)
            y = y + F.scaled_dot_product_attention(q, k, split_heads(v, self.head_dim))  # (B, heads, N, d)
        return self.o(join_heads(y))  # (B, N, D)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward on a float32 residual stream x (B, N, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.modulation = normal(1, 6, cfg.dim, std=cfg.dim ** -0.5)
        self.self_attn = SelfAttention(cfg.dim, cfg.head_dim)
        self.norm3 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.cross_attn = CrossAttention(cfg.dim, cfg.head_dim, cfg.image_dim is not None)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU("tanh"),
                                 nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x, e0, rope, text, text_bias, image):
        dtype = text.dtype  # of the Linears' inputs; x stays in float32
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
        if cfg.image_dim is not None:
            self.img_emb = nn.ModuleDict({"proj": nn.Sequential(
                nn.LayerNorm(cfg.image_dim), nn.Linear(cfg.image_dim, cfg.image_dim), nn.GELU(),
                nn.Linear(cfg.image_dim, cfg.dim), nn.LayerNorm(cfg.dim))})
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_blocks))
        self.head = Head(cfg)

    def embed_text(self, text):
        """UMT5's features (B, L, UMT5's D), L <= 512 -> (B, L + 1, D) and an attention bias (1, 1, 1, L + 1).

        The model was trained on prompts padded with zeros to 512 tokens. The padding tokens are identical, so
        one of them stands for all 512 - L: adding log(512 - L) to its logit gives it that weight in the softmax.
        (In bfloat16 the logarithm is rounded: 496 tokens count as 502.)
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
        _, _, frames, height, width = x.shape  # of latents
        if height % 2 or width % 2 or y.shape[2:] != x.shape[2:]:
            raise ValueError(f"WanDiT: got x {tuple(x.shape)} and y {tuple(y.shape)}, expected the same "
                             f"T, H, W with H and W even; make the picture's sides multiples of 16 pixels")
        if (image is None) != (self.cfg.image_dim is None):
            got, expected = ("no image", "CLIP's") if image is None else ("image", "no image")
            raise ValueError(f"WanDiT: got {got} tokens, expected {expected} tokens; Wan2.1's model takes them, "
                             f"Wan2.2's does not")
        x = self.patch_embedding(torch.cat([x.float(), y.float()], dim=1))  # (B, D, T, H/2, W/2)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        rope = rope_3d(frames, height // 2, width // 2, self.cfg.head_dim, x.device)  # (2, N, d/2)
        e = self.time_embedding(timestep_embedding(t, self.cfg.freq_dim))  # (B, D)
        e0 = self.time_projection(e).unflatten(1, (6, -1))  # (B, 6, D)
        text, text_bias = self.embed_text(text)  # (B, L + 1, D), (1, 1, 1, L + 1)
        if image is not None:
            image = self.img_emb["proj"](image.float()).to(self.dtype)  # (B, I, D)
        return x, e, (e0, rope, text, text_bias, image)

    def unpatchify(self, x, grid):
        """The head's output (B, N, 64) -> velocity (B, 16, T, H, W), where grid = (T, H, W)."""
        return rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", t=grid[0], h=grid[1] // 2, p=2, q=2)

    def forward(self, x, t, text, image, y):
        """x (B, 16, T, H, W) noisy latents; t (B,) = 1000 * sigma; text (B, L, UMT5's D), not padded or zero past
        the prompt; image (B, I, CLIP's D), or None for a model without an image branch; y (B, 20, T, H, W) mask
        and latents of the picture -> velocity (B, 16, T, H, W) in float32. Raises ValueError for odd H or W, a y
        of another size than x, L > 512, and image tokens that the model does not take or lacks.
        """
        grid = x.shape[2:]
        x, e, context = self.prepare(x, t, text, image, y)  # (B, N, D)
        for block in self.blocks:
            x = block(x, *context)  # (B, N, D)
        return self.unpatchify(self.head(x, e), grid)  # (B, 16, T, H, W)


# ----------------------------------------------------------------------------------------------------
# VAE: causal 3-D convolutions, 8 times smaller in space and 4 times in time
# ----------------------------------------------------------------------------------------------------
#
# The first frame is compressed alone, then every four frames become one latent frame: T = 1 + (F - 1) / 4.
# Temporal convolutions see only the past, so a video is processed in chunks: one frame, then four at a time (one
# latent frame each). Convolutions keep the last frames of their input for the next chunk, in a dict `cache` from
# layer to frames, so the memory of a chunk does not grow with the length of the video.

LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


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
            return conv3d(x, self, self.padding)  # (B, C', t, h, w)
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
        smallest = 1e-3 if x.dtype == torch.float16 else 1e-12  # keeps sqrt(C) / norm within float16
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=smallest)
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
            cache[self] = True  # the first latent frame is one frame: no past, as in Wan's own training
        return to_video(self.resample(to_frames(x)), len(x))  # (B, C/2, t or 2t, 2h, 2w)


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
                c //= 2  # an upsampling halves the channels
        self.upsamples = nn.Sequential(*layers)
        self.num_small = len(layers) - (cfg.num_res_blocks + 1) - 1  # without the last level and its Upsample
        self.head = head_layers(c, 3)

    def begin(self, x, cache):
        """The layers at the size of the latents. Among them is the only one that sees a whole frame."""
        x = self.conv1(x, cache)  # (B, C', t, H, W)
        return run_layers(self.middle, x, cache)

    def upsample(self, x, cache):
        """The layers from there to pixels, which see only a neighborhood."""
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

    def decode_chunks(self, latents):
        """Yields the decoded video in chunks: (B, 3, 1, h, w) for the first latent frame, then (B, 3, 4, h, w)
        each."""
        mean, std = latent_statistics(latents.device, self.cfg.z_dim)
        z, cache = (latents * std + mean).to(self.dtype), {}
        for x in chunks(z, 1):  # (B, 16, 1, H, W)
            yield self.decoder(self.conv2(x, cache), cache).float().clamp(-1, 1)

    def decode(self, latents):
        """Normalized latents (B, 16, T, H, W) -> video (B, 3, F, h, w) in [-1, 1], float32."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2)


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
        self.norm1 = nn.RMSNorm(cfg.dim)
        self.attn = T5Attention(cfg)
        self.norm2 = nn.RMSNorm(cfg.dim)
        self.ffn = T5FeedForward(cfg)
        table = normal(cfg.buckets, cfg.heads, std=(2 * cfg.buckets * cfg.heads) ** -0.5)
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding.from_pretrained(table, freeze=False)})

    def forward(self, x, buckets, mask):
        table = self.pos_embedding["embedding"].weight.t().contiguous()  # (heads, buckets)
        bias = table.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)  # (heads, L, L)
        bias = bias + mask  # (B, heads, L, L), contiguous, as fused attention needs it
        x = x + self.attn(rms_norm(x, self.norm1.weight), bias.to(x.dtype))  # (B, L, D)
        return x + self.ffn(rms_norm(x, self.norm2.weight))  # (B, L, D)


class UMT5Encoder(nn.Module):
    def __init__(self, cfg=UMT5Config()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # compute dtype; load_weights sets it
        self.token_embedding = nn.Embedding.from_pretrained(normal(cfg.vocab, cfg.dim), freeze=False)
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.num_blocks))
        self.norm = nn.RMSNorm(cfg.dim)

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
        return rms_norm(x, self.norm.weight) * (mask != 0)[..., None]  # (B, L, D)


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
        q, k, v = (split_heads(y, self.head_dim) for y in self.to_qkv(x).chunk(3, dim=-1))  # (B, heads, I, d)
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
# Reading and writing files
# ----------------------------------------------------------------------------------------------------

PICKLES = ".pth", ".pkl"  # written by torch.save; they have no header
SHARD = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}  # as a safetensors header spells them
IMAGE_BRANCH = "img_emb.", "condition_embedder.image_embedder."


def wrong(where, got, expected, advice):
    return ValueError(f"{where}: got {got}, expected {expected}; {advice}")


@contextmanager
def reading(path, kind):
    """A context in which libraries read a file. The one place that maps whatever they raise for a damaged file to
    ValueError, in one line. Only regular files are read: a FIFO or a device may never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a folder, pipe or device: only regular files are read")
        with open(path, "rb") as file:  # safetensors reports a missing permission as a missing file
            if file.read(4) == b"GGUF":
                raise ValueError("a GGUF file, which is not supported: take the safetensors file")
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None
    except Exception as error:  # torch interprets the bytes of a pickle, so a damaged one can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        again = "" if "GGUF" in reason else "; download it again, or name another file"
        raise ValueError(f"{path}: not a {kind} ({reason}){again}") from None


def shards(path):
    """The files that a path stands for: the file itself, the shards listed by an index .json or in a file's name
    (-00001-of-00003), or those of a folder.

    Raises FileNotFoundError for a missing path, and ValueError for a folder that does not hold exactly one
    model or an index without weight_map. Whether the other shards exist is not checked.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if len(indices) > 1 or not indices + files:
            raise wrong(path, f"{len(indices)} models", "one", "name its file or folder")
        if not indices and not SHARD.fullmatch(files[0].name):
            return files
        path = [*indices, *files][0]
    if path.suffix == ".json":
        with reading(path, "shard index"):
            names = set(json.loads(path.read_text())["weight_map"].values())
            return [path.parent / name for name in sorted(names)]
    if shard := SHARD.fullmatch(path.name):
        stem, count = shard.groups()
        return [path.with_name(f"{stem}-{i:05}-of-{count}.safetensors") for i in range(1, int(count) + 1)]
    return [path]


def read_header(path):
    """A safetensors file's metadata {str: str} and {tensor name: (dtype name, shape)}; reads no tensor. Raises
    FileNotFoundError or another OSError, and ValueError for a file that is not in safetensors format."""
    with reading(path, "safetensors file"), safe_open(path, "pt") as file:
        return header_of(file)


def header_of(file):
    """read_header of an open file."""
    slices = {name: file.get_slice(name) for name in file.keys()}
    stored = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    return file.metadata() or {}, stored


def read_metadata(path):
    """The metadata of all of a checkpoint's safetensors files."""
    files = [file for file in shards(path) if file.suffix not in PICKLES]
    return {key: text for file in files for key, text in read_header(file)[0].items()}


def read_pickle(path):
    """The tensors of a file written by torch.save, memory-mapped. Runs no code from the file (weights only)."""
    with reading(path, "file of torch weights"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    entries = tensors.items() if isinstance(tensors, dict) else [(f"a {type(tensors).__name__}", None)]
    for name, tensor in entries:
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not (isinstance(name, str) and plain and not tensor.is_meta and not tensor.is_quantized):
            raise wrong(f"{path}: {name}", type(tensor).__name__, "a dict from names to plain tensors",
                        "save the model's state_dict")
    return tensors


def read_safetensors(path, device="cpu"):
    """The tensors of a safetensors file, memory-mapped, and its metadata. On the meta device, only the header and
    what is small are read: markers and single numbers."""
    with reading(path, "safetensors file"), safe_open(path, "pt") as file:
        (metadata, stored), tensors = header_of(file), {}
        for name, (dtype, shape) in stored.items():
            if torch.device(device).type != "meta" or name.endswith(".comfy_quant") or math.prod(shape) <= 1:
                tensors[name] = file.get_tensor(name)
            else:
                tensors[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        return tensors, metadata


def read_tensors(path, device="cpu"):
    """A checkpoint's tensors by bare name, memory-mapped, and its metadata. path: a .safetensors, .pth or .pkl
    file, an index .json, or a folder of shards. A layer whose format is only in the metadata gets a comfy_quant
    tensor; LightX2V's NVFP4 layout is turned into ours. device "meta": shapes and dtypes only."""
    tensors, metadata, markers = {}, {}, {}
    for file in shards(path):
        stored, own = (read_pickle(file), {}) if file.suffix in PICKLES else read_safetensors(file, device)
        for name, tensor in stored.items():
            if tensors.setdefault(bare_name(name), tensor) is not tensor:
                raise wrong(f"{file}: {name[:200]}", "a second tensor of this name", "one model", "name one file")
        metadata |= own
        markers |= header_markers(own, file)
    for layer, info in markers.items():
        if f"{layer}.weight" in tensors:
            tensors.setdefault(f"{layer}.comfy_quant", write_marker(info))
    if is_lightx2v(tensors):
        from extra.lightx2v import unpack
        tensors = unpack(tensors, path)
    return tensors, metadata


def header_markers(metadata, path):
    """{layer: what its marker says} for the layers that a file's header lists in _quantization_metadata."""
    text = metadata.get("_quantization_metadata", "{}")
    try:
        return {bare_name(layer): info for layer, info in json.loads(text).get("layers", {}).items()}
    except (ValueError, AttributeError, RecursionError):
        raise wrong(f"{path}: _quantization_metadata in its header", repr(text[:100]),
                    'JSON with "layers": {NAME: {"format": ...}}', "download the file again") from None


def is_lightx2v(names):
    """Whether a file with these tensors is in LightX2V's NVFP4 layout (extra/lightx2v.py)."""
    return any(name.endswith((".weight_global_scale", ".input_global_scale")) for name in names)


def write_safetensors(path, tensors, metadata):
    """Write a file under a temporary name, renamed on success. (safetensors.torch would need numpy.)"""
    part = path.with_name(f".{path.name}.part")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # alive until they are written
    specs = {name: TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape),
                              data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
             for name, tensor in tensors.items()}
    try:
        serialize_file(specs, part, metadata)
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def tensor_names(path):
    """The bare names of a checkpoint's tensors, without reading them. Raises as read_tensors does."""
    stored = (read_pickle(file) if file.suffix in PICKLES else read_header(file)[1] for file in shards(path))
    return {bare_name(name) for names in stored for name in names}


def is_expert(path):
    """Whether a DiT is one of Wan2.2's two: it has no image branch."""
    return not any(name.startswith(IMAGE_BRANCH) for name in tensor_names(path))


def expert_noise(path):
    """Which of Wan2.2's two experts a file is, "high" or "low": by its header, which convert.py writes, by its
    name or by its folder's; diffusers names the folders transformer and transformer_2. "" if nothing tells."""
    header = read_metadata(path)
    folder, name = Path(os.path.abspath(path)).parts[-2:]
    for words in (header.get("expert", ""), name, folder):
        levels = set(re.findall("(high|low)[-_]?noise", words.lower()))
        if len(levels) == 1:
            return levels.pop()
    levels = {"transformer": "high", "transformer_2": "low"}
    return levels.get(name) or levels.get(folder, "")


# ----------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------

# Added by ComfyUI, diffusers (not before CLIP's own transformer.0.), OpenCLIP, DataParallel, PEFT and DiffSynth
PREFIXES = re.compile(
    r"^(model\.|diffusion_model\.|transformer\.(?!\d)|visual\.|module\.|base_model\.|pipe\.dit\.)+")

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


def renamed(tensors, official, path):
    """{official(name): tensor}. Raises ValueError if two names stand for one tensor."""
    named = {}
    for name, tensor in tensors.items():
        if named.setdefault(official(name), tensor) is not tensor:
            raise wrong(f"{path}: {name[:200]}", f"a second tensor for {official(name)[:200]}", "one model",
                        "name one file")
    return named


def official_dit_name(name):
    return official_name(name, DIFFUSERS_DIT)


def official_vae_name(name, blocks):
    """The decoder's layers have one number in the official names. In diffusers' they are numbered by level and
    kind: `blocks` residual blocks, then the upsampler."""
    def flat(match):
        level, kind, i = int(match[1]), match[2], int(match[3])
        return f".upsamples.{level * (blocks + 1) + (i if kind == 'resnets' else blocks)}."
    return official_name(re.sub(r"\.up_blocks\.([0-9]{1,4})\.(\w+)\.([0-9]{1,4})\.", flat, name), DIFFUSERS_VAE)


# What a file is if it is not what was asked for: a pattern that one of its tensors' names matches, a pattern that
# none matches, what the file is, what to do. The first row that fits counts. describe_file adds two signs to the
# names: the channels that patch_embedding takes, and the dtypes.
MODELS = "is not supported; use Wan2.1 I2V or Wan2.2 I2V A14B"
ADAPTERS = "is not supported; merge it into the model elsewhere"
KINDS = (
    (r"\.(dora_scale|lora_magnitude_vector)", None, "a DoRA", ADAPTERS),
    (r"\.lokr_w", None, "a LoKr", ADAPTERS),
    (r"\.hada_w", None, "a LoHa", ADAPTERS),
    (r"\.lora_(up|down|A|B)\b|\.diff(_[bm])?$", None, "a LoRA", "is no model; pass it with --lora"),
    (r"^vace_", None, "Wan VACE", MODELS),
    (r"^(face_adapter|pose_patch_embedding)\.", None, "Wan Animate", MODELS),
    (r"\baudio_injector\.", None, "Wan S2V", MODELS),
    (r"^img_emb\.emb_pos$|image_embedder\.pos_embed$", None, "Wan2.1 FLF2V", MODELS),
    (r"^(control_adapter|ref_conv)\.", None, "Wan Fun Control", MODELS),
    (r"^in_dim 16$", None, "Wan T2V", MODELS),
    (r"^in_dim 48$", r"^img_emb\.", "Wan2.2 TI2V 5B", MODELS),
    (r"^in_dim (?!36$)", None, "Wan Fun Control or another variant", MODELS),
    (r"\.upsamples\.\d+\.upsamples\.", None, "the VAE of Wan2.2 5B", "is not supported; use Wan2.1's"),
    (r"^blocks\.0\.pos_embedding\.", r"^blocks\.1\.pos_embedding\.", "T5", "is not UMT5; use umt5_xxl"),
    (r"^torch.int8$", None, "an int8 model", "is not supported; use the bf16 or the fp8 one"),
    (r"\.weight_scale_2$", r"\.comfy_quant$", "NVFP4 without comfy_quant markers, such as ModelOpt's", "has "
     "nibbles and scales in another order and is not supported; convert the bf16 model"),
    (r"^(time_projection|condition_embedder)\.", None, "a WanDiT", "belongs to --dit"),
    (r"\bpos_embedding\.embedding\.|relative_attention_bias", None, "a UMT5Encoder", "belongs to --text-encoder"),
    (r"^decoder\.(middle|mid_block)\.", None, "a WanVAE", "belongs to --vae"),
    (r"^(transformer|vision_model)\.", None, "a CLIPVision", "belongs to --clip"))


def describe_file(tensors, wanted=""):
    """What a file with these tensors is, other than the wanted network, and what to do about it; "" if it
    is none of KINDS."""
    signs = [*tensors, *{str(tensor.dtype) for tensor in tensors.values()}]
    if (patch := tensors.get("patch_embedding.weight")) is not None and patch.dim() == 5:
        signs.append(f"in_dim {patch.shape[1]}")

    def found(pattern):
        return pattern is not None and any(re.search(pattern, sign) for sign in signs)

    for has, lacks, name, advice in KINDS:
        if name != f"a {wanted}" and found(has) and not found(lacks):
            return f"this is {name}, which {advice}"
    return ""


# ----------------------------------------------------------------------------------------------------
# Building
# ----------------------------------------------------------------------------------------------------

FP8 = torch.float8_e4m3fn, torch.float8_e5m2
CONVOLUTIONS = nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d


def build(network, config, tensors, path):
    """The network on the meta device, where it takes no memory, with sizes read from the tensors.

    config(shape) gives the network's config. shape(name, *sizes) is the shape of a tensor (of a quantized weight,
    the shape it stands for), after a check against the sizes that the network fixes, None elsewhere.
    """
    def advice():
        name = network.__name__
        return describe_file(tensors, name) or f"check that the file is a complete {name} checkpoint"

    def shape(name, *sizes):
        if name not in tensors:
            raise wrong(f"{path}: {name}", "nothing", "a tensor", advice())
        got = tuple(tensors[name].shape)
        if tensors[name].dtype == torch.uint8 and got:
            got = *got[:-1], 2 * got[-1]  # two codes in a byte
        if len(got) != len(sizes) or any(n == 0 or size not in (None, n) for n, size in zip(got, sizes)):
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise wrong(f"{path}: {name}", f"shape {got}", f"({expected}), none of them 0", advice())
        return got

    with torch.device("meta"):
        return network(config(shape))


def count(tensors, prefix):
    """The number of numbered modules under a prefix: 40 for "blocks." if there are blocks.0 to blocks.39.

    Numbers after a gap do not count: a tensor named blocks.999999999 must not make a billion blocks.
    """
    numbers = {name[len(prefix):].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return next(i for i in itertools.count() if str(i) not in numbers)


def head_width(dim, metadata, default, path):
    """The head width: head_dim of the file's metadata, or the default."""
    text = metadata.get("head_dim", str(default))
    head_dim = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if head_dim == 0 or head_dim % 2 or dim % head_dim:
        raise wrong(f"{path}: head width", text[:50], f"an even divisor of the model's width {dim}",
                    "set head_dim in the file's metadata")
    return head_dim


def load_weights(model, tensors, path, device, dtype=None, float32=(), stream=False, mode=None, two_pass=False):
    """Give a model on the meta device its tensors. Returns it in eval mode; path is for error messages.

    Linears become QuantLinears that keep the tensors as stored and compute in `dtype`, as convolutions do, or
    in float32 if their name begins with one of `float32`. All other parameters become float32. Every tensor
    moves to `device` once, except the token table and, with stream, the blocks, which stay in CPU memory.
    mode and two_pass are those of load_dit. Raises ValueError for missing and unexpected tensors and for wrong
    shapes.
    """
    dtype = dtype or default_dtype(device)
    check_tensors(model, tensors, path)
    linears, state = {}, {}  # {layer: {suffix: tensor}}, {name: tensor}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        stays = layer == "token_embedding" or suffix == "comfy_quant" or (stream and name.startswith("blocks."))
        tensor = tensor if stays else tensor.to(device)
        module = model.get_submodule(layer)
        if isinstance(module, nn.Linear):
            linears.setdefault(layer, {})[suffix] = tensor
        else:
            half = isinstance(module, CONVOLUTIONS) and not name.startswith(float32)
            state[name] = tensor if layer == "token_embedding" else tensor.to(dtype if half else torch.float32)
    for name, stored in linears.items():
        linear = model.get_submodule(name)
        layer = QuantLinear.from_tensors(f"{path}: {name}", stored, linear.in_features, linear.out_features,
                                         bias=linear.bias is not None, two_pass=two_pass,
                                         compute_dtype=torch.float32 if name.startswith(float32) else dtype,
                                         mode=mode or default_mode(device))
        model.set_submodule(name, layer)
        state |= layer.state_dict(prefix=f"{name}.")
    model.requires_grad_(False).load_state_dict(state, assign=True)
    model.dtype = dtype
    return model.eval()


def check_tensors(model, tensors, path):
    """Raises ValueError, in one line, unless the tensors are those of the model, by name, shape and kind of
    dtype. Those of a quantized layer are checked when it is made."""
    parameters = dict(model.named_parameters())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = [f"{name}, {tuple(parameters[name].shape)}" for name in parameters if name not in tensors]
    misfits = {"missing": missing, "unexpected": [], "of a wrong shape": [], "not in a float dtype": []}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        if name not in parameters:
            misfits["unexpected"] += [repr(name)[1:-1][:200]] if layer not in linears else []
        elif layer in linears and (f"{layer}.comfy_quant" in tensors or tensor.dtype in FP8):
            continue  # quantized
        elif tensor.shape != parameters[name].shape:
            misfits["of a wrong shape"].append(f"{name}, {tuple(tensor.shape)} instead of "
                                               f"{tuple(parameters[name].shape)}")
        elif not tensor.is_floating_point():
            misfits["not in a float dtype"].append(f"{name}, {tensor.dtype}")
    if any(misfits.values()):
        got = "; ".join(f"{len(names)} {what} (first {names[0]})" for what, names in misfits.items() if names)
        network = type(model).__name__
        raise ValueError(f"{path}: tensors that do not fit a {network}: {got}; "
                         f"{describe_file(tensors, network) or 'check that it is complete and belongs to Wan'}")


# ----------------------------------------------------------------------------------------------------
# Loaders
# ----------------------------------------------------------------------------------------------------

OTHER_NETWORKS = "first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner."  # all-in-one


def load_dit(path, device="cpu", dtype: torch.dtype | None = None, loras=(), stream: bool = False,
             mode: str | None = None, two_pass: bool = False) -> WanDiT:
    """The diffusion transformer of a plain or quantized checkpoint, in eval mode.

    path    as for read_tensors; official, ComfyUI's and diffusers' names are read
    device  "meta" reads only the headers: a quick check that the file and the LoRAs fit
    dtype   compute dtype of the Linears: by default quant.default_dtype(device). Weights stay as
            stored and, on a CPU, memory-mapped.
    loras   (file, strength) pairs; the model's attribute `loras` says in a line for each what was used
    stream  keep the blocks in CPU memory
    mode, two_pass   of the quantized Linears, as for QuantLinear.from_tensors; the default mode is
            quant.default_mode(device)

    Raises FileNotFoundError; ValueError for missing or unexpected tensors, wrong shapes, unknown formats, and a
    LoRA that does not fit.
    """
    tensors, metadata = read_tensors(path, device)
    others = [name for name in tensors if name.startswith(OTHER_NETWORKS)]
    tensors = renamed({name: tensors[name] for name in tensors if name not in others}, official_dit_name, path)
    tensors.pop("scaled_fp8", None)  # ComfyUI's mark of FP8 files
    dit = dit_from_tensors(tensors, metadata, path, device, dtype, stream, mode, two_pass)
    if others and torch.device(device).type != "meta":
        print(f"{path}: left out {len(others)} tensors of other networks, such as {others[0][:200]}")
    dit.loras = [attach_lora(dit, file, strength) for file, strength in loras]
    return dit


def dit_from_tensors(tensors, metadata, path, device="cpu", dtype=None, stream=False, mode=None, two_pass=False):
    """load_dit from tensors by official name and the file's metadata; path is for error messages."""
    def config(shape):
        dim, in_dim = shape("patch_embedding.weight", None, 36, 1, 2, 2)[:2]
        has_image = any(name.startswith("img_emb.") or ".cross_attn.k_img." in name for name in tensors)
        return DiTConfig(dim=dim, in_dim=in_dim, out_dim=shape("head.head.bias", 64)[0] // 4,
                         ffn_dim=shape("blocks.0.ffn.0.bias", None)[0], num_blocks=count(tensors, "blocks."),
                         head_dim=head_width(dim, metadata, 128, path),
                         text_dim=shape("text_embedding.0.weight", dim, None)[1],
                         image_dim=shape("img_emb.proj.0.weight", None)[0] if has_image else None,
                         freq_dim=shape("time_embedding.0.weight", dim, None)[1])

    return load_weights(build(WanDiT, config, tensors, path), tensors, path, device, dtype,
                        ("patch_embedding", "time_", "img_emb", "head"), stream, mode, two_pass)


def load_vae(path, device="cpu", dtype: torch.dtype | None = None) -> WanVAE:
    """The video autoencoder, in eval mode. dtype is its compute dtype; arguments and errors as for load_dit."""
    tensors, _ = read_tensors(path, device)
    blocks = count(tensors, "decoder.up_blocks.0.resnets.")  # per level, under diffusers' names
    tensors = renamed(tensors, lambda name: official_vae_name(name, blocks), path)

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
    tensors, _ = read_tensors(path, device)
    for extra in ("spiece_model", "scaled_fp8"):  # ComfyUI's tokenizer, and its mark of FP8 files
        tensors.pop(extra, None)
    if "shared.weight" in tensors:
        tensors.pop("encoder.embed_tokens.weight", None)  # transformers stores the token table twice
    tensors = renamed(tensors, lambda name: official_name(name, TRANSFORMERS_UMT5), path)

    def config(shape):
        vocab, dim = shape("token_embedding.weight", None, None)
        buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", None, None)
        return UMT5Config(vocab=vocab, dim=dim, ffn_dim=shape("blocks.0.ffn.fc1.weight", None, dim)[0],
                          num_blocks=count(tensors, "blocks."), heads=heads, buckets=buckets,
                          inner=shape("blocks.0.attn.q.weight", None, dim)[0])

    return load_weights(build(UMT5Encoder, config, tensors, path), tensors, path, device, dtype, stream=stream)


def load_clip(path, device="cpu", dtype: torch.dtype | None = None) -> CLIPVision:
    """The image tower, in eval mode, without its last block, which Wan does not use. Arguments and errors as
    for load_dit; official, ComfyUI's and transformers' names are read."""
    tensors, metadata = read_tensors(path, device)
    tensors = renamed(tensors, lambda name: official_name(name, TRANSFORMERS_CLIP), path)
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:  # transformers has no to_qkv
        parts = [name.replace(".q_proj.", part) for part in (".q_proj.", ".k_proj.", ".v_proj.")]
        if all(part in tensors and tensors[part].element_size() > 1 for part in parts):
            tensors[name.replace(".self_attn.q_proj.", ".attn.to_qkv.")] = torch.cat(
                [tensors.pop(part) for part in parts])
    for name in tensors.keys() & {"cls_embedding", "pos_embedding"}:  # stored by transformers as (D,), (I, D)
        tensors[name] = tensors[name][(None,) * (3 - tensors[name].dim())]  # (1, 1 or I, D)
    last = count(tensors, "transformer.") - 1
    unused = (f"transformer.{last}.", "post_norm.", "head", "textual.", "log_scale", "visual_projection.",
              "position_ids")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}

    def config(shape):
        dim, _, patch, _ = shape("patch_embedding.weight", None, 3, None, None)
        return CLIPConfig(dim=dim, ffn_dim=shape("transformer.0.mlp.0.bias", None)[0], num_blocks=last,
                          head_dim=head_width(dim, metadata, 80, path), patch=patch,
                          tokens=shape("pos_embedding", 1, None, dim)[1])

    return load_weights(build(CLIPVision, config, tensors, path), tensors, path, device, dtype,
                        float32=("patch_embedding",))


# ----------------------------------------------------------------------------------------------------
# LoRA
# ----------------------------------------------------------------------------------------------------
#
# A LoRA file (https://arxiv.org/abs/2106.09685) holds, for some layers, factors: W + strength * alpha / r *
# up @ down, with alpha = r if absent. It may also hold whole differences to weights, biases and modulations. A
# tensor's name is that of a layer, in the spelling of one of several programs, that of a part and, from PEFT,
# that of an adapter.

LORA_PARTS = {"lora_up": "up", "lora_B": "up", "lora_down": "down", "lora_A": "down", "alpha": "alpha",
              "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
LORA_NAME = re.compile(rf"(?P<layer>.+)\.(?P<part>{'|'.join(LORA_PARTS)})"
                       r"(\.(?!weight$|bias$)[^.]+)?((?P<bias>\.bias)|\.weight)?")
# kohya's sd-scripts, musubi-tuner and VideoX-Fun write lora_unet_blocks_0_self_attn_q
KOHYA = ((r"^lora_unet_+", ""), (r"^blocks_(\d+)[_.]", r"blocks.\1."),
         (r"\b(self_attn|cross_attn|attn[12]|ffn|(?:time|text)_embedding|time_projection|head)_", r"\1."),
         (r"\bimg_emb_proj_", "img_emb.proj."), (r"\bto_out_0\b", "to_out.0"), (r"\bnet_0_proj\b", "net.0.proj"),
         (r"\bnet_2\b", "net.2"))


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


def lora_terms(path, strength):
    """Yields each term that a LoRA file adds to a parameter: (parameter's name, term's shape, scale, factors).
    The term is scale * up @ down for the factors (up, down), or scale * difference for (difference,). Raises
    ValueError for a file that is not a LoRA, and for factors that do not fit together."""
    tensors, metadata = read_tensors(path)
    layers, alphas = {}, stored_alphas(path, metadata)  # {official layer name: {part: tensor}}
    low = [name.startswith("transformer_2.") for name in tensors]  # diffusers' name of Wan2.2's low-noise expert
    if any(low) and not all(low):
        raise wrong(path, "LoRAs of both of Wan2.2's experts", "those of one", "split the file in two")
    for name, tensor in tensors.items():
        match = LORA_NAME.fullmatch(name.removeprefix("transformer_2."))
        if not match:
            raise wrong(f"{path}: {repr(name)[1:-1][:200]}", "a tensor that is no part of a LoRA",
                        f"a name that ends in one of {', '.join(LORA_PARTS)}",
                        describe_file(tensors) or "check how the file was made")
        layer = official_name(match["layer"], KOHYA if match["layer"].startswith("lora_unet_") else ())
        parts = layers.setdefault(official_dit_name(layer), {})
        parts["up_bias" if match["bias"] else LORA_PARTS[match["part"]]] = tensor
        if (alpha := alphas(layer)) is not None:
            parts.setdefault("alpha", torch.tensor(alpha))
    for layer, parts in layers.items():
        up, down, alpha = (parts.get(part) for part in ("up", "down", "alpha"))
        for part in parts.keys() & {"weight", "bias", "modulation"}:
            yield f"{layer}.{part}", tuple(parts[part].shape), strength, (parts[part],)
        if up is None and down is None:
            continue
        where, advice = f"{path}: {layer}", "check how the LoRA was made"
        if up is None or down is None:
            raise wrong(where, "up" if down is None else "down", "lora_up and lora_down, or lora_B and lora_A",
                        "the LoRA is incomplete: download it again")
        if up.dim() != down.dim() or up.dim() < 2 or up.shape[1] != down.shape[0] or 0 in up.shape + down.shape:
            raise wrong(where, f"up {tuple(up.shape)} and down {tuple(down.shape)}", "(M, r) and (r, K)", advice)
        alpha = torch.tensor(float(len(down))) if alpha is None else alpha.double()
        if alpha.numel() != 1 or not alpha.isfinite().all():
            raise wrong(where, f"alpha {alpha.flatten()[:3].tolist()}", "one finite number", advice)
        scale = strength * alpha.item() / len(down)
        yield f"{layer}.weight", (len(up), *down.shape[1:]), scale, (up, down)
        if "up_bias" in parts:  # PEFT's lora_B is a whole Linear
            yield f"{layer}.bias", tuple(parts["up_bias"].shape), scale, (parts["up_bias"],)


def stored_alphas(path, metadata):
    """A function from a layer's name to its alpha where no tensor holds it. PEFT keeps one alpha for all layers,
    and patterns for some, in adapter_config.json; diffusers keeps the same in the file's header."""
    config = (Path(path) if Path(path).is_dir() else Path(path).parent) / "adapter_config.json"
    text = metadata.get("lora_adapter_metadata") or (config.read_text() if config.exists() else "{}")
    try:
        stored = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        patterns = [*(stored.get("alpha_pattern") or {}).items(), (".*", stored.get("lora_alpha"))]
        alphas = [(re.compile(rf"(.*\.)?({pattern})"), float(alpha)) for pattern, alpha in patterns
                  if alpha is not None]
    except (ValueError, TypeError, AttributeError, RecursionError, re.error):
        raise wrong(f"{path}: lora_adapter_metadata or adapter_config.json", text[:100], "JSON with lora_alpha",
                    "correct it, or remove it to use alpha = rank") from None
    if stored.get("use_rslora"):
        raise ValueError(f"{path}: this is a rank-stabilized LoRA (use_rslora), which {ADAPTERS}")
    return lambda layer: next((alpha for pattern, alpha in alphas if pattern.fullmatch(layer)), None)


def attach_lora(model, path, strength: float = 1.0) -> str:
    """Add a LoRA to a model: factors as side branches of its Linears, differences to the parameters they name.

    Returns a line that says how much was used, and what was skipped and why. Raises ValueError if nothing fits,
    for wrong shapes, and for an up without its down. Never writes to a parameter's memory, which may be mapped.
    """
    modules, used, skipped = dict(model.named_modules()), [], []
    for name, shape, scale, factors in lora_terms(path, strength):
        layer, _, part = name.rpartition(".")
        module = modules.get(layer)
        old = getattr(module, part, None)
        quantized = part == "weight" and getattr(module, "format", None)
        if old is None or (len(factors) == 2 and not isinstance(module, QuantLinear)):
            skipped.append(f"{layer} (has no {part}{'' if old is None else ' of a Linear'})")
        elif len(factors) == 2:
            module.attach_lora(*(factor.to(old.device) for factor in factors), scale, f"{path}: {layer}")
            used.append("layers")
        elif quantized:
            skipped.append(f"{layer} (its weight is quantized: a difference cannot be added)")
        elif shape != old.shape:
            raise wrong(f"{path}: {layer}", f"a difference of shape {shape}", f"that of its {part}, "
                        f"{tuple(old.shape)}", "use a LoRA for a model of this size")
        else:
            new = old.float() + scale * factors[0].to(old.device).float()
            setattr(module, part, nn.Parameter(new.to(old.dtype), requires_grad=False))
            used.append("differences")
    counts = ", ".join(f"{used.count(kind)} {kind}" for kind in ("layers", "differences") if kind in used)
    return f"{Path(path).name}: {with_skipped(counts, skipped, path)}"


def with_skipped(used, skipped, path):
    """What was used of a LoRA, as text, and what was skipped. Raises ValueError if nothing was used."""
    if not used:
        raise wrong(path, f"{len(skipped)} differences, none of which fits, the first {(skipped or ['none'])[0]}",
                    "names such as blocks.0.self_attn.q", "use a LoRA for this kind of model")
    return f"{used}, skipped {len(skipped)}: {skipped[0]}" if skipped else used


# ----------------------------------------------------------------------------------------------------
# Programs: what their command lines have in common
# ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage too; one_line_errors prints one line
        raise ValueError(message)

    def parse_known_args(self, *arguments):
        args, rest = super().parse_known_args(*arguments)
        # argparse gives [] for --steps=--
        if empty := [name for name, value in vars(args).items() if value in ([], [[]])]:
            raise ValueError(f"argument --{empty[0].replace('_', '-')}: expected one argument")
        return args, rest


def check_device(name):
    """The device of this name, made torch's current one if it is a GPU with a number. Raises ValueError for one
    that is not supported or that torch cannot use here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name[:50]!r}: expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: only cpu and cuda are supported")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; for a GPU, install torch as "
                         f"https://pytorch.org/get-started says") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


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
        return f"{missing[0].replace('.', '/')}.py: no such file, but this needs it; get the folder extra/"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in reason:
        return f"{where}out of memory; try --offload, fewer --frames or a smaller --size, or another --device"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else where
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, ValueError | OSError):
        return f"{where}{error}"
    return f"{where}{reason}" + ("; check that the file is complete and belongs to Wan" if where else "")
