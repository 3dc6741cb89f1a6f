"""What lies in a checkpoint and is not used: refused where it belongs to the model, said in one line where it does not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lensbench.errors import LensbenchError
from lensbench.runtime.texts import DOWNLOAD_AGAIN, read_json

BUFFERS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|causal_mask|masked_bias|(attn|attention|self_attn|crossattention)\.bias)$"
)
"""Weights that older models saved and newer ones compute: rotary frequencies, masks, places"""


OF_NO_USE = re.compile(r"rope_freqs|attn_rot_embd|_exps\.|_exp_probs|nextn")
"""Tensors of a GGUF file's blocks that are computed, joined with others, or behind the last block"""


ROPE = "rope_freqs.weight"


PREDICTS_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "num_mtp_modules")
"""Names in a config of the number of layers behind the last that predict later tokens (MTP)"""


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".ckpt")
"""Endings of files of weights"""


OF_TRAINING = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)")
"""Files that a trainer needs to go on; nothing of the model is in them"""


ADAPTER = "adapter_config.json"


def unused_weights(source: str, model: PreTrainedModel, unexpected: Iterable[str]) -> str | None:
    """One line on the weights of a checkpoint that a model does not take, such as a vision tower; None without any.

    ``unexpected``: their names. Raises :class:`LensbenchError` where one belongs to a block, or to a module that the model
    has: the checkpoint is then of another model than its config says.
    """
    left = sorted(name for name in unexpected if not BUFFERS.search(name))
    owned = [name for name in left if _belongs(model, name)]
    if owned:
        raise LensbenchError(
            f"{source} holds the weight {owned[0]}{more(owned)}, which its config has no place for: config.json is of "
            "another model, or was changed"
        )
    if not left:
        return None
    kinds = list(dict.fromkeys(_kind(name) for name in left))
    return f"{source}: {len(left)} weights are not read, as the model has no place for them: {', '.join(kinds)}"


def _belongs(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight that the model does not take is one of a block, or of another of its modules."""
    base = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    # A checkpoint of the bare model has its names without the prefix, another one may have it on top.
    for path in (name, base + name, name.removeprefix(base)):
        module = path.rpartition(".")[0]
        above = module.rpartition(".")[0]
        # A new parameter of a module, or a module of one parameter next to others: a norm, or an embedding of places.
        if (path == name and above and above in modules) or (module and module in modules and f"{module}." != base):
            return True
        for found in re.finditer(r"\.(\d+)\.", path):
            blocks = modules.get(path[: found.start()])
            if isinstance(blocks, nn.ModuleList):
                return not _predicts_further(model.config, int(found[1]), len(blocks))
    return False


def _predicts_further(config: PreTrainedConfig, layer: int, layers: int) -> bool:
    """Whether a layer beyond the last is one of those that predict later tokens."""
    text = config.get_text_config()
    extra = next((n for key in PREDICTS_FURTHER if isinstance(n := getattr(text, key, None), int)), 0)
    return layers <= layer < layers + extra


def unused_tensors(source: str, names: Iterable[str], mapped: Iterable[str] | None, layers: int) -> str | None:
    """:func:`unused_weights` for the tensors of a GGUF file, by ``names``.

    ``mapped``: those that transformers has a place for in the model of ``layers`` blocks; None where that is not known.
    """
    known = None if mapped is None else set(mapped)
    beyond: list[str] = []
    unknown: list[str] = []
    others: list[str] = []
    for name in names:
        block = re.match(r"blk\.(\d+)\.", name)
        if block is not None and int(block[1]) >= layers:
            beyond.append(name)
        elif known is not None and name not in known:
            (others if block is None or OF_NO_USE.search(name) else unknown).append(name)
    if owned := beyond or unknown:
        raise LensbenchError(
            f"{source} holds the tensor {owned[0]}{more(owned)}, which transformers has no place for in its model of "
            f"{layers} blocks: the file's metadata are of another model, or transformers cannot read this kind"
        )
    if not others:
        return None
    factors = "; without its factors of rotary frequencies long texts are read another way" if ROPE in others else ""
    return f"{source}: {len(others)} tensors are not read: {', '.join(others[:5])}{factors}"


def _kind(name: str) -> str:
    """The part of a checkpoint that a weight is of: its name up to the first number, at most three parts of it."""
    before, *numbered = re.split(r"\.\d+(?:\.|$)", name)
    parts = before.split(".")
    return ".".join((parts if numbered else parts[:-1] or parts)[:3])


def more(names: list[str]) -> str:
    """`` and N more`` behind the first of several names."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def beside(source: str, folder: Path, model: PreTrainedModel) -> list[str]:
    """A line each on what lies in a model's folder and is not used."""
    lines = []
    content = read_json(folder / "config.json", ours=False)
    if "transformers_weights" not in content and (others := _other_weights(folder)):
        lines.append(f"{source}: {others[0]}{more(others)} beside the weights: not read")
    if content.get("auto_map"):
        lines.append(
            f"{source}: its own code (auto_map in config.json) is not run: it is read as {type(model).__name__}"
        )
    asked = content.get("quantization_config")
    if asked and getattr(model, "hf_quantizer", None) is None:
        method = asked.get("quant_method", "unknown") if isinstance(asked, dict) else "unknown"
        lines.append(f"{source}: its quantization ({method}) is not applied: weights are read as they are stored")
    elif not asked and (beside_it := next((name for name in QUANTIZATIONS if (folder / name).is_file()), None)):
        lines.append(f"{source}: {beside_it} is not read: no quantization is applied")
    return lines + _contradictions(source, content, model)


QUANTIZATIONS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which older tools say how weights are quantized"""


CHANGES = (
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "sliding_window", "query_pre_attn_scalar",
)  # fmt: skip
"""Settings of some architectures that change what a model computes"""


def _contradictions(source: str, content: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """A line each on what config.json says that the model does not do."""
    lines = []
    named = [name for name in content.get("architectures") or () if str(name).endswith(("ForCausalLM", "LMHeadModel"))]
    if named and type(model).__name__ not in named and not content.get("auto_map"):
        lines.append(f"{source}: config.json names {named[0]} and its model_type is read as {type(model).__name__}")
    known = model.config.__class__().to_dict()
    unknown = [key for key in CHANGES if content.get(key) not in (None, False, 1) and key not in known]
    if unknown:
        lines.append(f"{source}: {unknown[0]}{more(unknown)} in config.json is not a setting of {type(model).__name__}")
    rope = content.get("rope_parameters")
    theta = content.get("rope_theta")
    if isinstance(rope, dict) and theta is not None and rope.get("rope_theta", theta) != theta:
        lines.append(
            f"{source}: rope_theta {theta} in config.json is not read: rope_parameters say {rope['rope_theta']}"
        )
    return lines


SMALL_FLOAT = re.compile(r"F[468]_")
"""What safetensors calls floating point of 8 bits or fewer"""


def check_stored(source: str, folder: Path, model: PreTrainedModel) -> None:
    """Raise :class:`LensbenchError` for weights that are read as what they are not, or in place of another.

    Whole numbers, and floating point of 8 bits or fewer, need a scale, which a quantization says. Of two weights whose names
    differ in the prefix of the model alone, one would be read and the other one not.
    """
    base = f"{model.base_model_prefix}."
    known = set(model.state_dict())
    wanted = {} if getattr(model, "hf_quantizer", None) is not None else dict(model.named_parameters())
    short = {name.removeprefix(base) for name, weight in wanted.items() if weight.is_floating_point()}
    seen: dict[str, str] = {}
    for name in sorted(_files_read(folder)):
        if not name.endswith(".safetensors") or not (folder / name).is_file():
            continue
        with safe_open(folder / name, framework="pt") as file:
            for weight in file.keys():  # noqa: SIM118  # it is no dictionary
                kind, bare = file.get_slice(weight).get_dtype(), weight.removeprefix(base)
                if bare in short and (kind[0] in "IU" or SMALL_FLOAT.match(kind)):
                    what = "whole numbers" if kind[0] in "IU" else "numbers of few bits"
                    raise LensbenchError(
                        f"{source}: its weight {weight} is stored as {what} ({kind}), and no quantization in "
                        "config.json says their scale: save the model with weights in floating point of 16 bits or more"
                    )
                other = seen.setdefault(bare, weight)
                if other != weight and not {other, weight} <= known:
                    raise LensbenchError(f"{source} holds one weight twice, as {other} and {weight}: take one out")


def check_index(folder: Path) -> None:
    """Raise :class:`LensbenchError` for an index of weights in several files that does not say where they are."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = folder / name
        if not path.is_file() or (folder / name.removesuffix(".index.json")).is_file():
            continue
        content = read_json(path, ours=False)
        places = content.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise LensbenchError(
                f"{path} is damaged: its weight_map must name the file of each weight; {DOWNLOAD_AGAIN}"
            )
        if lost := sorted({place for place in places.values() if not (folder / place).is_file()}):
            raise LensbenchError(f"{path} names {lost[0]}{more(lost)}, which is not there")
        if not isinstance(content.get("metadata"), dict):
            raise LensbenchError(f"{path} is damaged: it has no metadata; {DOWNLOAD_AGAIN}")
        files = set(places.values())
        safe = all(file.endswith(".safetensors") for file in files)
        if safe and (nowhere := sorted(places.keys() - _stored(folder, files))):
            raise LensbenchError(
                f"{path} names the weight {nowhere[0]}{more(nowhere)}, which lies in none of its files"
            )
        return


def _stored(folder: Path, files: set[str]) -> set[str]:
    """The names of the weights in files of safetensors.

    Raises :class:`LensbenchError` where a file is damaged.
    """
    found: set[str] = set()
    for name in sorted(files):
        try:
            with safe_open(folder / name, framework="pt") as file:
                found.update(file.keys())
        except SafetensorError as error:
            raise LensbenchError(f"{folder / name} is damaged: {error}; {DOWNLOAD_AGAIN}") from error
    return found


def refuse_adapter(source: str, names: Iterable[str]) -> None:
    """Raise :class:`LensbenchError` where an adapter is among a model's files; transformers applies it only with peft."""
    if ADAPTER in names:
        raise LensbenchError(
            f"{source} holds an adapter ({ADAPTER}): merge it into the model (merge_and_unload of peft, then "
            "save_pretrained), or move it away"
        )


def _other_weights(folder: Path) -> list[str]:
    """Files of weights in a folder that transformers does not read, by name."""
    read = _files_read(folder)
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in WEIGHTS and path.name not in read and not OF_TRAINING.match(path.name)
    )


def _files_read(folder: Path) -> set[str]:
    """The files that transformers reads weights from: one, or those that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return {name}
        index = folder / f"{name}.index.json"
        if index.is_file():
            return set(read_json(index, ours=False)["weight_map"].values())
    return set()
