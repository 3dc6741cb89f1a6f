"""tuned-lens's own command line on the same tokens, where an environment is at hand in which it runs.

``python -m venv tl && tl/bin/pip install torch tuned-lens==0.2.0 torchdata==0.9.0 'transformers<5'`` makes one.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tuned_lens.nn.lenses import TunedLens

from benchmarks.speed.published import STEPS, WINDOWS_PER_STEP, chosen
from benchmarks.speed.recipe import Setting
from benchmarks.speed.task import Ledger, Task
from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.streams.capture import Capture


def run(
    task: Task, held_out: dict[str, Capture], folder: Path, scratch: Path, executable: Path, say: Callable[[str], None]
) -> None:
    """``package.csv``: every layer's held-out KL after the package's own loop of 250 steps, and its seconds per step.

    Twice: at its default setting (SGD, rate 1) and at the one that the sweep chose for the first layer asked for; it has
    one rate for all layers. Its lenses run under bfloat16 autocast, as it has them; the model is loaded in float32.
    Seconds are those of the whole command less those of the same command with a single step.
    """
    ledger = Ledger(folder / "package.csv", ("optimizer", "lr_scale", "lens"))
    swept = Ledger(folder / "sweep.csv", ()).rows()["lens"].iloc[0]
    last = task.stream.layers - 1
    export(task, scratch)
    for setting in dict.fromkeys((Setting("sgd", 1.0), chosen(folder, swept))):
        if ledger.has(optimizer=setting.optimizer, lr_scale=setting.lr_scale, lens=last):
            continue
        once = train(executable, scratch, setting, 1, task.length)
        seconds = (train(executable, scratch, setting, STEPS, task.length) - once) / (STEPS - 1)
        lens = TunedLens.from_unembed_and_pretrained(task.stream.readout, str(scratch / "lens"))
        for layer, translator in enumerate(lens.layer_translators):
            weight = translator.weight.detach() + torch.eye(task.stream.d_model)
            maps = AffineMaps(weight[None], translator.bias.detach()[None])
            documents = folder / "package-documents.parquet"
            row = task.measured(maps, layer, held_out, documents, lens=layer, setting=str(setting))
            ledger.add(
                lens=layer, optimizer=setting.optimizer, lr_scale=setting.lr_scale, steps=STEPS,
                tokens=STEPS * WINDOWS_PER_STEP * task.length, **row, seconds_per_step=seconds,
            )  # fmt: skip
        say(f"tuned-lens's own command, {setting}: {seconds:.2f} s a step")


def export(task: Task, scratch: Path) -> None:
    """The model, as releases of transformers before 5 read it, and the fit split, one word for each token."""
    (scratch / "model").mkdir(parents=True, exist_ok=True)
    model = task.stream.model
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # of a GGUF file, whose weights are plain numbers by now
    config["rope_theta"] = (config.pop("rope_parameters", None) or {}).get("rope_theta", 10_000.0)
    (scratch / "model" / "config.json").write_text(json.dumps(config, default=str))
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if k not in tied}
    save_file(weights, scratch / "model" / "model.safetensors", metadata={"format": "pt"})
    words = {f"t{n}": n for n in range(task.stream.vocab_size)}
    end = model.config.eos_token_id
    end = int(end) if isinstance(end, int) and 0 <= end < len(words) else 0
    del words[f"t{end}"]
    words["<end>"] = end
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(scratch / "model" / "tokenizer.json"))
    (scratch / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "unk_token": "<end>"})
    )
    with open(scratch / "fit.jsonl", "w") as file:
        for document in task.documents["fit"]:
            text = " ".join("<end>" if n == end else f"t{n}" for n in document.ids.tolist())
            file.write(json.dumps({"text": text}) + "\n")


def train(executable: Path, scratch: Path, setting: Setting, steps: int, length: int) -> float:
    """Seconds of one ``tuned-lens train``, whose output is kept in ``tuned-lens.log``."""
    command = [
        str(executable), "train", "--model.name", str((scratch / "model").resolve()), "--precision", "float32",
        "--data.name", str((scratch / "fit.jsonl").resolve()), "--output", str((scratch / "lens").resolve()),
        "--num_steps", str(steps), "--tokens_per_step", str(WINDOWS_PER_STEP * length), "--max_length", str(length),
        "--per_gpu_batch_size", str(WINDOWS_PER_STEP), "--optimizer", setting.optimizer.upper(),
        "--lr_scale", str(setting.lr_scale),
    ]  # fmt: skip
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    start = time.perf_counter()
    with open(scratch / "tuned-lens.log", "w") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=scratch, check=False
            )
        except OSError as error:
            raise LensbenchError(f"--tuned-lens {executable}: {error.strerror}") from error
    if done.returncode:
        lines = (scratch / "tuned-lens.log").read_text().strip().splitlines()
        raise LensbenchError(f"tuned-lens's command failed: {lines[-1] if lines else done.returncode}")
    return time.perf_counter() - start
