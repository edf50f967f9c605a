"""The plan of least error in the video: convert.py -i MODEL --calib PICTURE... [--size 9.76GiB] [--w4a16 SHARE]

What a layer's rounding does to the latents is measured in two passes through the unquantized model, with the
inputs that extra/calibrate.py has recorded: one for the errors of each layer's outputs in each format
(output_errors), one with gradients for their effect on the latents (gradient_scores). From these follow the plan
of least error within a file size (plan_by_error), and the layers whose inputs should stay unquantized
(choose_exact). From one picture a plan is unstable; eight are enough.
"""
import functools
import math
import re
from collections import Counter
from contextlib import nullcontext

import torch
from tqdm import tqdm

import convert
import quant
from extra.calibrate import as_nvfp4, linears, moved


def check_size(limit, source, made):
    """Raises ValueError for a file size that no plan can reach: before the calibration, which takes long."""
    smallest = dict.fromkeys(convert.quantizable(source.shapes), "nvfp4")
    needed = convert.model_output(source.path, source, smallest, (), made).size
    if limit < needed:
        raise ValueError(f"--size {convert.gib(limit)}: too small, the smallest formats need "
                         f"{convert.gib(needed)}")


def improve_plan(args, source, calibration, by_score, marked, scores, made):
    """What --plan measured and --w4a16 choose: {name: format}, the set of weights that multiply in full
    precision, and lines to print about them.

    by_score, marked, scores: the plan so far, as convert.choose_plan has made it: that of the score, which
    --plan measured replaces, or one that stays; the weights of --fpmm-layers; {name: score}
    """
    errors, flops = measure_errors(source, calibration)
    notes = []
    formats = dict.fromkeys(errors, "nvfp4") if args.plan == "measured" else by_score
    others = {name: fmt for name, fmt in formats.items() if name not in marked}
    exact = marked | choose_exact(errors, flops, args.w4a16 or 0.0, others)
    if args.plan == "measured":
        def size(plan):
            return convert.model_output(source.path, source, plan, exact, made).size

        own = {name: {fmt: error[name in exact] for fmt, error in each.items()} for name, each in errors.items()}
        formats, notes = plan_measured(source, own, scores, by_score, args.size, size)
    return formats, exact, notes + [error_line(errors)]


# ----------------------------------------------------------------------------------------------------
# The errors of each layer
# ----------------------------------------------------------------------------------------------------

def measure_errors(source, calibration):
    """{name: {format: (error, error with inputs in full precision)}}, and {name: FLOPs}.

    An error is the squared error that the layer's rounding causes in the latents: measured for NVFP4
    (gradient_scores), and for other formats scaled by the error of the layer's outputs, divided by that of NVFP4.
    """
    errors = {}
    with tqdm(total=len(convert.quantizable(source.shapes)), desc="measuring", disable=None) as progress:
        for _, _, seen in calibration.stages():
            for name, inputs in seen.items():
                w = source.tensor(name).to(calibration.device)
                errors[name] = output_errors(w, torch.cat(inputs.rows)[:512])
                progress.update()
    errors = {name: errors[name] for name in convert.quantizable(source.shapes)}
    scores, flops = gradient_scores(calibration)

    def effect(name, error):
        return scores.get(name, 0.0) * error / max(errors[name]["nvfp4"][0], 1e-30)

    return {name: {fmt: tuple(effect(name, error) for error in both) for fmt, both in own.items()}
            for name, own in errors.items()}, flops


def output_errors(w, x):
    """{format: relative squared errors of the layer's outputs} for inputs x (R, K): the first with both sides
    quantized, the second with only the weight."""
    y, errors = x @ w.float().T, {"bf16": (0.0, 0.0)}  # (R, M)
    for fmt in ("mxfp8", "nvfp4"):
        tensors = convert.quantize_weight(w, fmt)
        layers = [quant.QuantLinear.from_tensors("weight", tensors, *w.shape[::-1], mode=mode)
                  for mode in ("emulate", "dequantize")]
        errors[fmt] = tuple(10 ** (-convert.snr(y, layer(x)) / 10) for layer in layers)
    return errors


def gradient_scores(calibration, draws=4):
    """{weight name: squared error of the latents when only this layer's weight and inputs are in NVFP4}, the mean
    over all recorded inputs, and {weight name: FLOPs of all of them}.

    If a layer's outputs are off by delta, the velocity is off by J delta to first order, J being its Jacobian
    with respect to these outputs. For random signs v, the mean of (v^T J delta)^2 is |J delta|^2 (Hutchinson
    1990), and backpropagating v gives v^T J. The latents are off by sigma times that. Each block is computed
    again on the way back: memory holds the activations of one block; the tokens between blocks are in CPU memory.
    """
    dit, device, scores, flops = calibration.dit, calibration.device, Counter(), Counter()
    for number, inputs in enumerate(calibration.inputs):
        generator = torch.Generator().manual_seed(number)
        (x, t, *features, y), states = moved(inputs, device), []
        with torch.no_grad():
            tokens, e, (e0, rope, text, text_bias, image) = dit.prepare(x, t, *features, y)
            for i in range(calibration.num_blocks):
                states.append(tokens.to("cpu", torch.bfloat16))
                tokens = calibration.block(i)(tokens, e0, rope, text, text_bias, image)

        def last(tokens):
            return dit.unpatchify(dit.head(tokens, e), x.shape[2:]),

        signs = [(torch.randn(x.shape, generator=generator).sign() * t.cpu() / 1000,) for _ in range(draws)]
        signs = backward(last, [tokens], signs, dit, "", scores, flops)
        context = [text] if image is None else [text, image]
        to_context = [(0,) * len(context)] * draws  # their gradients
        for i in reversed(range(calibration.num_blocks)):
            block = calibration.block(i)

            def forward(tokens, text, image=None):
                return block(tokens, e0, rope, text, text_bias, image),

            leaves = [states.pop().to(device, torch.float32), *context]
            signs = backward(forward, leaves, [s[:1] for s in signs], block, f"blocks.{i}.", scores, flops)
            to_context = [tuple(a + b for a, b in zip(c, s[1:])) for c, s in zip(to_context, signs)]

        def embed(text, image=None):
            _, _, (_, _, text, _, image) = dit.prepare(x, t, text, image, y)
            return (text,) if image is None else (text, image)

        leaves = [feature.clone() for feature in features if feature is not None]
        backward(embed, leaves, to_context, dit, "", scores, flops)
    return {name: score / (draws * len(calibration.inputs)) for name, score in scores.items()}, flops


def backward(forward, leaves, gradients, module, prefix, scores, flops):
    """Backpropagate through forward, which returns a tuple of outputs. gradients: of these outputs, a tuple for
    each draw. Returns those of the leaves in the same way, in CPU memory. For each of the module's Linears, adds
    to scores (v^T J delta)^2 of gradient_scores, summed over the draws, and to flops its FLOPs."""
    device = leaves[0].device
    cramped = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 32 * leaves[0].nbytes
    store = "cpu" if cramped else device  # of a block's activations, if they do not fit the GPU

    def parts(x):  # a few rows at a time: less memory
        return x.flatten(0, -2).split(4096)

    @torch.no_grad()
    def record(name, layer, args, y):
        tensors = convert.quantize_weight(layer.weight, "nvfp4", method="rtn")
        tensors |= {} if layer.bias is None else {"bias": layer.bias}
        rounded = quant.QuantLinear.from_tensors(name, tensors, layer.in_features, layer.out_features,
                                                 compute_dtype=y.dtype, mode="dequantize")
        scale = quant.nvfp4_tensor_scale(args[0].abs().amax().float())  # of all parts
        errors = [moved(rounded(as_nvfp4(x, scale).to(y.dtype)) - exact, store)
                  for x, exact in zip(parts(args[0]), parts(y))]
        y.register_hook(functools.partial(add_score, name, errors))
        flops[name] += 2 * y.numel() * layer.in_features

    def add_score(name, errors, g):
        scores[name] += sum((a.float() * b.to(a)).sum().item() for a, b in zip(parts(g), errors)) ** 2

    hooks = [layer.register_forward_hook(functools.partial(record, name))
             for name, layer in linears(module, prefix)]
    with torch.enable_grad(), torch.autograd.graph.save_on_cpu() if cramped else nullcontext():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        results = forward(*leaves)
    for hook in hooks:
        hook.remove()
    grad = functools.partial(torch.autograd.grad, results, leaves, retain_graph=True)
    return [moved(grad(moved(gradient, device)), "cpu") for gradient in gradients]


# ----------------------------------------------------------------------------------------------------
# Choosing by these errors
# ----------------------------------------------------------------------------------------------------

FEW_TOKENS = re.compile(  # layers that see only the prompt or the picture
    r"blocks\.[0-9]+\.cross_attn\.[kv](_img)?\.weight|" + convert.OPTIONAL.pattern)


def choose_exact(errors, flops, share, formats):
    """The weights whose inputs should stay unquantized: all that see only the prompt or the picture, which have
    few tokens, then those that save most error per FLOP, up to `share` of all FLOPs.

    errors, flops: as measure_errors gives them; formats: the plan so far
    """
    saved = {name: errors[name][fmt][0] - errors[name][fmt][1] for name, fmt in formats.items()
             if fmt in errors[name] and fmt != "bf16" and name in flops}
    chosen, left = {name for name in saved if FEW_TOKENS.fullmatch(name)}, share * sum(flops.values())
    for name in sorted(saved.keys() - chosen, key=lambda name: (-saved[name] / flops[name], name)):
        if 0 < saved[name] and flops[name] <= left:
            chosen.add(name)
            left -= flops[name]
    return chosen


def plan_measured(source, errors, scores, by_score, limit, size):
    """The plan of least error in a file of `limit` bytes, by default the size of by_score, the score's plan.
    errors: {name: {format: error}}; size: a function from plans to bytes. Returns {name: format} and lines that
    compare it with the score's plan."""
    sizes = {name: {fmt: stored_bytes(fmt, source.shapes[name], source.dtypes[name]) for fmt in error}
             for name, error in errors.items()}
    smallest, limit = size(dict.fromkeys(errors, "nvfp4")), limit or size(by_score)
    if limit < smallest:
        raise ValueError(f"--size {convert.gib(limit)}: too small, the smallest formats need "
                         f"{convert.gib(smallest)}")
    others = smallest - sum(sizes[name]["nvfp4"] for name in errors)
    formats = plan_by_error(errors, sizes, limit - others)

    def summary(plan):
        total = sum(error[plan.get(name, "bf16")] for name, error in errors.items())
        return f"{total:.4g} in {convert.gib(size(plan))}"

    correlation = rank_correlation(scores.values(), [errors[name]["nvfp4"] for name in scores])
    return formats, [f"rank correlation of the score with NVFP4's error: {correlation:.2f}",
                     f"sum of the errors: {summary(formats)}; by the score's plan: {summary(by_score)}"]


def stored_bytes(fmt, shape, dtype):
    return sum(math.prod(size) * own.itemsize for own, size in convert.stored_layout(fmt, shape, dtype).values())


def plan_by_error(errors, sizes, budget):
    """errors and sizes {name: {format: number}} -> {name: format} of least total error in `budget` bytes.

    Every weight starts in its smallest format. Its next step up is the one that removes most error per byte.
    These steps follow the lower convex hull of error over bytes, so each removes less per byte than the one
    before, and a format off the hull is never the best choice. Taking the steps of all weights in order of
    error per byte, as long as they fit, is optimal except for the last bytes. Raises ValueError if even the
    smallest formats do not fit.
    """
    formats = {name: min(size, key=size.get) for name, size in sizes.items()}
    left = budget - sum(sizes[name][fmt] for name, fmt in formats.items())
    if left < 0:
        raise ValueError(f"plan_by_error: got a budget of {budget} bytes, expected at least {budget - left}")
    steps = []
    for name, size in sizes.items():
        at, error = formats[name], errors[name]
        while True:
            saved = {fmt: (error[at] - error[fmt]) / (size[fmt] - size[at])
                     for fmt in size if size[fmt] > size[at] and error[fmt] < error[at]}
            if not saved:
                break
            best = max(saved, key=saved.get)
            steps.append((saved[best], name, best, size[best] - size[at]))
            at = best
    stuck = set()  # weights with a step that did not fit; they must not skip it
    for _, name, fmt, extra in sorted(steps, reverse=True):
        if extra > left or name in stuck:
            stuck.add(name)
        else:
            formats[name], left = fmt, left - extra
    return formats


def rank_correlation(a, b):
    """Spearman's rank correlation of two sequences of numbers."""
    ranks = [torch.tensor(list(values)).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def error_line(errors):
    """The ten layers whose rounding to NVFP4 changes the latents most, whatever the plan gives them."""
    own = {name: error["nvfp4"][0] for name, error in errors.items()}
    total = max(sum(own.values()), 1e-30)
    first = sorted(own, key=lambda name: -own[name])[:10]
    return "share of the video's error if all were W4A4, by layer: " + ", ".join(
        f"{name.removesuffix('.weight')} {own[name] / total:.0%}" for name in first)
