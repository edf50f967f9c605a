"""Wan2.1 image-to-video: the networks that turn a picture and a prompt into a video, and their files.

    UMT5Encoder   token ids -> text features                 once per prompt
    CLIPVision    the picture at 224 x 224 -> image tokens   once per picture
    WanVAE        video <-> latents, 8 x 8 x 4 smaller       encodes the picture, decodes the result
    WanDiT        noisy latents -> velocity                  once per sampling step; where the time goes
    IFNet         two frames -> the frame between            not Wan's but RIFE's, for more frames a second

Wan is a flow model: x_sigma = (1 - sigma) * x0 + sigma * noise, and the DiT predicts velocity = noise - x0
from x_sigma and t = 1000 * sigma. The picture enters three times: its VAE latents beside the noisy ones,
its CLIP tokens in cross-attention, and a mask that says which frames are given.

Modules are named as the tensors of the official checkpoints, so a file's names are the map of this file. All
sizes are read from the tensors' shapes: the 14B model, a test's and the demo's run the same code. The loaders
at the end keep every Linear as the file stores it, NVFP4 or MXFP8 or plain (quant.QuantLinear), with LoRAs as
branches beside it; what is not a Linear is small. Sizes and conventions: the Wan2.1 report (arXiv 2503.20314)
and its published checkpoints.

Letters in the shapes: B batch; F frames, h w their height and width; T = 1 + (F - 1) / 4 latent frames, H W =
h / 8, w / 8; N = T * H/2 * W/2 tokens; D width of a network, d of a head; L text tokens; C channels.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import nn

from quant import QuantLinear, default_dtype, default_mode, read_marker

# ----------------------------------------------------------------------------------------------------
# DiT: the diffusion transformer
# ----------------------------------------------------------------------------------------------------

TEXT_TOKENS = 512  # the DiT was trained with every prompt padded to this length, and without a mask


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


def timestep_embedding(t, dim):
    """Times (B,) -> (B, dim): cosines, then sines, of t * 10000 ** (-i / (dim / 2)). In float64, as angles
    reach 1000 radians."""
    freqs = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angles = t.double()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()  # (B, dim)


def rope_3d(frames, height, width, head_dim, device):
    """The rotation of every token's pairs: (N, d/2) complex64, from float64 angles.

    Of a head's c = d/2 pairs, the first c - 2 * (c // 3) turn with t, then c // 3 with h and c // 3 with w.
    """
    c = head_dim // 2
    axes = []
    for n, pairs in ((frames, c - 2 * (c // 3)), (height, c // 3), (width, c // 3)):
        freqs = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        angles = torch.arange(n, dtype=torch.float64, device=device)[:, None] * freqs  # (n, pairs)
        axes.append(torch.polar(torch.ones_like(angles), angles).to(torch.complex64))
    t, h, w = axes
    full = (frames, height, width, -1)
    rope = torch.cat([t[:, None, None].expand(full), h[:, None].expand(full), w.expand(full)], -1)
    return rope.flatten(0, 2)  # (N, d/2)


def apply_rope(x, rope):
    """Turn the interleaved pairs of x (B, heads, N, d) by rope (N, d/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, N, d/2)
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)  # (B, heads, N, d)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)


def layer_norm(x):
    """LayerNorm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, d)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, D)


class SelfAttention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)  # over all heads at once

    def forward(self, x, rope):
        q = apply_rope(split_heads(self.norm_q(self.q(x)), self.head_dim), rope)  # (B, heads, N, d)
        k = apply_rope(split_heads(self.norm_k(self.k(x)), self.head_dim), rope)
        v = split_heads(self.v(x), self.head_dim)
        return self.o(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (B, N, D)


class CrossAttention(nn.Module):
    """One query, two attentions, added: to the text's tokens and to the picture's."""

    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k, self.norm_k_img = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)

    def forward(self, x, text, text_bias, image):
        q = split_heads(self.norm_q(self.q(x)), self.head_dim)  # (B, heads, N, d)
        k = split_heads(self.norm_k(self.k(text)), self.head_dim)  # (B, heads, L + 1, d)
        v = split_heads(self.v(text), self.head_dim)
        k_img = split_heads(self.norm_k_img(self.k_img(image)), self.head_dim)  # (B, heads, 257, d)
        v_img = split_heads(self.v_img(image), self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=text_bias)
        y = y + F.scaled_dot_product_attention(q, k_img, v_img)
        return self.o(join_heads(y))  # (B, N, D)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward on a float32 residual stream x (B, N, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim))
        self.self_attn = SelfAttention(cfg.dim, cfg.head_dim)
        self.norm3 = nn.LayerNorm(cfg.dim, eps=1e-6)
        self.cross_attn = CrossAttention(cfg.dim, cfg.head_dim)
        self.ffn = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU("tanh"),
                                 nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x, e0, rope, text, text_bias, image):
        six = (self.modulation + e0).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six  # each (B, 1, D)
        dtype = text.dtype  # what the Linears compute in
        y = self.self_attn(torch.addcmul(shift1, layer_norm(x), 1 + scale1).to(dtype), rope)
        x = torch.addcmul(x, gate1, y.float())
        x = x + self.cross_attn(self.norm3(x).to(dtype), text, text_bias, image)
        y = self.ffn(torch.addcmul(shift2, layer_norm(x), 1 + scale2).to(dtype))
        return torch.addcmul(x, gate2, y.float())


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim))
        self.head = nn.Linear(cfg.dim, 4 * cfg.out_dim)

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)  # each (B, 1, D)
        return self.head(torch.addcmul(shift, layer_norm(x), 1 + scale))  # (B, N, 4 * 16)


class ImageEmbedding(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(cfg.image_dim), nn.Linear(cfg.image_dim, cfg.image_dim),
                                  nn.GELU(), nn.Linear(cfg.image_dim, cfg.dim), nn.LayerNorm(cfg.dim))

    def forward(self, image):
        return self.proj(image)  # (B, 257, image width) -> (B, 257, D)


class WanDiT(nn.Module):
    """Predicts the velocity noise - x0 of noisy latents."""

    def __init__(self, cfg=DiTConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # what attention and the blocks' Linears compute in; the loader sets it
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, cfg.dim), nn.GELU("tanh"),
                                            nn.Linear(cfg.dim, cfg.dim))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(),
                                            nn.Linear(cfg.dim, cfg.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.img_emb = ImageEmbedding(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_blocks))
        self.head = Head(cfg)

    def embed_text(self, text):
        """(B, L, text width), L <= 512 -> (B, L + 1, D) and an attention bias (1, 1, 1, L + 1).

        The model saw every prompt padded with zeros to 512 tokens. The padding's tokens are all alike, so one
        of them stands for the 512 - L: adding log(512 - L) to its logit counts it that often in the softmax.
        """
        b, length, width = text.shape
        if length > TEXT_TOKENS:
            raise ValueError(f"text: got {length} tokens, expected at most {TEXT_TOKENS}: shorten the prompt")
        padding = text.new_zeros(b, 1, width, dtype=self.dtype)
        text = torch.cat([text.to(self.dtype), padding], 1)  # (B, L + 1, width)
        bias = torch.zeros(1, 1, 1, length + 1, dtype=self.dtype, device=text.device)
        bias[..., -1] = math.log(TEXT_TOKENS - length) if length < TEXT_TOKENS else -math.inf
        return self.text_embedding(text), bias

    def prepare(self, x, t, text, image, y):
        """forward's arguments -> tokens x (B, N, D), the time's embedding e (B, D) for the head, and what
        every block takes besides x."""
        _, _, frames, height, width = x.shape
        if height % 2 or width % 2 or y.shape[2:] != x.shape[2:]:
            raise ValueError(f"WanDiT: got x {tuple(x.shape)} and y {tuple(y.shape)}, expected the same "
                             f"T, H, W with H and W even: make the picture's sides multiples of 16 pixels")
        x = self.patch_embedding(torch.cat([x.float(), y.float()], dim=1))  # (B, D, T, H/2, W/2)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        rope = rope_3d(frames, height // 2, width // 2, self.cfg.head_dim, x.device)  # (N, d/2)
        e = self.time_embedding(timestep_embedding(t, self.cfg.freq_dim))  # (B, D)
        e0 = self.time_projection(e).unflatten(1, (6, -1))  # (B, 6, D)
        text, text_bias = self.embed_text(text)  # (B, L + 1, D)
        image = self.img_emb(image.float()).to(self.dtype)  # (B, 257, D)
        return x, e, (e0, rope, text, text_bias, image)

    def unpatchify(self, x, grid):
        """The head's x (B, N, 64) -> velocity (B, 16, T, H, W), grid = (T, H, W)."""
        return rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", t=grid[0], h=grid[1] // 2, p=2, q=2)

    def forward(self, x, t, text, image, y):
        """x (B, 16, T, H, W) noisy latents; t (B,) = 1000 * sigma; text (B, L, text width), not padded, or
        zeros past the prompt's end; image (B, 257, image width) from CLIPVision; y (B, 20, T, H, W) mask and
        latents of the picture -> velocity (B, 16, T, H, W), float32.

        Raises ValueError for odd H or W, a y of another size than x, and L > 512.
        """
        grid = x.shape[2:]
        x, e, context = self.prepare(x, t, text, image, y)
        for block in self.blocks:
            x = block(x, *context)  # (B, N, D)
        return self.unpatchify(self.head(x, e), grid)


# ----------------------------------------------------------------------------------------------------
# VAE: causal 3-D convolutions, 8x smaller in space, 4x in time
# ----------------------------------------------------------------------------------------------------
#
# Frame 0 is compressed alone, then every four frames become one latent frame, so T = 1 + (F - 1) / 4. All
# temporal convolutions look only backwards. The video therefore runs through in chunks, each layer keeping
# the last frames of its input for the next chunk: memory does not grow with length, and the result is the
# same however the video is cut. The state is one dict, `cache`, from layer to its last input frames.

LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True)
class VAEConfig:
    dims: tuple = (96, 192, 384, 384)  # channels of each level, full resolution first
    num_res_blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    temporal_downsample: tuple = (False, True, True)  # which of the steps down also halve time
    z_dim: int = 16  # latent channels


def channels_last(x):
    """(B, C, t, h, w), on a CPU in the order that oneDNN need not copy; mostly it is in it already."""
    return x.contiguous(memory_format=torch.channels_last_3d) if x.is_cpu else x


def conv3d(x, conv, padding=(0, 0, 0)):
    """x through an nn.Conv3d; in float32 on a CPU always by oneDNN: for one small video, torch itself takes a
    loop that is ten times slower."""
    x = channels_last(x)
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, 1)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding)


class CausalConv3d(nn.Conv3d):
    """Convolution over (B, C, t, h, w) that sees, in time, only the present and the past."""

    def __init__(self, c_in, c_out, kernel):
        super().__init__(c_in, c_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x, cache):
        if self.kernel_size[0] == 1:
            return conv3d(x, self)
        if self not in cache and x.shape[2] == 1:
            # The very first frame's past is zeros, so only the last temporal tap counts: a third of the work
            cache[self] = channels_last(F.pad(x, (0, 0, 0, 0, 1, 0)))  # (B, C, 2, h, w)
            y = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])
            return y[:, :, None]
        x = torch.cat([cache[self], x], dim=2) if self in cache else F.pad(x, (0, 0, 0, 0, 2, 0))
        cache[self] = x[:, :, -2:].clone()  # (B, C, 2, h, w); not a view, which would keep all of x
        return conv3d(x, self, self.padding)


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
        k = (3, 3, 3)
        silu = nn.SiLU(inplace=True)
        self.residual = nn.Sequential(ChannelNorm(c_in, 3), silu, CausalConv3d(c_in, c_out, k),
                                      ChannelNorm(c_out, 3), silu, nn.Identity(),  # where dropout was
                                      CausalConv3d(c_out, c_out, k))
        self.shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else None

    def forward(self, x, cache):
        skip = x if self.shortcut is None else self.shortcut(x, cache)
        return run_layers(self.residual, x, cache) + skip


def to_frames(x):
    """(B, C, t, h, w) -> (Bt, C, h, w). One video's are a view that is channels last if x is; of a view that
    merges B = 1 with t = 1, torch could not tell."""
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
        b, _, t, h, w = x.shape
        y = self.to_qkv(self.norm(to_frames(x)))  # (Bt, 3C, h, w)
        q, k, v = rearrange(y, "n (three c) h w -> three n 1 (h w) c", three=3)
        y = F.scaled_dot_product_attention(q, k, v)  # (Bt, 1, hw, C)
        y = self.proj(rearrange(y, "n 1 (h w) c -> n c h w", h=h))
        return x + to_video(y, b)


class Downsample(nn.Module):
    """Halve height and width, and with time_conv also time, except for the first frame."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, cache):
        b = x.shape[0]
        x = self.resample(to_frames(x))  # (Bt, C, h/2, w/2)
        x = to_video(x, b)
        if self.time_conv is None:
            return x
        past = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        if past is None:
            return x
        return conv3d(torch.cat([past, x], dim=2), self.time_conv)  # (B, C, t/2, h/2, w/2)


class Upsample(nn.Module):
    """Double height and width, and with time_conv also time, except for the first frame."""

    def __init__(self, dim, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"),
                                      nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x, cache):
        if self.time_conv is not None:
            if self in cache:  # the past of time_conv begins with the second latent frame
                x = self.time_conv(x, cache)  # (B, 2C, t, h, w)
                x = channels_last(rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2))
            cache[self] = True
        b = x.shape[0]
        x = self.resample(to_frames(x))  # (Bt, C/2, 2h, 2w)
        return to_video(x, b)


def run_layers(layers, x, cache):
    """Apply layers in order; those with a memory of earlier frames get the cache too."""
    remember = CausalConv3d, ResidualBlock, Downsample, Upsample
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, remember) else layer(x)
    return x


def middle_layers(dim):
    return nn.Sequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


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
        self.full = cfg.num_res_blocks + (not cfg.temporal_downsample[0])  # those at full size
        self.middle = middle_layers(c)
        self.head = nn.Sequential(ChannelNorm(c, 3), nn.SiLU(inplace=True),
                                  CausalConv3d(c, 2 * cfg.z_dim, (3, 3, 3)))

    def forward(self, x, cache):
        # At full size, where most of the memory goes, two frames at a time: to the caches it is all the same
        small = [run_layers(self.downsamples[:self.full], self.conv1(frames, cache), cache)
                 for frames in x.split(2, dim=2)]
        x = torch.cat(small, dim=2)  # (B, C, t, h/2, w/2)
        x = run_layers(self.downsamples[self.full:], x, cache)  # (B, C', t/4, h/8, w/8)
        x = run_layers(self.middle, x, cache)
        return run_layers(self.head, x, cache)  # (B, 2z, t/4, h/8, w/8)


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
        self.full = len(layers) - cfg.num_res_blocks - 2  # from the last upsampling on
        self.head = nn.Sequential(ChannelNorm(c, 3), nn.SiLU(inplace=True), CausalConv3d(c, 3, (3, 3, 3)))

    def begin(self, x, cache):
        """The layers at the latents' size, among them the only one that looks at a whole frame."""
        x = self.conv1(x, cache)  # (B, C', t, h, w)
        return run_layers(self.middle, x, cache)

    def grow(self, x, cache):
        x = run_layers(self.upsamples[:self.full], x, cache)  # (B, C, 4t, 4h, 4w)
        large = [run_layers(self.head, run_layers(self.upsamples[self.full:], frames, cache), cache)
                 for frames in x.split(2, dim=2)]  # as in the encoder
        return torch.cat(large, dim=2)  # (B, 3, 4t, 8h, 8w)

    def forward(self, x, cache):
        return self.grow(self.begin(x, cache), cache)


class WanVAE(nn.Module):
    """Between videos (B, 3, F, h, w) in [-1, 1] and normalised latents (B, 16, T, H, W)."""

    def __init__(self, cfg=VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # what it computes in; the loader sets it
        self.encoder = Encoder(cfg)
        self.conv1 = CausalConv3d(2 * cfg.z_dim, 2 * cfg.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(cfg.z_dim, cfg.z_dim, (1, 1, 1))
        self.decoder = Decoder(cfg)

    def encode(self, video):
        """(B, 3, F, h, w) in [-1, 1], F = 4k + 1, h and w multiples of 8 -> normalised latents
        (B, 16, T, H, W) in float32, the mean of the posterior. Raises ValueError for other sizes."""
        _, _, frames, h, w = video.shape
        if frames % 4 != 1 or h % 8 or w % 8:
            raise ValueError(f"WanVAE.encode: got {frames} frames of {h} x {w}, expected 4k + 1 frames with "
                             f"both sides multiples of 8")
        cache = {}
        latents = [self.conv1(self.encoder(x.to(self.dtype), cache), cache) for x in chunks(video, 4)]
        mean, std = latent_statistics(video.device, self.cfg.z_dim)
        return (torch.cat(latents, dim=2)[:, :self.cfg.z_dim].float() - mean) / std  # the rest is log-variance

    def decode_chunks(self, latents, tile=None):
        """The decoded video in pieces: (B, 3, 1, h, w) for the first latent frame, then (B, 3, 4, h, w).

        tile: None, or a number of latents, 2 * TILE_OVERLAP or more: squares of that side are decoded one after
        another, so that memory is theirs, and the video is put together on the CPU. Neighbours overlap and
        are blended; what no overlap touches is as without tiles, as attention has seen the whole frame."""
        mean, std = latent_statistics(latents.device, self.cfg.z_dim)
        cache = {}
        small = (self.decoder.begin(self.conv2(z, cache), cache)
                 for z in chunks((latents * std + mean).to(self.dtype), 1))
        if tile is None:
            for x in small:
                yield self.decoder.grow(x, cache).float().clamp(-1, 1)
            return
        small, (b, _, frames, h, w) = list(small), latents.shape
        video = torch.zeros(b, 3, 4 * frames - 3, 8 * h, 8 * w)
        for top, bottom, rows in tiles(h, tile):
            for left, right, columns in tiles(w, tile):
                blend, cache, at = rows[:, None] * columns, {}, 0
                for x in small:
                    x = self.decoder.grow(x[..., top:bottom, left:right], cache).float().cpu()
                    place = video[:, :, at:at + x.shape[2], 8 * top:8 * bottom, 8 * left:8 * right]
                    place += blend * x  # (B, 3, 4, 8 * tile, 8 * tile)
                    at += x.shape[2]
        yield from chunks(video.clamp(-1, 1), 4)

    def decode(self, latents):
        """Normalised latents (B, 16, T, H, W) -> video (B, 3, F, h, w) in [-1, 1], float32."""
        return torch.cat(list(self.decode_chunks(latents)), dim=2)


TILE_OVERLAP = 8  # latents that two tiles share


def tiles(length, tile):
    """Cut `length` latents into overlapping tiles: [(start, stop, weight of each pixel (8 * tile,)), ...].
    A tile's weight falls towards its edges, but not at the frame's; everywhere the weights add up to 1."""
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


def latent_statistics(device, z):
    """Mean and standard deviation of each latent channel, each (1, z, 1, 1, 1)."""
    return torch.tensor([LATENT_MEAN, LATENT_STD], device=device)[:, None, :z, None, None, None]


def chunks(x, size):
    """Cut (B, C, t, h, w) in time: the first frame alone, then pieces of `size` frames."""
    return [x[:, :, :1], *(x[:, :, 1:].split(size, dim=2) if x.shape[2] > 1 else ())]


# ----------------------------------------------------------------------------------------------------
# UMT5: the text encoder
# ----------------------------------------------------------------------------------------------------

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
    """(L, L) bucket of each key's distance from each query: half for keys ahead; in each half, half for exact
    distances, the rest in logarithmic steps up to 128. Source: T5 (arXiv 1910.10683)."""
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
        q, k, v = (split_heads(f(x), self.head_dim) for f in (self.q, self.k, self.v))  # (B, heads, L, d)
        # T5 does not divide by sqrt(d): its initialisation already did
        return self.o(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)))


class T5FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.fc2 = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x):
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativePosition(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.randn(cfg.buckets, cfg.heads), freeze=False)

    def forward(self, buckets):
        return self.embedding(buckets).permute(2, 0, 1)  # (L, L) -> (heads, L, L)


class T5Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = RMSNorm(cfg.dim)
        self.attn = T5Attention(cfg)
        self.norm2 = RMSNorm(cfg.dim)
        self.ffn = T5FeedForward(cfg)
        self.pos_embedding = RelativePosition(cfg)  # UMT5 has one in every block, T5 only in the first

    def forward(self, x, buckets, mask):
        bias = self.pos_embedding(buckets) + mask  # (B, heads, L, L)
        x = x + self.attn(self.norm1(x), bias.to(x.dtype))
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    def __init__(self, cfg=UMT5Config()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32
        self.token_embedding = nn.Embedding.from_pretrained(torch.randn(cfg.vocab, cfg.dim), freeze=False)
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.num_blocks))
        self.norm = RMSNorm(cfg.dim)

    def forward(self, ids, mask):
        """Token ids (B, L) and their mask (B, L), 1 for the prompt and 0 for padding -> features (B, L, D),
        zeros where the mask is 0."""
        table = self.token_embedding  # of gigabytes, so it stays in CPU memory: a prompt needs a few rows
        x = table(ids.to(table.weight.device)).to(ids.device, self.dtype)  # (B, L, D)
        buckets = relative_buckets(ids.shape[1], self.cfg.buckets, ids.device)  # (L, L)
        hide = torch.zeros(mask.shape, device=ids.device).masked_fill(mask == 0, -math.inf)  # (B, L)
        hide = hide[:, None, None]  # (B, 1, 1, L): the same for every head and query
        for block in self.blocks:
            x = block(x, buckets, hide)
        return self.norm(x) * (mask != 0)[..., None]


# ----------------------------------------------------------------------------------------------------
# CLIP: the image tower
# ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CLIPConfig:
    dim: int = 1280
    ffn_dim: int = 5120
    num_blocks: int = 31  # of the 32 in the file: the DiT is fed by the last but one
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
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)  # each (B, 257, D)
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))  # each (B, heads, 257, d)
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))


class CLIPBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.attn = CLIPAttention(cfg)
        self.norm2 = nn.LayerNorm(cfg.dim)
        self.mlp = nn.Sequential(nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU(), nn.Linear(cfg.ffn_dim, cfg.dim))

    def forward(self, x, dtype):
        x = x + self.attn(self.norm1(x).to(dtype))
        return x + self.mlp(self.norm2(x).to(dtype))


class CLIPVision(nn.Module):
    def __init__(self, cfg=CLIPConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32
        self.image_size = cfg.patch * math.isqrt(cfg.tokens - 1)  # 224 pixels a side
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch, cfg.patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, cfg.dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, cfg.tokens, cfg.dim))
        self.pre_norm = nn.LayerNorm(cfg.dim)
        self.transformer = nn.ModuleList(CLIPBlock(cfg) for _ in range(cfg.num_blocks))

    def forward(self, pixels):
        """Normalised pixels (B, 3, 224, 224) -> tokens (B, 257, D) of the last block but one, not normed."""
        x = self.patch_embedding(pixels.float()).flatten(2).transpose(1, 2)  # (B, 256, D)
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], dim=1)  # (B, 257, D)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer:
            x = block(x, self.dtype)
        return x


# ----------------------------------------------------------------------------------------------------
# IFNet: the frame between two
# ----------------------------------------------------------------------------------------------------
#
# RIFE 4.25 (arXiv 2011.06294; 4.26 differs in its weights only). For each pixel of the wanted frame, the flow
# says where the same thing is in a and in b; both are warped by it, and a mask mixes them. Five blocks find
# flow and mask from coarse to fine, each from how the frames still differ when warped by the flow so far.
# Convolutions run in `dtype`, the rest in float32: with bfloat16's 8 bits a position is off by whole pixels.

IFNET_SCALES = (16, 8, 4, 2, 1)  # by how much each block sees the frames reduced


@dataclass(frozen=True)
class IFNetConfig:
    dims: tuple = (192, 128, 96, 64, 32)  # channels of each block
    num_convs: int = 8  # residual convolutions a block
    encoder: int = 16  # channels inside the encoder
    features: int = 4  # that it gives each frame
    hidden: int = 8  # that a block hands to the next


def warp(x, flow):
    """Each pixel of x (B, C, h, w) from where flow (B, 2, h, w) points, in pixels to the right and down; from
    the border where that is outside."""
    h, w = x.shape[2:]
    across, down = (torch.linspace(-1, 1, n, device=x.device) for n in (w, h))
    across = across + flow[:, 0] * (2 / (w - 1))  # (B, h, w)
    down = down[:, None] + flow[:, 1] * (2 / (h - 1))  # (B, h, w)
    return F.grid_sample(x, torch.stack([across, down], -1), padding_mode="border", align_corners=True)


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
    """The frame between two frames."""

    def __init__(self, cfg=IFNetConfig()):
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # what convolutions compute in; the loader sets it
        self.encode = FrameEncoder(cfg)
        seen = 2 * (3 + cfg.features) + 1  # both frames, their features, the time
        self.block0 = IFBlock(seen, cfg.dims[0], cfg)
        for i, dim in enumerate(cfg.dims[1:], 1):  # and from the block before: mask, hidden, flow
            self.add_module(f"block{i}", IFBlock(seen + 1 + cfg.hidden + 4, dim, cfg))

    def forward(self, a, b, t=0.5):
        """Frames a, b (B, 3, h, w) in [0, 1] -> the frame (B, 3, h, w) in [0, 1], float32, at time t: a is at
        0, b at 1. Raises ValueError for frames of other or different shapes."""
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3:
            raise ValueError(f"IFNet: got frames {tuple(a.shape)} and {tuple(b.shape)}, expected both "
                             f"(B, 3, h, w) of one size: resize one to the other's")
        h, w = a.shape[2:]
        x = torch.cat([a, b]).float().clamp(0, 1)
        # The coarsest block sees 1/16 and halves it twice. RIFE pads with black, which spoils the edge
        x = F.pad(x, (0, -w % 64, 0, -h % 64), mode="replicate")  # (2B, 3, h', w')
        x = torch.cat([x, self.encode(x.to(self.dtype)).float()], 1)  # (2B, 3 + features, h', w')
        time = x.new_full((len(a), 1, *x.shape[2:]), t)
        warped, rest, flow = x, [], 0
        for i, scale in enumerate(IFNET_SCALES):
            known = [*warped[:, :3].chunk(2), *warped[:, 3:].chunk(2), time, *rest]  # each (B, ., h', w')
            out = self.get_submodule(f"block{i}")(torch.cat(known, 1), scale, self.dtype)
            flow = flow + out[:, :4] * scale  # (B, 4, h', w'): right and down in a, then in b
            warped = warp(x, torch.cat(flow.chunk(2, 1)))  # (2B, 3 + features, h', w')
            rest = [out[:, 4:], flow / (scale / 2)]  # in pixels as the next block sees them
        a, b = warped[:, :3].chunk(2)  # each (B, 3, h', w')
        return torch.lerp(b, a, out[:, 4:5].sigmoid())[..., :h, :w].clamp(0, 1)


# ----------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------

PICKLES = ".pth", ".pkl"  # what torch.save writes, without a header


def read_header(path):
    """A safetensors file's metadata {str: str} and {tensor name: (dtype name, shape)}, without its tensors.

    Raises FileNotFoundError, and ValueError for a file that is no safetensors."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            stored = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            return file.metadata() or {}, stored
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}): is the download complete?") from None


def shards(path):
    """The files that a path means: itself, the shards of an index .json, or a folder's."""
    path = Path(path)
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        files = shards(indices[0]) if indices else sorted(path.glob("*.safetensors"))
        if not files or len(indices) > 1:
            raise ValueError(f"{path}: got {len(indices)} indices and {len(files)} .safetensors files, "
                             f"expected one model: name its file")
        return files
    if path.suffix != ".json":
        return [path]
    try:
        names = json.loads(path.read_text())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: got no weight_map, expected the index of a sharded checkpoint") from None
    return [path.parent / name for name in sorted(set(names))]


def read_tensors(path):
    """A checkpoint's tensors by bare name, memory-mapped, and its header's metadata: one .safetensors, .pth
    or .pkl file, an index .json, or a folder of shards."""
    tensors, metadata = {}, {}
    for file in shards(path):
        if file.suffix in PICKLES:
            tensors |= read_pickle(file)
            continue
        metadata |= read_header(file)[0]
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return {bare_name(name): tensor for name, tensor in tensors.items()}, metadata


def read_pickle(path):
    """The tensors of a torch file, memory-mapped. Nothing in it is run: weights only."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path}: not a file of torch weights ({str(error).splitlines()[0]}): is the "
                         f"download complete?") from None


def bare_name(name):
    for prefix in ("model.diffusion_model.", "diffusion_model.", "visual.", "module."):
        name = name.removeprefix(prefix)
    return name


def tensor_names(path):
    """The bare names of the tensors that read_tensors would give, without reading them.
    Raises FileNotFoundError and ValueError for a file that is missing or broken."""
    names = (read_pickle(file) if file.suffix in PICKLES else read_header(file)[1] for file in shards(path))
    return {bare_name(name) for stored in names for name in stored}


# Other names than the official ones, part by part. ComfyUI's encoders have those of transformers
DIFFUSERS_DIT = (
    (r"^condition_embedder\.time_embedder\.linear_1\b", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2\b", "time_embedding.2"),
    (r"^condition_embedder\.time_proj\b", "time_projection.1"),
    (r"^condition_embedder\.text_embedder\.linear_1\b", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2\b", "text_embedding.2"),
    (r"^condition_embedder\.image_embedder\.norm1\b", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\b", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\b", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2\b", "img_emb.proj.4"),
    (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
    (r"_attn\.to_([qkv])\b", r"_attn.\1"), (r"_attn\.to_out\.0\b", "_attn.o"),
    (r"_attn\.add_([kv])_proj\b", r"_attn.\1_img"), (r"\bnorm_added_k\b", "norm_k_img"),
    (r"\.ffn\.net\.0\.proj\b", ".ffn.0"), (r"\.ffn\.net\.2\b", ".ffn.2"),
    (r"^(blocks\.\d+)\.norm2\b", r"\1.norm3"),  # diffusers counts its norms in the order of use
    (r"^scale_shift_table$", "head.modulation"), (r"\bscale_shift_table$", "modulation"),
    (r"^proj_out\b", "head.head"))
DIFFUSERS_VAE = (
    (r"^quant_conv\b", "conv1"), (r"^post_quant_conv\b", "conv2"), (r"coder\.conv_in\b", "coder.conv1"),
    (r"coder\.norm_out\b", "coder.head.0"), (r"coder\.conv_out\b", "coder.head.2"),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."), (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."), (r"\.down_blocks\.", ".downsamples."),
    (r"\.norm1\.gamma$", ".residual.0.gamma"), (r"\.norm2\.gamma$", ".residual.3.gamma"),
    (r"(\.\d+)\.conv1\.", r"\1.residual.2."), (r"(\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."))
TRANSFORMERS_UMT5 = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."), (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.", r"blocks.\1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."), (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."), (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."), (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."))
TRANSFORMERS_CLIP = (
    (r"^vision_model\.", ""), (r"^embeddings\.class_embedding$", "cls_embedding"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embedding"), (r"^embeddings\.", ""),
    (r"^pre_layrnorm\.", "pre_norm."), (r"^post_layernorm\.", "post_norm."),  # "layrn" is how they spell it
    (r"^encoder\.layers\.(\d+)\.", r"transformer.\1."), (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.2."))


def official_name(name, table):
    """A tensor's or layer's bare name in the table's naming, or the official one -> the official one."""
    for theirs, official in table:
        name = re.sub(theirs, official, name)
    return name


def official_dit_name(name):
    return official_name(name, DIFFUSERS_DIT)


def count(tensors, prefix):
    """How many numbered modules there are under a prefix: "blocks." -> 40."""
    return 1 + max((int(n[len(prefix):].split(".")[0]) for n in tensors if n.startswith(prefix)), default=-1)


def in_features(tensors, layer):
    """The input width of a Linear, quantized or not."""
    weight, marker = tensors[layer + ".weight"], tensors.get(layer + ".comfy_quant")
    shape = read_marker(marker, layer).get("orig_shape") if marker is not None else None
    return shape[1] if shape else weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)


def load_weights(model, tensors, path, device, dtype, float32=(), stream=False):
    """Give a model on the meta device its tensors, each moved to `device` once; return it in eval mode.

    Every Linear becomes a QuantLinear over the tensors as stored, computing in `dtype`, as convolutions do;
    in float32 where the name begins as one in `float32`. Norms, positions and modulations become float32.
    What stays where it is: a table of tokens, and with stream the blocks, made to compute on `device` all the
    same. Raises ValueError for tensors missing, left over or of a wrong shape.
    """
    groups = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        groups.setdefault(layer, {})[suffix] = tensor
    for name, module in list(model.named_modules()):
        stored = groups.pop(name, {})
        compute = torch.float32 if name.startswith(tuple(float32)) else dtype
        stays = name == "token_embedding" or stream and name.startswith("blocks.")
        if isinstance(module, nn.Linear):
            moved = {suffix: t if stays or suffix == "comfy_quant" else t.to(device)
                     for suffix, t in stored.items()}
            try:
                layer = QuantLinear.from_tensors(name, moved, module.in_features, module.out_features,
                                                 bias=module.bias is not None, compute_dtype=compute,
                                                 mode=default_mode(device))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            model.set_submodule(name, layer)
            continue
        for suffix, parameter in list(module.named_parameters(recurse=False)):
            where = f"{path}: {name}.{suffix}".replace(": .", ": ")
            if suffix not in stored:
                raise ValueError(f"{where}: got nothing, expected shape {tuple(parameter.shape)}: "
                                 f"is the file complete, and of this kind of network?")
            tensor = stored.pop(suffix)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{where}: got shape {tuple(tensor.shape)}, expected "
                                 f"{tuple(parameter.shape)}: is it from a model of another size?")
            if isinstance(module, nn.Embedding):
                compute = tensor.dtype
            elif not isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)):
                compute = torch.float32
            tensor = tensor.to(tensor.device if stays else device, compute)
            module.register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
        if stored:
            groups[name] = stored
    left = sorted(f"{layer}.{suffix}".lstrip(".") for layer, stored in groups.items() for suffix in stored)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"{path}: {left[0]}{more}: got a tensor that no layer takes, expected none: is the "
                         f"file of this kind of network?")
    model.dtype = dtype
    return model.eval()


def build(network, config, path):
    """The network on the meta device, where it takes no memory. Raises ValueError if a tensor is missing from
    which config() reads a size.

    The networks make their parameters by functions that C++ has for that device, unscaled: arithmetic on it
    would import torch's compiler, a second and a half.
    """
    try:
        with torch.device("meta"):
            return network(config())
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: got nothing, expected a tensor: is this a "
                         f"{network.__name__} checkpoint under the official names?") from None


def head_width(dim, metadata, usual, path):
    """The head width: the header's head_dim, else the usual one."""
    head_dim = int(metadata.get("head_dim", usual))
    if dim % head_dim:
        raise ValueError(f"{path}: head width {head_dim} does not divide the model's width {dim}: give the "
                         f"right one as head_dim in the file's header metadata")
    return head_dim


def dit_from_tensors(tensors, metadata, path, device="cpu", dtype=None, stream=False):
    """The diffusion transformer from its tensors by official name and the header's metadata; path is for
    messages. As load_dit otherwise."""
    def config():
        dim, in_dim = tensors["patch_embedding.weight"].shape[:2]
        return DiTConfig(dim=dim, ffn_dim=len(tensors["blocks.0.ffn.0.bias"]),
                         num_blocks=count(tensors, "blocks."),
                         head_dim=head_width(dim, metadata, 128, path), in_dim=in_dim,
                         out_dim=len(tensors["head.head.bias"]) // 4,
                         text_dim=in_features(tensors, "text_embedding.0"),
                         image_dim=len(tensors["img_emb.proj.0.weight"]),
                         freq_dim=tensors["time_embedding.0.weight"].shape[1])

    return load_weights(build(WanDiT, config, path), tensors, path, device, dtype or default_dtype(device),
                ("patch_embedding", "time_", "img_emb", "head"), stream)


def load_dit(path, device="cpu", dtype=None, loras=(), stream=False):
    """The diffusion transformer of a plain or quantized checkpoint, in eval mode.

    Linears stay as stored and memory-mapped. dtype is what they compute in: by default float32 on a CPU,
    bfloat16 elsewhere. loras: (file, strength) pairs; the model's `loras` then tells of each what was used.
    stream: `blocks` stay in CPU memory, mapped, for StreamedBlocks.
    Raises FileNotFoundError, and ValueError for tensors that are missing, left over, of a wrong shape or an
    unknown format, for a LoRA that fits nowhere, and for a model that needs its LoRA and did not get it.
    """
    tensors, metadata = read_tensors(path)
    check_loras(path, metadata, loras)
    tensors = {official_dit_name(name): tensor for name, tensor in tensors.items()}
    dit = dit_from_tensors(tensors, metadata, path, device, dtype, stream)
    dit.loras = [attach_lora(dit, file, strength) for file, strength in loras]
    return dit


def check_loras(path, metadata, loras):
    """Raises ValueError for a file that is no LoRA, and if the DiT at `path`, by its header's metadata, needs
    a LoRA that is not among these. What is mapped here is not read."""
    for file, _ in loras:
        read_lora(file)
    given = {(read_header(file)[0].get("lora_id"), strength) for file, strength in loras
             if Path(file).suffix not in PICKLES}
    needed = metadata.get("needs_lora")  # see convert.py, --lora-mode absorb
    if needed and (needed, 1) not in given:
        raise ValueError(f"{path}: a part of its weights is in its LoRA: got {len(loras)} LoRAs, expected "
                         f"{needed} among them, at strength 1: give --lora {needed}")


# by the end of a tensor's name in a LoRA file: a factor of W + strength * alpha / r * up @ down, or what a
# whole difference is added to
LORA_PARTS = {"lora_up": "up", "lora_B": "up", "lora_down": "down", "lora_A": "down", "alpha": "alpha",
              "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


def read_lora(path):
    """A LoRA file -> {layer's official name: {part: tensor}}, parts as in LORA_PARTS. Raises ValueError for a
    tensor that is none of them."""
    layers = {}
    for name, tensor in read_tensors(path)[0].items():
        bare = re.sub(r"^(base_model\.model|transformer)\.|(\.default)?\.weight$", "", name)
        layer, _, suffix = bare.rpartition(".")
        if suffix not in LORA_PARTS:
            raise ValueError(f"{path}: {name}: got a tensor that is no part of a LoRA, expected a name that "
                             f"ends in one of {', '.join(LORA_PARTS)}: is it a whole model?")
        layers.setdefault(official_dit_name(layer), {})[LORA_PARTS[suffix]] = tensor
    return layers


def attach_lora(model, path, strength=1.0):
    """Add a LoRA to a model: factors as side branches of its Linears, whole differences to what they name.

    Returns a line that says how much was used, and what was not and why. Raises ValueError if nothing fits,
    for shapes that do not, and for an up without its down. No parameter is written to: they may be mapped.
    """
    modules, layers, branches, differences, skipped = dict(model.named_modules()), read_lora(path), 0, 0, []
    for name, parts in layers.items():
        module = modules.get(name)
        factors = [part for part in ("up", "down", "alpha") if part in parts]
        if factors and not {"up", "down"} <= parts.keys():
            raise ValueError(f"{path}: {name}: got {' and '.join(factors)} alone, expected lora_up and "
                             f"lora_down, or lora_B and lora_A: is the file complete?")
        if module is None:
            skipped.append(f"{name} (no such layer)")
            continue
        if "up" in parts and not isinstance(module, QuantLinear):
            skipped.append(f"{name} (not a Linear)")
        elif "up" in parts:
            up, down = parts["up"].to(module.weight.device), parts["down"].to(module.weight.device)
            rank = max(1, down.numel() // module.in_features)
            if (up.shape, down.shape) != ((module.out_features, rank), (rank, module.in_features)):
                raise ValueError(f"{path}: {name}: got up {tuple(up.shape)} and down {tuple(down.shape)}, "
                                 f"expected ({module.out_features}, r) and (r, {module.in_features}): for "
                                 f"another model?")
            alpha = parts["alpha"].item() if "alpha" in parts else rank
            module.attach_lora(up, down, strength * alpha / rank)
            branches += 1
        for part in ("weight", "bias", "modulation"):
            old = getattr(module, part, None)
            if part not in parts:
                continue
            if old is None:
                skipped.append(f"{name} (has no {part})")
            elif part == "weight" and getattr(module, "format", None):
                skipped.append(f"{name} (its weight is quantized: a difference cannot be added)")
            elif old.shape != parts[part].shape:
                raise ValueError(f"{path}: {name}: got a difference of shape {tuple(parts[part].shape)}, "
                                 f"expected that of its {part}, {tuple(old.shape)}: for another model?")
            else:
                new = old.float() + strength * parts[part].to(old.device).float()
                setattr(module, part, nn.Parameter(new.to(old.dtype), requires_grad=False))
                differences += 1
    if not branches + differences:
        raise ValueError(f"{path}: got {len(layers)} layers, none of which fits, the first "
                         f"{next(iter(skipped), 'none')}; expected such as "
                         f"{next(n for n in modules if n.endswith('.q'))}: for another kind of model?")
    used = f"{Path(path).name}: {branches} layers" + (f", {differences} differences" if differences else "")
    return used + (f", skipped {len(skipped)}: {skipped[0]}" if skipped else "")


def load_vae(path, device="cpu", dtype=None):
    """The video autoencoder, in eval mode. dtype as for load_dit; raises the same errors."""
    tensors, _ = read_tensors(path)
    each = count(tensors, "decoder.up_blocks.0.resnets.")  # residual blocks; a level's upsampler follows them

    def flat(match):
        level, kind, i = int(match[1]), match[2], int(match[3])
        return f".upsamples.{level * (each + 1) + (i if kind == 'resnets' else each)}."
    tensors = {official_name(re.sub(r"\.up_blocks\.(\d+)\.(\w+)\.(\d+)\.", flat, name), DIFFUSERS_VAE): tensor
               for name, tensor in tensors.items()}

    def config():
        dims, temporal, blocks, c = [], [], 0, 0
        for i in range(count(tensors, "encoder.downsamples.")):
            layer = f"encoder.downsamples.{i}."
            if layer + "resample.1.weight" in tensors:
                temporal.append(layer + "time_conv.weight" in tensors)
                dims.append(c)
            else:
                c = len(tensors[layer + "residual.6.bias"])
                blocks += not dims
        return VAEConfig(dims=(*dims, c), num_res_blocks=blocks, temporal_downsample=tuple(temporal),
                         z_dim=len(tensors["conv2.bias"]))

    return load_weights(build(WanVAE, config, path), tensors, path, device, dtype or default_dtype(device))


def load_umt5(path, device="cpu", dtype=None, stream=False):
    """The text encoder, in eval mode. dtype and stream as for load_dit; raises the same errors."""
    tensors, _ = read_tensors(path)
    tensors = {official_name(n, TRANSFORMERS_UMT5): t for n, t in tensors.items()
               if n not in ("spiece_model", "scaled_fp8")}  # no weights

    def config():
        (vocab, dim), (buckets, heads) = (tensors[n].shape for n in (
            "token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"))
        return UMT5Config(vocab=vocab, dim=dim, ffn_dim=len(tensors["blocks.0.ffn.fc1.weight"]),
                          num_blocks=count(tensors, "blocks."), heads=heads,
                          inner=len(tensors["blocks.0.attn.q.weight"]), buckets=buckets)

    return load_weights(build(UMT5Encoder, config, path), tensors, path, device, dtype or default_dtype(device),
                stream=stream)


def load_clip(path, device="cpu", dtype=None):
    """The image tower, in eval mode, without its last block, which Wan does not use. dtype as for load_dit;
    raises the same errors."""
    tensors, metadata = read_tensors(path)
    tensors = {official_name(n, TRANSFORMERS_CLIP): t for n, t in tensors.items()}
    for name in [n for n in tensors if ".self_attn.q_proj." in n]:
        parts = [tensors.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        tensors[name.replace(".self_attn.q_proj.", ".attn.to_qkv.")] = torch.cat(parts)
    if "cls_embedding" in tensors and tensors["cls_embedding"].dim() == 1:
        tensors["cls_embedding"] = tensors["cls_embedding"][None, None]
        tensors["pos_embedding"] = tensors["pos_embedding"][None]
    last = count(tensors, "transformer.") - 1
    unused = (f"transformer.{last}.", "post_norm.", "head", "textual.", "log_scale", "visual_projection.",
              "position_ids")
    tensors = {n: t for n, t in tensors.items() if not n.startswith(unused)}

    def config():
        dim, _, patch, _ = tensors["patch_embedding.weight"].shape
        return CLIPConfig(dim=dim, ffn_dim=len(tensors["transformer.0.mlp.0.bias"]), num_blocks=last,
                          head_dim=head_width(dim, metadata, 80, path), patch=patch,
                          tokens=tensors["pos_embedding"].shape[1])

    return load_weights(build(CLIPVision, config, path), tensors, path, device, dtype or default_dtype(device),
                float32=("patch_embedding",))


def load_ifnet(path, device="cpu", dtype=None):
    """The frame interpolator, RIFE's flownet.pkl of version 4.25 or 4.26 (not lite: it has other scales), in
    eval mode. dtype is what its convolutions compute in, as for load_dit; raises the same errors."""
    tensors, _ = read_tensors(path)
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("teacher.", "caltime."))}  # training's

    def config():
        return IFNetConfig(dims=tuple(len(tensors[f"block{i}.lastconv.0.weight"]) for i in range(5)),
                           num_convs=count(tensors, "block0.convblock."),
                           encoder=len(tensors["encode.cnn0.bias"]),
                           features=len(tensors["encode.cnn3.bias"]),
                           hidden=len(tensors["block0.lastconv.0.bias"]) // 4 - 5)

    return load_weights(build(IFNet, config, path), tensors, path, device, dtype or default_dtype(device))
