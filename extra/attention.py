"""8-bit self-attention, for sample.py --attention fp8.

Self-attention is half of a forward at full size, and its products run in 16 bits. GPUs from sm_89 (RTX 4090) also
multiply in E4M3, twice as fast. FlexAttention has such kernels; torch does not advertise them, and nothing here
has been run on a GPU. Elsewhere the same arithmetic is emulated, to see its quality.

Letters in the shapes: B batch, N tokens, d head width.
"""
import functools
import re

import torch

import quant
import wan_fp4


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


@quant.compiled_on_cuda
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


@quant.compiled_on_cuda
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
    """Whether tensor cores of this device multiply in E4M3: NVIDIA GPUs from sm_89."""
    return quant.capability(device) >= (8, 9)


def use_fp8_attention(dit, path):
    """Use fp8_attention in the blocks of a WanDiT loaded from `path`, except in those that its header lists:
    convert.py --calib found them too sensitive. Returns their numbers. Raises ValueError for a bad list."""
    kept = wan_fp4.read_metadata(path).get("bf16_attention", "")
    if not re.fullmatch("([0-9]{1,4}(,[0-9]{1,4})*)?", kept):
        raise ValueError(f"{path}: bf16_attention in its header: got {kept[:50]!r}, expected the numbers of "
                         f"blocks, such as 0,39; remove it")
    numbers = [int(number) for number in kept.split(",") if number]
    for i, block in enumerate(dit.blocks):
        if i not in numbers:
            block.self_attn.attention = fp8_attention
    return numbers
