"""The stage that scores predictions by counting alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lensbench.data.inputs import IMAGES, TRAINED_HERE, Data
from lensbench.results.tables import baseline_table
from lensbench.run.context import Context
from lensbench.run.inputs import eval_samples
from lensbench.runtime.files import write_json
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.stages import ANEW
from lensbench.runtime.texts import read_json


def baselines(context: Context, data: Data) -> dict[str, Any]:
    """What counting alone predicts of the tokens (or classes) that the models are scored on, and how many those are.

    Counted on the train split, or on the fit split where there is no train split.
    """

    def compute(folder: Path) -> None:
        samples = eval_samples(context, data)
        rows = np.nonzero(samples.valid)[0]
        ce = data.baselines(samples)
        per_token = {**ce, "document": samples.clusters[rows], "bytes": samples.next_bytes[samples.valid]}
        save_file({k: torch.from_numpy(v) for k, v in per_token.items()}, folder / "tokens.safetensors")
        scored = {
            "sequences": len(samples),
            "documents": len(samples.document_names),
            "tokens": int(samples.valid.sum()),
        }
        write_json(folder / "facts.json", {**data.counts(), "scored": scored, "baselines": list(ce)})

    evaluate = {k: v for k, v in context.suite.evaluate.scored.items() if k != "refit_positions"}
    key = {
        "texts": data.digest,
        "evaluate": evaluate,
        "length": context.suite.length,
        "sequences": context.sequences,
        "clusters": "folders",  # earlier stages hold documents
    }
    name = "baselines" if data.name in (TRAINED_HERE, IMAGES) else f"baselines-{data.name}"
    folder = context.stage(name, key, compute).folder
    facts = read_json(folder / "facts.json", ANEW)
    known = {k: v.numpy() for k, v in read_tensors(folder / "tokens.safetensors", ANEW).items()}
    table = baseline_table(
        {name: known[name] for name in facts.pop("baselines", ("unigram", "bigram"))},
        known["document"],
        known["bytes"],
        facts["train_tokens"],
        context.suite.evaluate.draws,
    )
    table.insert(0, "tokenizer", data.name)
    return {**facts, "table": table}
