import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import quant
import wan_fp4


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def random_weights(model, seed=0):
    """Weights of ordinary size in every tensor, so that no zero or one hides a term of the network."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=g) * fan ** -0.5 + (p.dim() == 1) * 0.5)
    return model.eval()


# wan_fp4.py: DiT

def to_official_dit(name):
    """diffusers' name of a DiT tensor -> the official one."""
    for theirs, ours in (("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
                         ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
                         ("condition_embedder.time_proj", "time_projection.1"),
                         ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
                         ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
                         ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
                         ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
                         ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
                         ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
                         ("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("to_out.0", "o"),
                         ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                         ("add_k_proj", "k_img"), ("add_v_proj", "v_img"),
                         ("norm_added_k", "norm_k_img"), (".norm2.", ".norm3."), ("ffn.net.0.proj", "ffn.0"),
                         ("ffn.net.2", "ffn.2"), ("proj_out", "head.head")):
        name = name.replace(theirs, ours)
    return name.replace("scale_shift_table", "modulation" if name.startswith("blocks") else "head.modulation")


def diffusers_dit(heads=2, head_dim=32, ffn=96, layers=2, text=24, image=40):
    from diffusers import WanTransformer3DModel
    theirs = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=36, out_channels=16,
        text_dim=text, freq_dim=256, ffn_dim=ffn, num_layers=layers, image_dim=image,
        added_kv_proj_dim=heads * head_dim)
    theirs = random_weights(theirs)
    # Angles reach 1000 radians, where float32, diffusers' choice, is off by 6e-5; officially it is float64
    theirs.condition_embedder.timesteps_proj.forward = lambda t: wan_fp4.sinusoid(t, 256)
    return theirs


def dit_file(theirs, path, prefix="", dtype=torch.float32, **metadata):
    tensors = {prefix + to_official_dit(n): t.to(dtype).contiguous() for n, t in theirs.state_dict().items()}
    save_file(tensors, path, {"head_dim": str(theirs.config.attention_head_dim), **metadata})
    return path


def dit_inputs(frames, height, width, length, text=24, image=40, batch=1):
    g = torch.Generator().manual_seed(frames + height)
    def r(*shape):
        return torch.randn(batch, *shape, generator=g)
    return dict(x=r(16, frames, height, width), t=torch.tensor([717.3, 24.4][:batch]), text=r(length, text),
                image=r(257, image), y=r(20, frames, height, width))


def padded(text):
    return torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))


@pytest.mark.parametrize("frames, height, width, length, batch, size", [
    (1, 4, 6, 5, 1, dict()),
    (2, 6, 10, 512, 2, dict(heads=3, head_dim=16, ffn=80, layers=1)),
    (4, 10, 6, 77, 1, dict(heads=1, head_dim=128, layers=3)),
])
def test_dit_equals_diffusers(frames, height, width, length, batch, size, tmp_path):
    theirs = diffusers_dit(**size)
    ours = wan_fp4.load_dit(dit_file(theirs, tmp_path / "dit.safetensors"))
    i = dit_inputs(frames, height, width, length, batch=batch)
    with torch.no_grad():
        expected = theirs(torch.cat([i["x"], i["y"]], 1), i["t"], padded(i["text"]), i["image"]).sample
        assert relative_error(ours(**i), expected) < 1e-5


def test_dit_sinusoid_is_diffusers_timestep_embedding():
    from diffusers.models.embeddings import Timesteps
    t = torch.tensor([0.0, 0.5, 1.0, 3.0])
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    torch.testing.assert_close(wan_fp4.sinusoid(t, 256), expected, rtol=0, atol=1e-6)


def test_dit_zeros_past_the_prompt_change_nothing(tmp_path):
    ours = wan_fp4.load_dit(dit_file(diffusers_dit(), tmp_path / "dit.safetensors"))
    i = dit_inputs(2, 4, 4, 9)
    with torch.no_grad():
        short = ours(**i)
        assert relative_error(ours(**i | {"text": padded(i["text"])}), short) < 1e-5


def test_dit_refuses_odd_sizes_and_long_prompts(tmp_path):
    ours = wan_fp4.load_dit(dit_file(diffusers_dit(), tmp_path / "dit.safetensors"))
    with pytest.raises(ValueError, match="H and W even"):
        ours(**dit_inputs(1, 3, 4, 5))
    with pytest.raises(ValueError, match="513 tokens, expected at most 512"):
        ours(**dit_inputs(1, 4, 4, 513))


# wan_fp4.py: VAE

def to_official_vae(name):
    """diffusers' name of a VAE tensor -> the official one, for dim_mult of four levels and two blocks."""
    for theirs, ours in (("quant_conv", "conv1"), ("post_conv1", "conv2"), ("conv_in", "conv1"),
                         ("conv_out", "head.2"), ("norm_out", "head.0"),
                         ("mid_block.attentions.0", "middle.1"),
                         ("mid_block.resnets.0", "middle.0"), ("mid_block.resnets.1", "middle.2"),
                         ("conv_shortcut", "shortcut"), (".norm1.", ".residual.0."),
                         (".norm2.", ".residual.3.")):
        name = name.replace(theirs, ours)
    name = name.replace("post_quant_conv", "conv2")
    parts = name.split(".")
    if "down_blocks" in name:
        name = name.replace("down_blocks", "downsamples")
    if parts[1] == "up_blocks":
        level, kind, index = int(parts[2]), parts[3], int(parts[4])
        index = level * 4 + (3 if kind == "upsamplers" else index)
        name = ".".join([parts[0], "upsamples", str(index), *parts[5:]])
    if "middle" in name or "samples" in name:
        name = name.replace("residual.conv1", "residual.2")
        if "time_conv" not in name and "resample" not in name:
            name = name.replace(".conv1.", ".residual.2.").replace(".conv2.", ".residual.6.")
    return name


def diffusers_vae(dims, blocks=2, base=8):
    from diffusers import AutoencoderKLWan
    return random_weights(AutoencoderKLWan(base_dim=base, z_dim=16, dim_mult=list(dims),
                                           num_res_blocks=blocks))


def vae_file(theirs, path):
    save_file({to_official_vae(n): t.contiguous() for n, t in theirs.state_dict().items()}, path)
    return path


def vae_statistics(theirs):
    return (torch.tensor(v)[None, :, None, None, None]
            for v in (theirs.config.latents_mean, theirs.config.latents_std))


@pytest.mark.parametrize("frames, height, width, dims", [
    (1, 16, 24, (1, 2, 4, 4)), (5, 24, 16, (1, 2, 3, 4)), (13, 16, 16, (1, 2, 4, 4))])
def test_vae_equals_diffusers(frames, height, width, dims, tmp_path):
    theirs = diffusers_vae(dims)
    ours = wan_fp4.load_vae(vae_file(theirs, tmp_path / "vae.safetensors"))
    mean, std = vae_statistics(theirs)
    video = torch.rand(1, 3, frames, height, width) * 2 - 1
    with torch.no_grad():
        latents = (theirs.encode(video).latent_dist.mode() - mean) / std
        assert relative_error(ours.encode(video), latents) < 1e-4
        expected = theirs.decode(latents * std + mean).sample
        assert expected.abs().lt(1).any() and relative_error(ours.decode(latents), expected) < 1e-4


def test_vae_does_not_depend_on_how_the_video_is_cut():
    vae = random_weights(wan_fp4.WanVAE(wan_fp4.VAEConfig(dims=(8, 16, 16, 24), blocks=1)))
    z = torch.randn(1, 16, 4, 2, 3)
    with torch.no_grad():
        cache = {}
        whole = [vae.decoder(vae.conv2(x, cache), cache) for x in wan_fp4.chunks(z, 3)]
        cache = {}
        parts = [vae.decoder(vae.conv2(x, cache), cache) for x in wan_fp4.chunks(z, 1)]
    assert relative_error(torch.cat(parts, 2), torch.cat(whole, 2)) < 1e-5


def test_vae_refuses_other_frame_counts():
    vae = wan_fp4.WanVAE(wan_fp4.VAEConfig(dims=(8, 8, 8, 8), blocks=1))
    with pytest.raises(ValueError, match="got 4 frames of 16 x 16, expected 4k"):
        vae.encode(torch.zeros(1, 3, 4, 16, 16))


# wan_fp4.py: UMT5

def to_official_umt5(name):
    for theirs, ours in (("encoder.block.", "blocks."),
                         ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
                         ("layer.0.SelfAttention", "attn"), ("layer.0.layer_norm", "norm1"),
                         ("layer.1.layer_norm", "norm2"), ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
                         ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
                         ("layer.1.DenseReluDense.wo", "ffn.fc2"), ("encoder.final_layer_norm", "norm"),
                         ("shared.", "token_embedding.")):
        name = name.replace(theirs, ours)
    return name


def umt5_file(theirs, path):
    tensors = {n: t.clone() for n, t in theirs.state_dict().items() if "embed_tokens" not in n}
    save_file({to_official_umt5(n): t for n, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("length, heads, inner, layers", [(6, 4, 32, 2), (300, 2, 64, 1)])
def test_umt5_equals_transformers(length, heads, inner, layers, tmp_path):
    from transformers import UMT5Config, UMT5EncoderModel
    theirs = random_weights(UMT5EncoderModel(UMT5Config(
        vocab_size=50, d_model=48, d_kv=inner // heads, d_ff=56, num_layers=layers, num_heads=heads)))
    ours = wan_fp4.load_umt5(umt5_file(theirs, tmp_path / "t5.safetensors"))
    ids = torch.randint(2, 50, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2:] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        out = ours(ids, mask)
    assert relative_error(out, expected) < 1e-5
    assert out[1, length // 2:].eq(0).all()


# wan_fp4.py: CLIP

def clip_file(theirs, path, **metadata):
    tensors = {n.removeprefix("vision_model."): t for n, t in theirs.state_dict().items()}
    dim = theirs.config.hidden_size
    out = {"visual.cls_embedding": tensors.pop("embeddings.class_embedding").reshape(1, 1, dim),
           "visual.pos_embedding": tensors.pop("embeddings.position_embedding.weight")[None],
           "visual.head": torch.zeros(dim, 4), "textual.ignored": torch.zeros(1),
           "log_scale": torch.zeros(())}
    for n in list(tensors):
        if ".q_proj." in n:
            qkv = torch.cat([tensors.pop(n.replace("q_proj", x)) for x in ("q_proj", "k_proj", "v_proj")])
            n = n.replace("encoder.layers", "transformer").replace("self_attn.q_proj", "attn.to_qkv")
            out["visual." + n] = qkv
    for n, t in tensors.items():
        for theirs_name, ours in (("embeddings.patch_embedding", "patch_embedding"),
                                  ("pre_layrnorm", "pre_norm"), ("post_layernorm", "post_norm"),
                                  ("encoder.layers", "transformer"), ("self_attn.out_proj", "attn.proj"),
                                  ("layer_norm", "norm"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2")):
            n = n.replace(theirs_name, ours)
        out["visual." + n] = t
    save_file({n: t.contiguous() for n, t in out.items() if "position_ids" not in n}, path, metadata)
    return path


@pytest.mark.parametrize("side, patch, head_dim", [(56, 14, 16), (64, 8, 32)])
def test_clip_equals_transformers(side, patch, head_dim, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel
    theirs = random_weights(CLIPVisionModel(CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=64 // head_dim,
        image_size=side, patch_size=patch, hidden_act="gelu")))
    ours = wan_fp4.load_clip(clip_file(theirs, tmp_path / "clip.safetensors", head_dim=str(head_dim)))
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
        assert relative_error(ours(pixels), expected) < 1e-5
    assert ours.image_size == side


# wan_fp4.py: checkpoints

@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_load_dit_reads_quantised_files_with_any_prefix(prefix, tmp_path):
    theirs = diffusers_dit()
    path = dit_file(theirs, tmp_path / "dit.safetensors")
    tensors, exact = {}, load_file(path)
    for name, w in load_file(path).items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight" and w.dim() == 2 and name.startswith("blocks."):
            data, block_scale, tensor_scale = quant.quantize_nvfp4(w)
            exact[name] = quant.dequantize_nvfp4(data, block_scale, tensor_scale, w.shape)
            tensors |= {prefix + layer + ".weight": data, prefix + layer + ".weight_scale": block_scale,
                        prefix + layer + ".weight_scale_2": tensor_scale,
                        prefix + layer + ".comfy_quant": quant.write_marker({"format": "nvfp4"})}
        else:
            tensors[prefix + name] = w
    save_file(tensors, tmp_path / "q.safetensors", {"head_dim": "32"})
    save_file(exact, path, {"head_dim": "32"})
    quantised, plain = wan_fp4.load_dit(tmp_path / "q.safetensors"), wan_fp4.load_dit(path)
    assert quantised.blocks[0].ffn[0].format == "nvfp4" and plain.blocks[0].ffn[0].format is None
    i = dit_inputs(1, 4, 4, 5)
    with torch.no_grad():
        assert relative_error(quantised(**i), plain(**i)) < 1e-5


def change_dit(tmp_path, change):
    path = dit_file(diffusers_dit(), tmp_path / "dit.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"head_dim": "32"})
    return path


@pytest.mark.parametrize("change, text", [
    (lambda t: t.pop("blocks.1.ffn.2.weight"), "blocks.1.ffn.2.weight: got nothing, expected a tensor"),
    (lambda t: t.pop("blocks.1.norm3.bias"), "blocks.1.norm3.bias: got nothing, expected shape .64,."),
    (lambda t: t.pop("patch_embedding.weight"), "patch_embedding.weight: got nothing"),
    (lambda t: t.update({"blocks.0.extra.weight": torch.zeros(2)}),
     "blocks.0.extra.weight: got a tensor that no"),
    (lambda t: t.update({"blocks.0.self_attn.q.weight": torch.zeros(64, 63)}),
     r"blocks.0.self_attn.q.weight: got \(64, 63\), expected \(64, 64\)"),
    (lambda t: t.update({"head.modulation": torch.zeros(1, 2, 63)}),
     r"head.modulation: got shape \(1, 2, 63\), expected \(1, 2, 64\)"),
    (lambda t: t.update({"blocks.0.ffn.0.comfy_quant": quant.write_marker({"format": "int3"})}),
     "blocks.0.ffn.0.comfy_quant: got .*int3.*expected a format out of nvfp4, mxfp8"),
])
def test_load_dit_names_what_is_wrong(change, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        wan_fp4.load_dit(change_dit(tmp_path, change))


def test_load_dit_names_a_wrong_head_width(tmp_path):
    theirs = diffusers_dit()
    path = dit_file(theirs, tmp_path / "dit.safetensors", head_dim="48")
    with pytest.raises(ValueError, match="head width 48 does not divide the model's width 64"):
        wan_fp4.load_dit(path)


def test_loaders_refuse_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such file"):
        wan_fp4.load_dit(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="broken.safetensors: not a safetensors file"):
        wan_fp4.load_vae(tmp_path / "broken.safetensors")


def test_load_dit_keeps_the_file_mapped(tmp_path):
    """Loading adds far less memory than the file's size: Linears are views of the mapped file."""
    cfg = wan_fp4.DiTConfig(dim=1024, ffn_dim=4096, layers=6, text_dim=64, image_dim=64)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in wan_fp4.WanDiT(cfg).named_parameters()}
    path = tmp_path / "dit.safetensors"
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, path)
    code = f"""
import torch, wan_fp4
def private():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
with torch.device("meta"):
    wan_fp4.WanDiT(wan_fp4.DiTConfig(layers=1))  # what torch imports for its first meta tensor is not ours
before = private()
model = wan_fp4.load_dit({str(path)!r})
print(private() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 200e6 and float(done.stdout) < 40  # MB
