"""Rounding by what each layer is fed: convert.py -i MODEL --calib PICTURE...

The pipeline runs on pictures with the recipe's four steps and the unquantized model, which gives the DiT's
inputs at the four timesteps (calibrate). Then the DiT runs on all of them together, one block at a time: record
what each layer of the block is fed, round the block, and feed the next block with the outputs of the rounded one
(round_blocks). So each block is rounded with the errors of those before it in its inputs. Memory holds one block
and the tokens of all inputs.

A layer's output is off by x E^T, where E = W - Q (M, K) is the error of its weights. Averaged over inputs x with
second moment H = mean(x^T x), the squared error is tr(E H E^T): each row e of E contributes e H e^T, whatever the
others are. The columns are rounded one after another, and each compensates for the errors of those before it:

    H = N diag(D) N^T, N unit upper triangular      so      e H e^T = sum_j D_j (e_j + sum_{k<j} N_kj e_k)^2

Once the columns k < j are rounded, term j is smallest if q_j is the value nearest to w_j + sum_k N_kj e_k, and
the remaining difference costs D_j times its square. This is GPTQ (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323), which computes the same numbers from the inverse of H. Here the scale of each
block is chosen along the way: ten candidate scales run through the block's columns side by side, and the one with
the smallest sum of terms is kept.

The first columns know nothing of those after them, so sweeps follow: each block is rounded again while all others
are fixed. Then e H e^T is a parabola in the block's q with its minimum at q + H_bb^-1 (H e)_b, of the form above
with H_bb in place of H. A row takes the new codes only if they cost less, so the error never rises.

For callers: quantize_weight(w, fmt, hessian) for one weight; calibrate and round_blocks for a model.
"""
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import convert
import quant
import sample
import wan_fp4
from extra.attention import fp8_attention

# ----------------------------------------------------------------------------------------------------
# Sample: the DiT's inputs
# ----------------------------------------------------------------------------------------------------

def calibrate(source, pictures, named=None, models=None, samples=8192, seed=0, device="cpu"):
    """Sample a video from each picture and record the DiT's inputs at every step. Returns a Calibration.

    source    a convert.Source
    pictures  their paths. A picture's prompt is the text file beside it, or else that in the source's header
    named     {"text-encoder": path or None, "clip": ..., "vae": ..., "dit": ...}; the others are looked for in
              the folder `models`, as sample.find_files does. "dit" is Wan2.2's high-noise expert, whose steps
              come before those of a low-noise source
    samples   the maximum number of rows to record for each layer

    Raises what sample.py and the loaders raise, and ValueError if the encoders do not fit the model.
    """
    files = find_networks(source, named or {}, models)
    own = sample.own_settings(files | ({"dit-low": source.path} if source.expert else {}))
    settings = sample.Settings(**{name: own[name] for name in own if name != "prompt"}, seed=seed, device=device)
    images = [sample.read_image(path) for path in pictures]
    captions = [path.with_suffix(".txt") for path in map(Path, pictures)]
    prompts = [read_caption(path) if path.exists() else source.metadata.get("prompt", "") for path in captions]
    *before, (_, _, levels) = runs(source, files, settings)

    sized = [sample.resize(image, *sample.video_size(image, settings)) for image in images]
    with torch.no_grad():
        texts = sample.encode_text(files["text-encoder"], prompts, device)  # (1, L, D) each
        tokens = sample.encode_images(files["clip"], images, device) if "clip" in files else [None] * len(images)
        frames = sample.encode_first_frames(files["vae"], sized, settings.frames, device)  # (1, 20, T, H, W) each
        generators = [torch.Generator().manual_seed(seed) for _ in images]
        latents = [torch.randn((1, 16, *y.shape[2:]), generator=generator).to(device)
                   for y, generator in zip(frames, generators)]
        for path, _, high in before:  # the high-noise expert's steps lead to the low-noise expert's first inputs
            dit = sample.load_dit(path, (), settings, frames[0])
            for i, (text, y) in enumerate(zip(texts, frames)):
                def velocity(x, sigma):
                    return dit(x, torch.full((1,), 1000 * sigma, device=device), text, None, y)
                latents[i] = sample.sample_latents(velocity, latents[i], high, settings.sampler, generators[i])
            dit = None

    calibration = Calibration(source, samples, len(levels) - 1, device)
    calibration.files = [file for path in files.values() for file in wan_fp4.shards(path)]
    calibration.files += [*map(Path, pictures), *(path for path in captions if path.exists())]
    cfg = calibration.dit.cfg
    widths = texts[0].shape[2], None if tokens[0] is None else tokens[0].shape[2]
    if widths != (cfg.text_dim, cfg.image_dim):
        raise ValueError(f"--calib: {files['text-encoder']} and {files.get('clip')}: got features of width "
                         f"{widths[0]} and {widths[1]}, expected {cfg.text_dim} and {cfg.image_dim} for this "
                         f"model; give the folder of its own encoders with --models")

    total = len(images) * (len(levels) - 1) * calibration.num_blocks
    with tqdm(total=total, desc="sampling", unit="block", disable=None) as progress:
        for x, generator, *conditions in zip(latents, generators, texts, tokens, frames):
            velocity = functools.partial(calibration.velocity, conditions=conditions, progress=progress.update)
            sample.sample_latents(velocity, x, levels, settings.sampler, generator)
    calibration.print_attention()
    return calibration


def read_caption(path):
    with wan_fp4.reading(path, "text file in UTF-8"):
        return path.read_text("utf-8").strip()


def find_networks(source, named, models):
    """{network: file} of what runs: the source, those named, others from the folder `models`, or else the demo's.
    Raises ValueError for one of Wan2.2's experts if it cannot be told which."""
    if not source.expert and wan_fp4.is_expert(source.path):
        raise ValueError(f"--calib: {source.path}: got one of Wan2.2's experts, expected high_noise or low_noise "
                         f"in its name or its folder's; rename it")
    own = {"low": "dit-low"}.get(source.expert, "dit")
    wanted = ["text-encoder", "vae"] if source.expert else ["text-encoder", "clip", "vae"]
    wanted += ["dit"] if own == "dit-low" else []
    unused = [flag for flag, path in named.items() if path and flag not in wanted]
    if unused:
        raise ValueError(f"--{unused[0]}: this model's calibration does not use it; leave it out")
    files, _ = sample.find_files({flag: named.get(flag) for flag in wanted}, models)
    if own == "dit-low" and not wan_fp4.is_expert(files["dit"]):
        raise ValueError(f"--calib: {source.path} is Wan2.2's low-noise expert, got {files['dit']} for the steps "
                         f"before it, expected the high-noise one; name it with --dit")
    return files | {own: source.path}


def runs(source, files, settings):
    """sample.experts, up to the source: what runs before it, and its own noise levels."""
    if not source.expert:
        return sample.experts(files, settings)
    high, low = sample.experts({"dit": source.path, "dit-low": source.path} | files, settings)
    return [high, low] if source.expert == "low" else [high]


class Calibration:
    """The DiT, one block at a time: velocity() records its inputs; stages() runs on all those recorded."""

    def __init__(self, source, samples, steps, device="cpu"):
        self.source, self.samples, self.steps, self.device = source, samples, steps, torch.device(device)
        first = {name: source.tensor(name) for name in source.shapes
                 if not name.startswith("blocks.") or name.startswith("blocks.0.")}
        self.dit = wan_fp4.dit_from_tensors(first, source.metadata, source.path, self.device)
        self.num_blocks = wan_fp4.count(source.shapes, "blocks.")
        self.files = []  # read besides the source
        self.inputs = []  # arguments of WanDiT.prepare
        self.attention_losses = torch.zeros(self.num_blocks, 2)  # of E4M3; of rounding the output to NVFP4

    def velocity(self, x, sigma, conditions, progress):
        """WanDiT.forward, block by block; records its inputs and calls progress() after each block."""
        text, image, y = conditions
        inputs = x, torch.full((1,), 1000 * sigma, device=self.device), text, image, y
        self.inputs.append(moved(inputs, "cpu"))
        tokens, e, context = self.dit.prepare(*inputs)
        for i in range(self.num_blocks):
            block = self.block(i)
            block.self_attn.attention = functools.partial(self.attention, i)
            tokens = block(tokens, *context)
            progress()
        return self.dit.unpatchify(self.dit.head(tokens, e), x.shape[2:])

    def block(self, i):
        """Block i of the source, loaded each time: none stays in memory."""
        prefix = f"blocks.{i}."
        tensors = {name.removeprefix(prefix): self.source.tensor(name)
                   for name in self.source.shapes if name.startswith(prefix)}
        with torch.device("meta"):
            block = wan_fp4.Block(self.dit.cfg)
        return wan_fp4.load_weights(block, tensors, self.source.path, self.device, self.dit.dtype)

    def attention(self, i, q, k, v):
        """Self-attention of block i; adds up what some of its rows would lose in E4M3, and in NVFP4."""
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        few = slice(None, None, math.ceil(q.shape[2] / 64))
        exact = y[:, :, few].float()  # (B, heads, 64, d)
        rows = exact.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * 64, D)
        losses = fp8_attention(q[:, :, few], k, v) - exact, as_nvfp4(rows) - rows
        self.attention_losses[i] += torch.stack([x.square().sum() / rows.square().sum() for x in losses]).cpu()
        return y

    def sensitive_attention(self):
        """The blocks whose self-attention loses more in E4M3 than the next layer's rounding to NVFP4 does."""
        e4m3, nvfp4 = self.attention_losses.T
        return (e4m3 > nvfp4).nonzero().flatten().tolist()

    def header_entries(self):
        """For sample.py --attention fp8: the blocks that it must keep in bf16."""
        kept = self.sensitive_attention()
        return {"bf16_attention": ",".join(map(str, kept))} if kept else {}

    def print_attention(self):
        losses = self.attention_losses.mean(0) / len(self.inputs)
        e4m3, nvfp4 = (-10 * losses.log10()).tolist()
        kept = ", ".join(map(str, self.sensitive_attention())) or "none"
        print(f"self-attention in E4M3: {e4m3:.1f} dB, rounding its output to NVFP4: {nvfp4:.1f} dB; blocks that "
              f"--attention fp8 keeps in bf16: {kept}")

    @torch.no_grad()
    def stages(self, again=False):
        """Yields (module, prefix, {weight name: Inputs}): the DiT for its embeddings, then each block. again: the
        caller replaces the module's layers, and the next module is fed with what these compute.

        Inputs and outputs stay in CPU memory: at full size, the tokens of a picture's steps take 2.7 GB.
        """
        module, prefix, forward, feeds = self.dit, "", self.dit.prepare, self.inputs
        for i in range(self.num_blocks + 1):
            def run():
                return [moved(forward(*moved(args, self.device)), "cpu") for args in feeds]

            seen, outputs = self.record(module, prefix, run)
            yield module, prefix, seen
            if i == self.num_blocks:
                return
            outputs = run() if again else outputs
            if i == 0:
                feeds = [(x, *context) for x, _, context in outputs]  # arguments of a block
            else:
                feeds = [(x, *context) for x, (_, *context) in zip(outputs, feeds)]
            module = forward = self.block(i)
            prefix = f"blocks.{i}."

    def record(self, module, prefix, run):
        """{weight name: Inputs} of what run() feeds the module's Linears, and what it returns."""
        seen, last = {}, (None, None)

        def add(name, layer, args):
            nonlocal last
            x = args[0]
            if x is last[0]:  # q, k and v are fed the same tensor: one second moment for all three
                seen[name] = last[1]
                return
            if name not in seen:
                seen[name] = Inputs(self.samples, len(self.inputs), self.steps)
            seen[name].add(x.flatten(0, -2))
            last = x, seen[name]

        hooks = [layer.register_forward_pre_hook(functools.partial(add, name))
                 for name, layer in linears(module, prefix)]
        outputs = run()
        for hook in hooks:
            hook.remove()
        return seen, outputs


def moved(value, device):
    """A tensor, or a tuple of them, of further tuples and of None, on another device."""
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    return None if value is None else value.to(device)


def as_nvfp4(x, tensor_scale=None):
    """x (R, K) rounded to NVFP4, as activations are."""
    return quant.dequantize_nvfp4(*quant.quantize_nvfp4(x, tensor_scale), shape=tuple(x.shape))


def linears(module, prefix):
    """Yields (weight name, layer) of the Linears that may be quantized: of a block, or of the DiT (prefix "")."""
    for name, layer in module.named_modules():
        weight = f"{prefix}{name}.weight"
        if isinstance(layer, quant.QuantLinear) and (prefix or convert.OPTIONAL.fullmatch(weight)):
            yield weight, layer


class Inputs:
    """What one layer is fed: second moment (K, K), and a sample of the rows (R, K)."""

    def __init__(self, samples, forwards, steps):
        self.share, self.forwards, self.steps = math.ceil(samples / forwards), forwards, steps
        self.moment, self.count, self.rows = 0, 0, []

    def add(self, x):
        """Record the rows of x (R, K), at most `share` of them, evenly spaced."""
        x = x[::math.ceil(len(x) / self.share)].float()
        self.moment, self.count = self.moment + x.T @ x, self.count + len(x)
        self.rows.append(x[::math.ceil(len(x) * self.forwards / 512)].clone())  # a view would keep all of x

    def hessian(self):
        """The second moment, shrunk toward a multiple of the identity by oracle approximating shrinkage (Chen
        et al. 2010, https://arxiv.org/abs/0907.4698): a prompt has only a dozen tokens, and the weight must
        work for all others too. The inputs of different timesteps resemble each other, so they count once.
        """
        h, k, n = self.moment / self.count, len(self.moment), self.count / self.steps
        trace = h.diagonal().double().sum().item()
        square = torch.linalg.vector_norm(h, dim=1).double().square().sum().item()
        spread = (n + 1) * (square - trace ** 2 / k)
        rho = min(1.0, (square + trace ** 2) / spread) if spread > 0 else 1.0
        h = h * (1 - rho)
        h.diagonal().add_(rho * trace / k)
        return h


# ----------------------------------------------------------------------------------------------------
# Round the model: load a block, feed it, round it, replace its layers, run it again
# ----------------------------------------------------------------------------------------------------

def round_blocks(calibration, formats, exact, ranks, method, num_iter, seed, output, done):
    """Yields (name, result) for each tensor of the source that is not in `done`, result as convert.round_tensor
    gives it. The caller writes it to `output`, a convert.Output, before it asks for the next; from there each
    block's layers are read back, those of an interrupted run too."""
    source = calibration.source
    for module, prefix, seen in calibration.stages(again=True):
        names = [name for name in source.shapes
                 if (name.startswith(prefix) if prefix else not name.startswith("blocks."))]

        def work(name):
            return round_tensor(source, name, formats.get(name, "bf16"), name in exact, calibration.device,
                                method, num_iter, ranks.get(name, 0), seed, seen.get(name))

        yield from convert.in_order(work, [name for name in names if name not in done], calibration.device)
        written, _ = wan_fp4.read_safetensors(output.part)  # its header is complete, so it reads like any other
        for name in names:
            if formats.get(name, "bf16") != "bf16":
                layer = name.removesuffix("weight")
                replace(calibration, module, prefix, name,
                        {stored.removeprefix(layer): tensor for stored, tensor in written.items()
                         if stored.startswith(layer) and not stored.endswith(".bias")})


def round_tensor(source, name, fmt, full_precision, device, method, num_iter, rank, seed, inputs):
    """convert.round_tensor for the Inputs of the layer: also measures the error of its outputs."""
    w = source.tensor(name)
    if fmt == "bf16":
        return {}, {name: w}, {}
    w, hessian = w.to(device), inputs.hessian().to(device)
    if method == "rtn":
        stored = convert.quantize_weight(w, fmt, method, full_precision)
    else:
        stored = quantize_weight(w, fmt, hessian, num_iter, full_precision)
    measures = {"weight": convert.snr, "output": functools.partial(output_snr, moment=inputs.moment.to(device))}
    factors = functools.partial(low_rank, rank=rank, hessian=hessian, seed=seed) if rank else None
    return convert.evaluate(name, w, stored, measures, factors)


def output_snr(w, approximation, moment):
    """Signal-to-noise ratio in dB of a layer's outputs, for the second moment of its inputs: that of tr(W H
    W^T)."""
    return convert.snr(w, approximation, lambda x: (x @ moment).mul_(x).sum(1).double().sum().item())


@torch.no_grad()
def low_rank(error, rank, hessian, seed=0):
    """convert.low_rank for the energy of the outputs' error. With H = C C^T it is |error C|^2 = tr(E H E^T),
    which is concentrated in far fewer directions; the best factors are those of error C, with down multiplied by
    C^-1."""
    root = torch.linalg.cholesky(damped(hessian)).float()  # C (K, K)
    up, down, shares = convert.low_rank(error @ root, rank, seed)
    return up, torch.linalg.solve_triangular(root, down, upper=False, left=False), shares


DAMPING = 0.01  # added to the diagonal of a Hessian, whose mean is 1: an allowance for inputs that were not seen


def damped(hessian):
    """hessian (K, K) -> float64, scaled to a mean diagonal of 1, with DAMPING added."""
    h = hessian.double() / hessian.diagonal().double().mean().clamp(min=1e-30)
    h.diagonal().add_(DAMPING)
    return h


def replace(calibration, module, prefix, name, stored):
    """Give a weight of the module its rounded tensors."""
    layer = name.removesuffix(".weight")
    place = layer.removeprefix(prefix)
    old = module.get_submodule(place)
    tensors = stored if old.bias is None else stored | {"bias": old.bias}
    new = quant.QuantLinear.from_tensors(
        layer, {suffix: tensor.to(calibration.device) for suffix, tensor in tensors.items()}, old.in_features,
        old.out_features, compute_dtype=calibration.dit.dtype, mode="dequantize")
    module.set_submodule(place, new)


# ----------------------------------------------------------------------------------------------------
# Round one weight
# ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def quantize_weight(w, fmt, hessian, num_iter=4, full_precision=False):
    """convert.quantize_weight for the least error of the outputs.

    hessian    (K, K), the second moment x^T x of the layer's inputs, of any scale
    num_iter   the maximum number of sweeps after the first rounding. The first removes a tenth of the error, four
               a seventh, all later ones a hundredth

    "fp8" and "bf16" have no blocks to choose scales for: they are as in convert.quantize_weight.
    """
    if fmt not in quant.BLOCK:
        return convert.quantize_weight(w, fmt, full_precision=full_precision)
    stored = dict(zip(("weight", "weight_scale", "weight_scale_2"), round_compensated(w, fmt, hessian, num_iter)))
    marker = convert.marker(fmt, w.shape, w.dtype, full_precision)
    return stored | {"comfy_quant": quant.write_marker(marker)}


def round_compensated(w, fmt, hessian, num_iter):
    """As quant.quantize_nvfp4 or quantize_mxfp8, but for the least tr(E H E^T)."""
    expected = (w.shape[1], w.shape[1])
    if tuple(hessian.shape) != expected or not hessian.isfinite().all():
        raise ValueError(f"quantize_weight: got hessian {tuple(hessian.shape)}, expected {expected}, all finite")
    if not w.isfinite().all():
        raise ValueError("quantize_weight: got NaN or infinite values, expected finite ones")
    tensor_scale = quant.quantize_nvfp4(w)[2] if fmt == "nvfp4" else None
    size = quant.BLOCK[fmt]
    w = quant.pad_to(w.float(), size, size).T.contiguous()  # (K, M)
    h = damped(F.pad(hessian.double(), (0, len(w) - len(hessian)) * 2))  # (K, K)
    blocks = len(w) // size

    # The blocks that matter most come first, while most columns are left to compensate.
    order = h.diagonal().view(blocks, size).sum(1).argsort(descending=True)  # (N,)
    columns = (order[:, None] * size + torch.arange(size, device=w.device)).flatten()  # (K,)
    w, h = w[columns], h[columns][:, columns]
    scale_bytes, q = round_once(fmt, w, h, tensor_scale)
    sweep(fmt, w, h, tensor_scale, scale_bytes, q, num_iter)

    values, scales = torch.empty_like(q), torch.empty_like(scale_bytes)
    values[columns], scales[order] = q, scale_bytes  # back to the weight's own order
    values, scales = values.T.reshape(-1, blocks, size), scales.T.contiguous()  # (M, N, B), (M, N)
    if fmt == "mxfp8":
        data = quant.encode_mxfp8(values, torch.exp2(scales.float() - 127)).flatten(1)  # (M, K)
        return data, quant.swizzle(scales)
    scales = scales.view(torch.float8_e4m3fn)
    data = quant.pack_e2m1(quant.encode_nvfp4(values, scales.float() * tensor_scale)).flatten(1)  # (M, K/2)
    return data, quant.swizzle(scales), tensor_scale


def round_once(fmt, w, h, tensor_scale):
    """Round w (K, M) block after block, each compensating for those before it -> scale bytes (N, M), q (K, M)."""
    size = quant.BLOCK[fmt]
    q, error = torch.zeros_like(w), torch.zeros_like(w)  # (K, M)
    scale_bytes = torch.zeros(len(w) // size, w.shape[1], dtype=torch.uint8, device=w.device)  # (N, M)
    n, d = factor(h)
    for i in range(len(scale_bytes)):
        b = slice(i * size, (i + 1) * size)
        target = w[b] + n[:b.start, b].T @ error[:b.start]  # (B, M)
        scale_bytes[i], q[b], _ = round_block(fmt, target, n[b, b], d[b], tensor_scale)
        error[b] = w[b] - q[b]
    return scale_bytes, q


def factor(h):
    """Symmetric positive h (..., n, n) -> N (..., n, n) unit upper triangular, D (..., n): h = N diag(D) N^T.

    Cholesky gives a lower triangle; flipping both axes before and after turns it into an upper one.
    """
    root = torch.linalg.cholesky(h.flip(-1, -2)).flip(-1, -2)
    d = root.diagonal(dim1=-2, dim2=-1).clone()
    return root.div_(d[..., None, :]).float(), d.square().float()


def round_block(fmt, target, n, d, tensor_scale):
    """Round one block of columns, target (B, M), under the metric n diag(d) n^T -> scale bytes (M,), q (B, M),
    cost (M,)."""
    byte, scale = candidate_scales(fmt, target.abs().amax(0), tensor_scale)  # (C, M)
    q = target.new_empty(len(target), *scale.shape)  # (B, C, M)
    error, cost = torch.empty_like(q), torch.zeros_like(scale)
    for j in range(len(target)):
        x = target[j] + torch.tensordot(n[:j, j], error[:j], 1)  # (C, M)
        q[j] = nearest(fmt, x / scale) * scale
        error[j] = target[j] - q[j]
        cost += d[j] * (x - q[j]).square_()
    best = cost.argmin(0, keepdim=True)  # (1, M)
    q = q.gather(1, best.expand(len(target), 1, -1))[:, 0]  # (B, M)
    return byte.gather(0, best)[0], q, cost.gather(0, best)[0]


def candidate_scales(fmt, amax, tensor_scale):
    """Block amax (M,) -> candidates for the stored scale byte (C, M), and the float32 scales (C, M).

    The best E4M3 scale maps the largest weight to between 3.5 and 7.3, an octave; the best E8M0 scale is the
    smallest that avoids clipping, or half of that.
    """
    if fmt == "nvfp4":
        first = (amax / 7.3 / tensor_scale).clamp_(max=quant.E4M3_MAX).to(torch.float8_e4m3fn)
        byte = first.view(torch.uint8) + torch.arange(10, dtype=torch.uint8, device=amax.device)[:, None]
        byte = byte.clamp_(1, 126)  # from the smallest scale to 448
        return byte, byte.view(torch.float8_e4m3fn).float() * tensor_scale
    exponent = torch.log2((amax / quant.E4M3_MAX).clamp_(min=2.0 ** -125)).ceil_().to(torch.int32)
    byte = torch.stack((exponent, exponent - 1)).add_(127).to(torch.uint8)
    return byte, torch.exp2(byte.float() - 127)


def nearest(fmt, x):
    """x, already divided by its scale -> the nearest representable values, as floats."""
    if fmt == "nvfp4":
        return quant.round_e2m1(x.abs()).copysign_(x)
    return x.clamp_(-quant.E4M3_MAX, quant.E4M3_MAX).to(torch.float8_e4m3fn).float()


def sweep(fmt, w, h, tensor_scale, scale_bytes, q, num_iter):
    """Round every block again with all others fixed, at most num_iter times; updates scale_bytes and q."""
    size = quant.BLOCK[fmt]
    own = torch.stack([h[i:i + size, i:i + size] for i in range(0, len(h), size)])  # (N, B, B)
    n, d = factor(own)
    h, inverse, error = h.float(), torch.linalg.inv(own).float(), w - q
    for _ in range(num_iter):
        changed = False
        for i in range(len(scale_bytes)):
            b = slice(i * size, (i + 1) * size)
            step = inverse[i] @ (h[b] @ error)  # (B, M), from q to the minimum of the parabola
            byte, new, cost = round_block(fmt, q[b] + step, n[i], d[i], tensor_scale)
            better = cost < 0.99999 * ((n[i].T @ step).square_() * d[i][:, None]).sum(0)  # (M,)
            scale_bytes[i] = torch.where(better, byte, scale_bytes[i])
            q[b] = torch.where(better, new, q[b])
            error[b] = w[b] - q[b]
            changed |= better.any().item()
        if not changed:
            break
