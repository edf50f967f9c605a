"""LightX2V's NVFP4 layout: read by the loaders, and repacked for ComfyUI by

    python -m extra.lightx2v FILE -o OUT.safetensors

LightX2V (https://github.com/ModelTC/LightX2V) trained Wan2.1 for NVFP4. Its files have the same E2M1 codes and
block scales as ours, but the even element of a pair is in the LOW nibble, there is no marker, and the global
scales divide. A quantized layer has weight, weight_scale and either of

    weight_global_scale = 1 / weight_scale_2,  and in most files  input_absmax = 2688 * input_scale
    input_global_scale = 1 / input_scale       and                alpha = input_scale * weight_scale_2

Nothing is rounded again. Tested with files of this layout that the tests make, not yet with LightX2V's own.
"""
import json
from pathlib import Path

import torch

import quant
import wan_fp4

NUMBERS = "weight_global_scale", "input_absmax", "alpha", "input_global_scale"
ADVICE = "the file is damaged or mixes layouts: download it again"


def unpack(tensors, path):
    """A checkpoint's tensors by name, quantized layers in LightX2V's layout -> the same in ours, with markers.

    Raises ValueError, naming the layer, for missing tensors, other layouts and numbers out of range.
    """
    layers, unpacked = {}, {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        layers.setdefault(layer, {})[suffix] = tensor
    for layer, stored in layers.items():
        if stored.keys() & {*NUMBERS, "comfy_quant", "weight_scale"}:
            stored = unpack_layer(f"{path}: {layer}", stored)
        unpacked |= {f"{layer}.{suffix}" if layer else suffix: tensor for suffix, tensor in stored.items()}
    return unpacked


def unpack_layer(where, stored):
    """The tensors {suffix: tensor} of one layer in our layout."""
    numbers = {suffix: stored[suffix] for suffix in NUMBERS if suffix in stored}
    ours = {suffix: tensor for suffix, tensor in stored.items() if suffix not in numbers}
    known = {*NUMBERS[:1]}, {*NUMBERS[:2]}, {*NUMBERS[2:]}
    if numbers.keys() not in known or ours.keys() - {"bias"} != {"weight", "weight_scale"}:
        raise wan_fp4.wrong(where, ", ".join(sorted(stored)), "weight, weight_scale and weight_global_scale, or "
                            "alpha and input_global_scale, as in LightX2V's NVFP4 layout", ADVICE)
    weight = ours["weight"]
    if weight.dtype != torch.uint8 or weight.dim() != 2 or any(scale.numel() != 1 for scale in numbers.values()):
        got = ", ".join(f"{suffix} {tensor.dtype} {tuple(tensor.shape)}" for suffix, tensor in stored.items())
        raise wan_fp4.wrong(where, got, "a 2-D torch.uint8 weight and single numbers", ADVICE)
    numbers = {suffix: tensor.float().reshape(()) for suffix, tensor in numbers.items()}
    if "alpha" in numbers:
        scales = {"weight_scale_2": numbers["alpha"] * numbers["input_global_scale"],
                  "input_scale": 1 / numbers["input_global_scale"]}
    else:
        scales = {"weight_scale_2": 1 / numbers["weight_global_scale"]}
        if "input_absmax" in numbers:
            scales["input_scale"] = numbers["input_absmax"] / (quant.E4M3_MAX * quant.E2M1_MAX)
    if not all(0 < scale < float("inf") for scale in scales.values()):
        got = ", ".join(f"{suffix} {number.item():g}" for suffix, number in numbers.items())
        raise wan_fp4.wrong(where, got, "positive numbers", ADVICE)
    ours |= {"weight": weight << 4 | weight >> 4} | scales  # (M, K / 2): the even element to the high nibble
    quant.check_stored(where, ours, "nvfp4", 2 * weight.shape[1], weight.shape[0])
    return ours | {"comfy_quant": quant.write_marker({"format": "nvfp4"})}


def main(argv=None):
    parser = wan_fp4.Parser("python -m extra.lightx2v", description="Repack a file in LightX2V's NVFP4 layout "
                            "for ComfyUI. Nothing is rounded.")
    parser.add_argument("file", type=Path, help="safetensors file, shard index .json, or folder of shards")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    with wan_fp4.one_line_errors("lightx2v.py"):
        args = parser.parse_args(argv)
        if args.output.exists():
            raise wan_fp4.wrong(args.output, "an existing file", "a new name", "delete it, or choose another")
        if not wan_fp4.is_lightx2v(wan_fp4.tensor_names(args.file)):
            raise wan_fp4.wrong(args.file, "no weight_global_scale or input_global_scale",
                                "LightX2V's NVFP4 layout", "check the file")
        tensors, metadata = wan_fp4.read_tensors(args.file)  # which unpacks them
        layers = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
        markers = json.dumps({"format_version": "1.0", "layers": dict.fromkeys(layers, {"format": "nvfp4"})})
        wan_fp4.write_safetensors(args.output, tensors, metadata | {"_quantization_metadata": markers})
        print(f"{args.output}: {len(layers)} NVFP4 layers repacked: nibbles swapped, scales renamed and inverted")


if __name__ == "__main__":
    main()
