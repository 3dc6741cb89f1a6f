"""Lenses beside tuned-lens's own: one shared by all layers, with or without a bias per layer, and their file format."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tuned_lens import load_artifacts
from tuned_lens.nn.lenses import Lens, TunedLens, TunedLensConfig
from tuned_lens.nn.unembed import Unembed
from tuned_lens.utils import tensor_hash

from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.texts import read_json


class SharedLens(Lens):
    """One affine translator for every layer, ``h -> h + A h + b``; with ``layers`` set, one bias per layer, ``b_idx``."""

    def __init__(self, unembed: Unembed, d_model: int, layers: int | None = None):
        super().__init__(unembed)
        dtype = unembed.unembedding.weight.dtype
        # No random weights: a caller's random numbers go on as they would.
        self.translator = nn.utils.skip_init(nn.Linear, d_model, d_model, bias=layers is None, dtype=dtype)
        nn.init.zeros_(self.translator.weight)
        if layers is None:
            nn.init.zeros_(self.translator.bias)
            self.register_parameter("layer_bias", None)
        else:
            self.layer_bias = nn.Parameter(torch.zeros(layers, d_model, dtype=dtype))

    @classmethod
    def from_maps(cls, unembed: Unembed, maps: AffineMaps) -> "SharedLens":
        """From one map, or from L maps that differ in their offset only."""
        d, layers = maps.matrix.shape[-1], len(maps)
        lens = cls(unembed, d, layers if layers > 1 else None)
        with torch.no_grad():
            lens.translator.weight.copy_(maps.matrix[0] - torch.eye(d))
            (lens.translator.bias if layers == 1 else lens.layer_bias).copy_(
                maps.offset[0] if layers == 1 else maps.offset
            )
        return lens

    def transform_hidden(self, h: Tensor, idx: int) -> Tensor:
        """``[..., d] -> [..., d]``; ``idx`` matters only where there is a bias per layer."""
        moved: Tensor = h + self.translator(h)
        return moved if self.layer_bias is None else moved + self.layer_bias[idx]

    def forward(self, h: Tensor, idx: int) -> Tensor:
        """Logits ``[..., V]``."""
        logits: Tensor = self.unembed(self.transform_hidden(h, idx))
        return logits

    def save(self, folder: Path) -> None:
        """``config.json`` and ``params.safetensors``, the config last, each moved into place whole."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("unembed.")}
        save_file(tensors, folder / "params.safetensors.partial")
        os.replace(folder / "params.safetensors.partial", folder / "params.safetensors")
        config = {
            "lens_type": "shared_lens",
            "d_model": self.translator.in_features,
            "layer_biases": None if self.layer_bias is None else len(self.layer_bias),
            "unembed_hash": self.unembed.unembedding_hash(),
        }
        (folder / "config.json.partial").write_text(json.dumps(config, indent=2))
        os.replace(folder / "config.json.partial", folder / "config.json")

    @classmethod
    def load(cls, unembed: Unembed, folder: Path | str) -> "SharedLens":
        """Raises :class:`LensbenchError` for a folder that is damaged or belongs to another model."""
        folder = Path(folder)
        try:
            config = read_json(folder / "config.json")
            if config["unembed_hash"] not in _unembedding_hashes(unembed):
                raise LensbenchError(
                    f"the lens in {folder} was fitted to another model (its unembedding's hash differs)"
                )
            lens = cls(unembed, config["d_model"], config["layer_biases"])
            tensors = read_tensors(folder / "params.safetensors")
            expected = {key for key in lens.state_dict() if not key.startswith("unembed.")}
            if set(tensors) != expected:
                raise ValueError(f"it holds {sorted(tensors)} where its config says {sorted(expected)}")
            lens.load_state_dict(tensors, strict=False)  # all that is left out is the unembedding, which is the model's
            refuse_not_finite(f"the lens in {folder}", tensors)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            what = f"its config.json has no {error}" if isinstance(error, KeyError) else error
            raise LensbenchError(f"{folder} does not hold a shared lens: {what}; copy or save it again") from error
        return lens


def tuned_lens(unembed: Unembed, maps: AffineMaps, *, model_name: str) -> TunedLens:
    """tuned-lens's own class with our maps of layers 0..L-1 as its translators."""
    layers, d = maps.offset.shape
    lens = _blank(unembed, TunedLensConfig(model_name, d_model=d, num_hidden_layers=layers))
    with torch.no_grad():
        for translator, matrix, offset in zip(lens.layer_translators, maps.matrix, maps.offset, strict=True):
            translator.weight.copy_(matrix - torch.eye(d))
            translator.bias.copy_(offset)
    return lens


def _blank(unembed: Unembed, config: TunedLensConfig) -> TunedLens:
    """A lens before its weights are set; tuned-lens draws initial ones, which leaves a caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        return TunedLens(unembed, config)


def lens_files(source: str) -> tuple[Path, Path]:
    """``config.json`` and ``params.pt`` of a lens: ``path:FOLDER``, or ``hub:RESOURCE[@REVISION]`` of tuned-lens's space.

    As ``tuned_lens.load_artifacts`` finds them, TUNED_LENS_REPO_ID and TUNED_LENS_REPO_TYPE included, but that a folder
    of the resource's name is not taken for it. Raises :class:`LensbenchError` where they are not there.
    """
    kind, _, rest = source.partition(":")
    if kind not in ("path", "hub") or not rest:
        raise LensbenchError(f"unknown lens {source!r}: a lens is path:FOLDER or hub:RESOURCE[@REVISION]")
    names = "config.json", "params.pt"
    if kind == "path":
        if not all((Path(rest) / file).is_file() for file in names):
            raise LensbenchError(
                f"{source}: no config.json and params.pt in {rest}; give a folder that TunedLens.save wrote"
            )
        return Path(rest) / names[0], Path(rest) / names[1]
    resource, _, revision = rest.partition("@")
    place = {
        "repo_id": os.environ.get("TUNED_LENS_REPO_ID") or "AlignmentResearch/tuned-lens",
        "repo_type": os.environ.get("TUNED_LENS_REPO_TYPE") or "space",
        "subfolder": f"lens/{resource}",
        "revision": revision or None,
    }
    try:
        config, parameters = (load_artifacts.hf_hub_download(filename=file, **place) for file in names)
    except Exception as error:  # the hub's client raises what its transport does
        raise unreadable_lens(source, error) from error
    return Path(config), Path(parameters)


def unreadable_lens(source: str, error: Exception) -> LensbenchError:
    """One line on a lens that cannot be loaded, with the first line of the reason."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return LensbenchError(f"{source}: the lens cannot be loaded: {reason}")


def load_tuned_lens(unembed: Unembed, source: str) -> TunedLens:
    """A lens in tuned-lens's own format, named as in :func:`lens_files`.

    Raises :class:`LensbenchError` for a lens that cannot be read or was fitted to another model: other hash of the
    unembedding (as stored, or rounded to a half-precision type, as models are published), or a width that it cannot read.
    """
    config_path, parameters = lens_files(source)
    try:
        config = TunedLensConfig.from_dict(read_json(config_path, ours=False))
        wanted = config.unembed_hash
        lens = _blank(unembed, config)  # writes the model's own hash into the config
    except Exception as error:  # json and tuned-lens each raise their own
        raise unreadable_lens(source, error) from error
    try:
        state = torch.load(parameters, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip files and torch each raise their own, some with a number alone
        raise LensbenchError(
            f"{source}: its weights ({parameters.name}) are damaged: they are no file that torch.save wrote, or a part of "
            "one; copy or save the lens again"
        ) from error
    try:
        lens.layer_translators.load_state_dict(state)
    except Exception as error:
        raise unreadable_lens(source, error) from error
    other = f"{source}: the lens was fitted to another model"
    if wanted is not None and wanted not in _unembedding_hashes(unembed):
        raise LensbenchError(f"{other} (its unembedding's hash differs)")
    refuse_not_finite(f"{source}: the lens", state)
    weight = unembed.unembedding.weight
    try:
        unembed(torch.zeros(config.d_model, dtype=weight.dtype, device=weight.device))
    except RuntimeError as error:
        raise LensbenchError(f"{other} (its width is {config.d_model})") from error
    return lens


def refuse_not_finite(what: str, tensors: dict[str, Tensor]) -> None:
    """Raise :class:`LensbenchError` naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise LensbenchError(f"{what} holds NaN or infinite values in {name}: it is damaged")


def _unembedding_hashes(unembed: Unembed) -> Iterator[str]:
    """Of the unembedding as it is, and as it would be stored in half precision."""
    weight = unembed.unembedding.weight.data.detach().cpu()
    for dtype in (weight.dtype, torch.float16, torch.bfloat16):
        yield tensor_hash(weight.to(dtype).float().numpy())


def maps_of(lens: TunedLens) -> AffineMaps:
    """A tuned lens's translators ``h + A h + b`` as maps ``B h + c``, float32."""
    d = lens.config.d_model
    matrix = torch.stack([t.weight.detach().float().cpu() for t in lens]) + torch.eye(d)
    offset = torch.stack([t.bias.detach().float().cpu() for t in lens])
    return AffineMaps(matrix, offset)


def save_tuned_lens(lens: TunedLens, folder: Path) -> None:
    """tuned-lens's own format (``config.json``, ``params.pt``), the folder moved into place whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    lens.save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
