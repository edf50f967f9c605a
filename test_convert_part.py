"""Tests of convert.py. Oracles: safetensors' own reader and writer, comfy-kitchen's eager backend."""
import json
import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from comfy_kitchen.backends.eager import quantization as ck
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import quant


WIDTH, HIDDEN = 64, 200  # HIDDEN is a multiple neither of 16 nor of 32
LINEARS = {"self_attn.q": (WIDTH, WIDTH), "self_attn.k": (WIDTH, WIDTH), "cross_attn.k_img": (WIDTH, 48),
           "ffn.0": (HIDDEN, WIDTH), "ffn.2": (WIDTH, HIDDEN)}


def same_bits(a, b):
    a_bytes, b_bytes = a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a_bytes, b_bytes)


def checkpoint(dtype=torch.bfloat16, prefix="", blocks=2, linears=LINEARS):
    """A small Wan checkpoint: {name: tensor}, kept tensors partly in float32."""
    g = torch.Generator().manual_seed(0)
    t = {"patch_embedding.weight": (WIDTH, 36, 1, 2, 2), "text_embedding.0.weight": (WIDTH, 32),
         "time_embedding.0.weight": (WIDTH, 256), "time_projection.1.weight": (6 * WIDTH, WIDTH),
         "img_emb.proj.1.weight": (WIDTH, 32), "head.head.weight": (64, WIDTH), "head.head.bias": (64,)}
    for n in range(blocks):
        t |= {f"blocks.{n}.{layer}.weight": shape for layer, shape in linears.items()}
        t |= {f"blocks.{n}.{layer}.bias": shape[:1] for layer, shape in linears.items()}
        t |= {f"blocks.{n}.norm3.weight": (WIDTH,), f"blocks.{n}.self_attn.norm_q.weight": (WIDTH,)}
    tensors = {prefix + name: (torch.randn(shape, generator=g) * 0.05).to(dtype) for name, shape in t.items()}
    for n in range(blocks):
        tensors[f"{prefix}blocks.{n}.modulation"] = torch.randn(1, 6, WIDTH, generator=g)
    return tensors


def write_checkpoint(path, tensors=None, **metadata):
    save_file(checkpoint() if tensors is None else tensors, path, metadata or None)
    return path


def refused(capsys, *argv):
    """The line on stderr with which convert refuses; what it left on the disk must be what was there."""
    with pytest.raises(SystemExit) as stop:
        convert.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("convert.py: ") and err.count("\n") == 1
    return err


# What is written

@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_reads_back_as_the_source(tmp_path, prefix, dtype, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors", checkpoint(dtype, prefix), head_dim="16",
                              prompt="ein Bär")
    convert.main(["-i", source])
    out, bare = load_file(tmp_path / "m-nvfp4.safetensors"), checkpoint(dtype)
    original = {name.removeprefix(prefix): tensor for name, tensor in load_file(source).items()}
    linears = {f"blocks.{n}.{layer}" for n in range(2) for layer in LINEARS}
    for name in original:
        layer = name.removesuffix(".weight")
        if layer not in linears:
            assert same_bits(out.pop(name), original[name])
    for layer in linears:
        w = bare[f"{layer}.weight"]
        suffixes = "weight", "weight_scale", "weight_scale_2", "comfy_quant"
        stored = {suffix: out.pop(f"{layer}.{suffix}") for suffix in suffixes}
        linear = quant.QuantLinear.from_tensors(layer, stored, w.shape[1], w.shape[0])
        assert linear.format == "nvfp4"
        assert convert.snr(w, linear.dequantized(torch.float32)) > 21
        theirs = ck.dequantize_nvfp4(stored["weight"], stored["weight_scale_2"], stored["weight_scale"],
                                     torch.float32)[:w.shape[0], :w.shape[1]]
        assert torch.equal(theirs, linear.dequantized(torch.float32))
        best = quant.quantize_nvfp4(w, method="search")
        assert all(same_bits(a, b) for a, b in zip(best, stored.values()))
        info = {"format": "nvfp4", "group_size": 16, "orig_dtype": str(dtype), "orig_shape": list(w.shape)}
        assert json.loads(bytes(stored["comfy_quant"].tolist())) == info
    assert not out
    with safe_open(tmp_path / "m-nvfp4.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["head_dim"] == "16" and metadata["prompt"] == "ein Bär"
    assert metadata["quantization_command"] == f"convert.py -i {source}"
    layers = json.loads(metadata["_quantization_metadata"])
    assert layers["format_version"] == "1.0" and set(layers["layers"]) == linears
    assert layers["layers"]["blocks.1.ffn.2"]["format"] == "nvfp4"


def test_simple_is_what_comfy_kitchen_writes(tmp_path):
    source, tensors = write_checkpoint(tmp_path / "m.safetensors"), checkpoint()
    convert.main(["-i", source, "-o", tmp_path / "out.safetensors", "--simple"])
    out = load_file(tmp_path / "out.safetensors")
    for layer in LINEARS:
        w = tensors[f"blocks.1.{layer}.weight"]
        tensor_scale = w.abs().amax().float() / (448 * 6)
        data, scale = ck.quantize_nvfp4(w, tensor_scale, pad_16x=True)
        assert same_bits(out[f"blocks.1.{layer}.weight"], data)
        assert same_bits(out[f"blocks.1.{layer}.weight_scale"], scale)
        assert same_bits(out[f"blocks.1.{layer}.weight_scale_2"], tensor_scale)


def test_tensors_are_aligned_and_the_header_is_whole(tmp_path):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors")])
    raw = (tmp_path / "m-nvfp4.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:8 + length])
    entries.pop("__metadata__")
    offsets = sorted(entry["data_offsets"] for entry in entries.values())
    assert length % 8 == 0 and offsets[0][0] == 0 and offsets[-1][1] == len(raw) - 8 - length
    assert all(end == begin for (_, end), (begin, _) in zip(offsets, offsets[1:]))
    for entry in entries.values():
        assert entry["data_offsets"][0] % convert.DTYPES[entry["dtype"]].itemsize == 0


def test_shards_give_the_same_tensors_as_one_file(tmp_path):
    tensors, shards = checkpoint(), tmp_path / "Wan2.1"
    shards.mkdir()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, shards / file)
    convert.main(["-i", write_checkpoint(tmp_path / "one.safetensors")])
    expected = load_file(tmp_path / "one-nvfp4.safetensors")
    convert.main(["-i", shards])
    index = shards / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, part in files.items() for n in part}}))
    convert.main(["-i", index])
    for out in (tmp_path / "Wan2.1-nvfp4.safetensors", shards / "m-nvfp4.safetensors"):
        got = load_file(out)
        assert set(got) == set(expected) and all(same_bits(got[name], expected[name]) for name in got)


def test_a_linked_model_gives_its_output_the_link_s_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "0123abcd")
    (tmp_path / "Wan2.1.safetensors").symlink_to("0123abcd")
    monkeypatch.chdir(tmp_path)
    convert.main(["-i", "Wan2.1.safetensors"])
    assert (tmp_path / "Wan2.1-nvfp4.safetensors").exists()


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "bf16"])
def test_quantize_weight_gives_what_quant_linear_takes(fmt):
    w = torch.randn(72, 200).bfloat16()
    stored = convert.quantize_weight(w, fmt)
    layer = quant.QuantLinear.from_tensors("x", stored, 200, 72)
    assert layer.format == (None if fmt == "bf16" else fmt)
    assert convert.snr(w, layer.dequantized(torch.float32)) > {"nvfp4": 21, "mxfp8": 30, "bf16": 999}[fmt]
    with pytest.raises(ValueError, match="expected one of bf16, mxfp8, nvfp4"):
        convert.quantize_weight(w, "fp4")


# Memory and failures

def test_memory_holds_one_weight_not_the_model(tmp_path):
    """The peak of the process rises by less than a third of a 193 MB file over that of a small one."""
    big = checkpoint(torch.float32, blocks=12, linears={"self_attn.q": (2048, 2048)})
    program = ("import resource, sys, convert; convert.main(sys.argv[1:]); "
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
    peaks = []
    for name, tensors in (("small", checkpoint()), ("big", big)):
        file = write_checkpoint(tmp_path / name, tensors)
        argv = [sys.executable, "-c", program, "-i", file, "-o", tmp_path / "out", "--simple"]
        run = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=REPOSITORY)
        peaks.append(int(run.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < file.stat().st_size / 3


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch, failure):
    source, out = write_checkpoint(tmp_path / "m.safetensors"), tmp_path / "out.safetensors"
    out.write_text("old")
    calls, quantize = [], convert.quantize_weight

    def fails(w, *args, **kwargs):
        calls.append(not w.is_meta)
        if sum(calls) == 4:
            raise failure
        return quantize(w, *args, **kwargs)

    monkeypatch.setattr(convert, "quantize_weight", fails)
    with pytest.raises(type(failure)):
        convert.main(["-i", source, "-o", out])
    assert sum(calls) == 4 and out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "out.safetensors"]


def test_writing_refuses_what_the_header_does_not_say(tmp_path):
    tensors = {"a": (torch.float32, (2,)), "b": (torch.uint8, (0,))}
    empty = torch.ones(0, dtype=torch.uint8)
    for name, tensor, error in [("a", torch.ones(3), "expected"), ("b", empty.float(), "expected"),
                                ("b", empty, "1 tensors were never written, as a")]:
        with pytest.raises(ValueError, match=error):
            with convert.writing(tmp_path / "x", tensors, {}) as put:
                put(name, tensor)
        assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_the_start(tmp_path, monkeypatch, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    usage = convert.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "of the disk are free" in refused(capsys, "-i", source)


def test_dry_run_writes_nothing(tmp_path):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors"), "--dry-run"])
    assert len(list(tmp_path.iterdir())) == 1


# Refusals

def damaged(value):
    tensors = checkpoint()
    tensors["blocks.1.ffn.0.weight"][3, 5] = value
    return tensors


@pytest.mark.parametrize("tensors, error", [
    (damaged(float("nan")), "blocks.1.ffn.0.weight has NaN or infinite values"),
    (damaged(float("-inf")), "blocks.1.ffn.0.weight has NaN or infinite values"),
    (checkpoint() | {"blocks.0.norm3.weight": torch.full((WIDTH,), torch.nan)}, "norm3.weight has NaN"),
    ({"blocks.0.attn.q.weight": torch.ones(16, 16)}, "not a Wan model"),
    ({"layer.weight": torch.ones(16, 16)}, "not a Wan model"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}, "already 8-bit"),
    (checkpoint() | {"scaled_fp8": torch.ones(2)}, "already 8-bit"),
    (checkpoint() | {"blocks.0.ffn.0.weight": torch.ones(16, 16).int()}, "is I32, expected BF16"),
    (checkpoint() | {"blocks.0.ffn.0.comfy_quant": torch.ones(2)}, "already quantised"),
    (checkpoint() | {"diffusion_model.head.head.bias": torch.ones(2)}, "head.head.bias is there twice"),
])
def test_sources_that_are_refused(tmp_path, capsys, tensors, error):
    source = write_checkpoint(tmp_path / "m.safetensors", tensors)
    assert error in refused(capsys, "-i", source)
    assert list(tmp_path.iterdir()) == [source]


def test_own_output_is_refused_as_a_source(tmp_path, capsys):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors")])
    assert "already quantised" in refused(capsys, "-i", tmp_path / "m-nvfp4.safetensors")


def test_paths_that_are_refused(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    (tmp_path / "link").hardlink_to(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").write_bytes(source.read_bytes()[:-1])
    (tmp_path / "index.json").write_text('{"weight_map": {"x": "lost.safetensors"}}')
    (tmp_path / "other.json").write_text("[]")
    assert "different files" in refused(capsys, "-i", source, "-o", source)
    assert "different files" in refused(capsys, "-i", source, "-o", tmp_path / "link")
    assert "a folder" in refused(capsys, "-i", source, "-o", tmp_path)
    assert "its folder is missing" in refused(capsys, "-i", source, "-o", tmp_path / "no" / "x")
    assert "no such file or folder" in refused(capsys, "-i", tmp_path / "lost")
    assert "no .safetensors" in refused(capsys, "-i", tmp_path / "empty")
    assert "not a complete safetensors file" in refused(capsys, "-i", tmp_path / "damaged")
    assert "is a shard missing" in refused(capsys, "-i", tmp_path / "index.json")
    assert "no weight_map" in refused(capsys, "-i", tmp_path / "other.json")


def test_the_report_names_types_and_sizes(tmp_path, capsys):
    convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ffn.0            NVFP4        2    21.") for line in lines)
    assert "MiB -> " in lines[-1] and lines[-1].endswith("m-nvfp4.safetensors")


# The plan

RECIPE = (  # as the model card has it, verbatim
    r'--nvfp4 --wan --comfy_quant --save-quant-metadata --custom-type mxfp8 --custom-layers "'
    r'blocks\.(1|2|3)\.cross_attn\.k\.weight|blocks\.(6|8|9|10)\.cross_attn\.k\.weight|'
    r'blocks\.(0|1|2|3)\.cross_attn\.v\.weight|blocks\.(6)\.cross_attn\.q\.weight|'
    r'blocks\.(6|14)\.cross_attn\.o\.weight|blocks\.(0|1|2|3)\.cross_attn\.v_img\.weight|'
    r'blocks\.(0)\.self_attn\.k\.weight|blocks\.(7|9|10|12|13|14)\.self_attn\.k\.weight|'
    r'blocks\.(19)\.self_attn\.q\.weight|blocks\.(0|1|2|3)\.ffn\.0\.weight|'
    r'blocks\.(36|37|38|39)\.ffn\.0\.weight" --exclude-layers "'
    r'blocks\.(4|5|7)\.cross_attn\.k\.weight|blocks\.(0)\.cross_attn\.q\.weight|'
    r'blocks\.(5|7|9|10|11|12|19|20)\.cross_attn\.o\.weight|blocks\.(8|11|33)\.self_attn\.k\.weight|'
    r'blocks\.(38)\.self_attn\.k\.weight|blocks\.(14|16|17)\.self_attn\.q\.weight" '
    r'--num-iter 6000 --top-p 0.35 --calib-samples 8192 '
    r'--extract-lora --lora-rank 64 --lora-target "ffn\.(0|2)\.weight|self_attn\.(v|o)\.weight"')
TABLE = {"cross_attn.k": (7.5, 17.5, 75), "cross_attn.q": (2.5, 2.5, 95), "cross_attn.v": (0, 10, 90),
         "cross_attn.o": (20, 5, 75), "cross_attn.k_img": (0, 0, 100), "cross_attn.v_img": (0, 10, 90),
         "self_attn.k": (10, 17.5, 72.5), "self_attn.q": (7.5, 2.5, 90), "self_attn.v": (0, 0, 100),
         "self_attn.o": (0, 0, 100), "ffn.0": (0, 20, 80), "ffn.2": (0, 0, 100), "norms": (100, 0, 0),
         "total": (36.0, 4.7, 59.3)}


def wan_shapes(d=5120, f=13824, text=4096, image=1280, blocks=40):
    """{name: shape} of the Wan2.1 I2V DiT, at the 14B's sizes by default."""
    shapes = {"patch_embedding": (d, 36, 1, 2, 2), "text_embedding.0": (d, text), "text_embedding.2": (d, d),
              "time_embedding.0": (d, 256), "time_embedding.2": (d, d), "time_projection.1": (6 * d, d),
              "img_emb.proj.1": (image, image), "img_emb.proj.3": (d, image), "head.head": (64, d)}
    for n in range(blocks):
        attention = [f"self_attn.{x}" for x in "qkvo"]
        attention += [f"cross_attn.{x}" for x in (*"qkvo", "k_img", "v_img")]
        shapes |= {f"blocks.{n}.{layer}": (d, d) for layer in attention}
        shapes |= {f"blocks.{n}.ffn.0": (f, d), f"blocks.{n}.ffn.2": (d, f)}
    shapes = {f"{layer}.{suffix}": shape if suffix == "weight" else shape[:1]
              for layer, shape in shapes.items() for suffix in ("weight", "bias")}
    norms = ["norm3", "self_attn.norm_q", "self_attn.norm_k"]
    norms += [f"cross_attn.{norm}" for norm in ("norm_q", "norm_k", "norm_k_img")]
    for n in range(blocks):
        shapes |= {f"blocks.{n}.{norm}.weight": (d,) for norm in norms}
        shapes |= {f"blocks.{n}.norm3.bias": (d,), f"blocks.{n}.modulation": (1, 6, d)}
    for i, size in ((0, image), (4, d)):
        shapes |= {f"img_emb.proj.{i}.{suffix}": (size,) for suffix in ("weight", "bias")}
    return shapes | {"head.modulation": (1, 2, d)}


def table(lines):
    rows = [line.split() for line in lines if not line.startswith("percent")]
    return {row[0]: tuple(map(float, row[1:])) for row in rows if len(row) == 4}


class Shapes(dict):
    """A source of names and shapes without any data, all bf16."""
    shapes = property(lambda self: self)
    dtypes = property(lambda self: dict.fromkeys(self, torch.bfloat16))


def recipe_flags():
    args = convert._parser().parse_args(["-i", "x", *shlex.split(RECIPE)])
    return args.base, args.custom_type, args.custom_layers, args.exclude_layers


def test_the_recipe_gives_its_table_at_full_size():
    shapes = wan_shapes()
    assert sum(map(math.prod, shapes.values())) == 16_394_878_784
    formats = convert.plan(shapes, *recipe_flags())
    assert Counter(formats.values()) == {"nvfp4": 427, "mxfp8": 34, "bf16": 19}
    assert table(convert.plan_report(shapes, formats)) == TABLE
    size = convert.header(convert.layout(Shapes(shapes), formats), {})[2]
    assert f"{size / 2 ** 30:.2f}" == "10.13"  # the model card says 9.76, which its own table does not give


def test_custom_wins_over_exclude_and_may_name_the_embeddings():
    shapes = wan_shapes(64, 96, 32, 48, blocks=2)
    formats = convert.plan(shapes, "mxfp8", "nvfp4", r"ffn|text_embedding\.2|img_emb", r"blocks\.0\.")
    assert formats["blocks.0.ffn.0.weight"] == formats["text_embedding.2.weight"] == "nvfp4"
    assert formats["blocks.0.self_attn.q.weight"] == "bf16"
    assert formats["blocks.1.self_attn.q.weight"] == "mxfp8"
    assert "img_emb.proj.1.weight" in formats and "img_emb.proj.0.weight" not in formats
    assert "text_embedding.0.weight" not in formats and "time_embedding.2.weight" not in formats


@pytest.mark.parametrize("flags, error", [
    (["--custom-type", "mxfp8", "--custom-layers", "blocks.(0"], "'blocks.(0': not a regular expression"),
    (["--custom-type", "mxfp8", "--custom-layers", "time_embedding"], "matches no weight out of"),
    (["--custom-type", "mxfp8", "--custom-layers", "norm"], "matches no weight out of"),
    (["--exclude-layers", "*"], "--exclude-layers '*': not a regular expression"),
    (["--exclude-layers", r"blocks\.99\."], "matches no weight out of"),
    (["--custom-layers", "ffn"], "give both or neither"),
    (["--custom-type", "mxfp8"], "give both or neither"),
    (["--plan", "score", "--exclude-layers", "ffn"], "chooses the layers itself"),
    (["--device", "abacus"], "--device abacus: "),
])
def test_flags_that_are_refused(tmp_path, capsys, flags, error):
    assert error in refused(capsys, "-i", write_checkpoint(tmp_path / "m.safetensors"), *flags)


@pytest.mark.parametrize("flags", [["--nvpf4"], ["--custom-type", "int8"], ["--nv"], ["--nvfp4", "--mxfp8"]])
def test_unknown_flags_are_errors(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        convert.main(["-i", write_checkpoint(tmp_path / "m.safetensors"), *flags])
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_the_recipe_converts_a_narrow_model(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=g) * 0.05).bfloat16()
               for name, shape in wan_shapes(32, 48, 32, 32).items()}
    source, out = write_checkpoint(tmp_path / "m.safetensors", tensors), tmp_path / "out.safetensors"
    convert.main(["-i", source, *shlex.split(RECIPE), "-o", out])
    lines = capsys.readouterr().out.splitlines()
    assert table(lines[:lines.index("")]) == TABLE
    with safe_open(out, "pt") as f:
        markers = [json.loads(bytes(f.get_tensor(n).tolist())) for n in f.keys() if n.endswith("comfy_quant")]
        header = json.loads(f.metadata()["_quantization_metadata"])["layers"]
        kept = f.get_tensor("blocks.38.self_attn.k.weight")
        eight, eight_scale = (f.get_tensor(f"blocks.19.self_attn.q.{x}") for x in ("weight", "weight_scale"))
    assert Counter(m["format"] for m in markers) == {"nvfp4": 427, "mxfp8": 34}
    lora = load_file(tmp_path / "out_lora.safetensors")
    assert len(lora) == 3 * 160 and lora["diffusion_model.blocks.7.ffn.2.lora_up.weight"].shape == (32, 32)
    assert Counter(m["format"] for m in header.values()) == {"nvfp4": 427, "mxfp8": 34}
    assert same_bits(kept, tensors["blocks.38.self_attn.k.weight"])
    data, scale = quant.quantize_mxfp8(tensors["blocks.19.self_attn.q.weight"], method="search")
    assert same_bits(eight, data) and same_bits(eight_scale, scale)


def test_plan_recipe_and_its_flags_are_the_command_of_the_card():
    shapes = wan_shapes()
    base, kind, custom, exclude = recipe_flags()
    assert (custom, exclude) == (convert.RECIPE_MXFP8, convert.RECIPE_KEPT)
    formats = convert.plan(shapes, base, kind, custom, exclude)
    text = convert.flags(formats | {"text_embedding.0.weight": "mxfp8"})
    args = convert._parser().parse_args(["-i", "x", *shlex.split(text)])
    again = convert.plan(shapes, args.base, args.custom_type, args.custom_layers, args.exclude_layers)
    assert again == formats | {"text_embedding.0.weight": "mxfp8"}
    assert convert.flags({"blocks.0.ffn.0.weight": "nvfp4"}) == "--nvfp4"


def test_sensitivity_by_known_distributions():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(512, 1024, generator=g)
    kurtosis, octaves, aspect = convert.sensitivity(w.bfloat16())
    assert kurtosis < 0.02 and 2.1 < octaves < 2.6 and aspect == 1
    assert convert.sensitivity(w) == pytest.approx(convert.sensitivity(w * 1e-3), abs=1e-4)
    w = torch.randn(512, 512, generator=g).exp() * w[:, :512].sign()
    assert convert.sensitivity(w)[0] > 3 and convert.sensitivity(w)[1] > 4
    signs = w.sign()
    assert convert.sensitivity(signs)[:2] == pytest.approx((0, 0), abs=1e-3)
    assert convert.sensitivity(torch.zeros(16, 16)) == (0, 0, 0)


def test_the_score_promotes_the_outliers_among_the_layers(tmp_path, capsys):
    tensors = checkpoint(blocks=12, linears={"self_attn.q": (256, 128), "self_attn.k": (128, 128)})
    tensors["blocks.3.self_attn.k.weight"][::16, 5] *= 8
    tensors["blocks.7.self_attn.k.weight"][::16, 5] *= 60
    source, out = write_checkpoint(tmp_path / "m.safetensors", tensors), tmp_path / "out.safetensors"
    convert.main(["-i", source, "-o", out, "--plan", "score", "--print-flags"])
    with safe_open(out, "pt") as f:
        layers = json.loads(f.metadata()["_quantization_metadata"])["layers"]
    assert "blocks.3.self_attn.k" not in layers and "blocks.7.self_attn.k" not in layers
    assert layers["blocks.0.self_attn.q"]["format"] == layers["blocks.5.self_attn.k"]["format"] == "nvfp4"
    assert sum(info["format"] == "mxfp8" for info in layers.values()) <= 2
    assert r'--exclude-layers "blocks\.(3|7)\.self_attn\.k\.weight"' in capsys.readouterr().out


def test_layers_all_alike_stay_in_nvfp4():
    scores = convert.score({f"blocks.{n}.ffn.0.weight": (0.1, 2.5, 1.4) for n in range(8)})
    assert set(convert.plan_by_score(scores).values()) == {"nvfp4"}


# Rounding with a Hessian

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


def output_snr(w, stored, x):
    return convert.snr(x @ w.float().T, x @ convert.dequantize_weight(stored, w.shape).T)


@pytest.mark.parametrize("fmt, gain", [("nvfp4", 9), ("mxfp8", 9)])
@pytest.mark.parametrize("width", [256, 200])
def test_a_hessian_lowers_the_error_of_outputs_not_seen(fmt, gain, width):
    w, hessian, x = correlated(width)
    rtn = output_snr(w, convert.quantize_weight(w, fmt, method="rtn"), x)
    swept = [output_snr(w, convert.quantize_weight(w, fmt, hessian, num_iter=n), x) for n in (0, 1, 8)]
    assert swept[0] > rtn + 3 and swept[2] > rtn + gain
    assert swept == sorted(swept)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_comfy_kitchen_reads_what_a_hessian_gives(fmt):
    w, hessian, _ = correlated(200, rows=70)
    stored = convert.quantize_weight(w, fmt, hessian)
    scales = [stored[x] for x in ("weight_scale_2", "weight_scale") if x in stored]
    theirs = getattr(ck, f"dequantize_{fmt}")(stored["weight"], *scales, torch.float32)
    ours = convert.dequantize_weight(stored, w.shape)
    assert torch.equal(theirs[:70, :200], ours) and not theirs[70:].any() and not theirs[:, 200:].any()
    assert convert.snr(w, ours) > 10  # close to w itself too, not only through the Hessian


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_without_correlation_a_hessian_is_the_search(fmt):
    w = torch.randn(64, 256) * 0.02
    searched = convert.snr(w, convert.dequantize_weight(convert.quantize_weight(w, fmt), w.shape))
    for hessian in (torch.eye(256), torch.zeros(256, 256)):
        stored = convert.quantize_weight(w, fmt, hessian)
        assert abs(convert.snr(w, convert.dequantize_weight(stored, w.shape)) - searched) < 0.02


def test_inputs_that_are_never_on_cost_nothing():
    w, hessian, x = correlated(256)
    hessian[:, 100:] = hessian[100:] = x[:, 100:] = 0
    stored = convert.quantize_weight(w, "nvfp4", hessian)
    assert output_snr(w, stored, x) > 30


def test_zero_rows_and_blocks_stay_zero_with_a_hessian():
    w, hessian, _ = correlated(256)
    w[3], w[:, 64:96] = 0, 0
    for fmt in ("nvfp4", "mxfp8"):
        q = convert.dequantize_weight(convert.quantize_weight(w, fmt, hessian), w.shape)
        assert q.isfinite().all() and not q[3].any()
    stored = convert.quantize_weight(torch.zeros(32, 256), "nvfp4", hessian)
    assert not convert.dequantize_weight(stored, (32, 256)).any()


def test_a_hessian_that_does_not_fit_is_an_error():
    w, hessian, _ = correlated(256)
    hessian[3, 3] = math.nan
    for bad in (hessian[:16, :16], hessian):
        with pytest.raises(ValueError, match=r"expected \(256, 256\), all finite"):
            convert.quantize_weight(w, "nvfp4", bad)
    with pytest.raises(ValueError, match="NaN"):
        convert.quantize_weight(torch.full((16, 256), math.nan), "mxfp8", torch.eye(256))


# The LoRA of the errors

def test_low_rank_is_the_best_there_is():
    w, hessian, x = correlated(256)
    error = w.float() - convert.dequantize_weight(convert.quantize_weight(w, "nvfp4"), w.shape)
    up, down, share = convert.low_rank(error, 16)
    s = torch.linalg.svdvals(error)
    assert up.shape == (160, 16) and down.shape == (16, 256)
    assert abs(share - s[:16].square().sum() / s.square().sum()) < 1e-5
    left = (error - up @ down).square().sum() / error.square().sum()
    assert abs(1 - left - share) < 1e-5
    weighted = convert.low_rank(error, 16, hessian)
    outputs = [(x @ (error - up @ down).T).square().sum() for up, down, _ in ((up, down, 0), weighted)]
    assert outputs[1] < outputs[0] / 2 and weighted[2] > 3 * share
    assert convert.low_rank(error[:8], 64)[0].shape == (8, 8)


def test_low_rank_is_randomised_when_large_and_then_nearly_the_best():
    error, state = torch.randn(600, 700), torch.random.get_rng_state()
    up, down, share = convert.low_rank(error, 64)
    s = torch.linalg.svdvals(error)
    assert 0.98 < share / (s[:64].square().sum() / s.square().sum()) <= 1.0001
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip((up, down), convert.low_rank(error, 64)))


def test_the_lora_file_corrects_the_layers_that_it_names(tmp_path, capsys):
    source, out = write_checkpoint(tmp_path / "m.safetensors"), tmp_path / "out.safetensors"
    flags = ["--extract-lora", "--lora-rank", "16", "--exclude-layers", r"blocks\.1\."]
    convert.main(["-i", source, "-o", out, *flags])
    lora, base = load_file(tmp_path / "out_lora.safetensors"), load_file(out)
    target = re.compile(convert.RECIPE_TARGET)
    layers = [f"blocks.0.{layer}" for layer in LINEARS if target.search(f"{layer}.weight")]
    suffixes = "lora_up.weight", "lora_down.weight", "alpha"
    assert layers and set(lora) == {f"diffusion_model.{x}.{suffix}" for x in layers for suffix in suffixes}
    assert all(f"{layer.split('.', 2)[2]:17} " in capsys.readouterr().out for layer in layers[:1])
    for layer in layers:
        w = checkpoint()[f"{layer}.weight"]
        stored = {name.rpartition(".")[2]: base[name] for name in base if name.startswith(f"{layer}.")}
        stored["bias"] = torch.zeros(len(w))
        linear = quant.QuantLinear.from_tensors(layer, stored, w.shape[1], w.shape[0])
        x = torch.randn(32, w.shape[1])
        alone = convert.snr(x @ w.float().T, linear(x))
        up, down, alpha = (lora[f"diffusion_model.{layer}.{suffix}"] for suffix in suffixes)
        linear.attach_lora(up, down, alpha.item() / len(down))
        assert convert.snr(x @ w.float().T, linear(x)) > alone + 1.5


def test_lora_flags_that_are_refused(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "m.safetensors")
    flags = ["-i", source, "--extract-lora"]
    assert "matches no weight" in refused(capsys, *flags, "--lora-target", "norm3")
    assert "need --extract-lora" in refused(capsys, "-i", source, "--lora-target", "ffn")
    assert "would overwrite" in refused(capsys, *flags, "--lora-output", source)
    assert "would overwrite" in refused(capsys, *flags, "--lora-output", tmp_path / "m-nvfp4.safetensors")
    assert list(tmp_path.iterdir()) == [source]
