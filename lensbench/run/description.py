"""The manifest of a run: everything needed to run it again, and to tell whether two runs measure the same thing."""

import json
import time
from dataclasses import asdict
from typing import Any

from lensbench.data.corpus import Corpus
from lensbench.data.inputs import TRAINED_HERE, Texts, documents_of
from lensbench.data.sources import JOIN, sources_of
from lensbench.models.pretrained import named
from lensbench.probes.registry import PROBES
from lensbench.results.manifest import SCHEMA_VERSION, Manifest
from lensbench.run.context import CODE_VERSION, Context
from lensbench.run.inputs import identity_of, source_of
from lensbench.run.sources import lens_identity
from lensbench.runtime.environment import hardware, versions
from lensbench.runtime.files import sha256
from lensbench.suite.changes import without_folder
from lensbench.suite.recipes import ModelRecipe


def describe(
    context: Context,
    counted: dict[str, dict[str, Any]],
    models: list[ModelRecipe],
    files: list[str],
    drawn: list[str],
    plans: dict[str, dict[str, Any]] | None = None,
    left_out: dict[str, str] | None = None,
    weights: dict[str, str] | None = None,
    estimated: dict[str, dict[str, Any]] | None = None,
    half_passes: dict[str, dict[str, Any]] | None = None,
) -> Manifest:
    """The manifest of a finished run.

    ``counted``: what :func:`lensbench.run.baselines.baselines` found for each tokenizer; the first one's stands at the top.
    ``plans``: what each model and seed needed for the suite's precision. ``left_out``: models that could not be read.
    ``weights``: the digest of the weights of each model and seed. ``estimated``: the share of the log-partitions that was
    computed for each, where a suite asks for less than all. ``half_passes``: how far passes in float16 are from float32.
    """
    suite = context.suite
    first = next(iter(counted.values()))
    content = {
        "schema_version": SCHEMA_VERSION,
        "code_version": CODE_VERSION,
        "suite_name": suite.name,
        "suite": described_suite(context),
        "models": [m.name for m in models],
        "seeds": list(suite.seeds),
        "corpus": {
            "spec": spec_of(context),
            "checksum": source_of(context).checksum,
            "documents": documents_of(source_of(context)),
            "tokens": first["tokens"],
            **sources_read(context),
            **({"epochs": round(read, 3)} if (read := epochs(context, counted)) is not None else {}),
        },
        "scored": {
            **first["scored"],
            "sequences_asked": context.sequences or suite.evaluate.sequences,
            "first_position": suite.evaluate.first_position,
        },
        "tokenizers": {
            name: {"tokens": c["tokens"], "scored": c["scored"], **begin_of(context, name)}
            for name, c in counted.items()
        },
        "sources": {m.name: source_facts(context, m.source) for m in models if m.source is not None},
        "files": {name: sha256(context.folder / name) for name in files},
        "figures": drawn,
        "seconds": dict(sorted(context.stages.seconds.items())),
        "peak_gib": max(context.stages.peak_gib.values()),
        "versions": versions(),
        "hardware": {**hardware(context.device), "processes": context.ranks.size},
        "git_revision": context.revision,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    further = {
        "probe_versions": {name: PROBES[name].version for name in suite.probes},
        "lenses": {m.name: lens_identity(m.lens) for m in models if m.lens is not None},
        "weights": weights,
        "options": list(context.options),
        "estimated": estimated,
        "half_passes": half_passes,
        "left_out": left_out,
        "precision": {"asked": suite.evaluate.precision, "models": plans} if plans else None,
    }
    content |= {name: value for name, value in further.items() if value}
    return Manifest.model_validate(json.loads(json.dumps(content)))


def begin_of(context: Context, tokenizer: str) -> dict[str, dict[str, str | None]]:
    """The token that texts of a tokenizer begin with, and in which windows it stands; nothing for images."""
    data = next(data for data in context.cache.data.values() if data.name == tokenizer)
    return {"begin": data.beginning.facts} if isinstance(data, Texts) else {}


def spec_of(context: Context) -> str:
    """The text or images as results name them: the same text is the same corpus wherever it lies."""
    suite = context.suite
    given = suite.corpus.spec if suite.images is None else suite.images.spec
    return JOIN.join(without_folder(part) for part in sources_of(given))


def sources_read(context: Context) -> dict[str, Any]:
    """What each source of the text held, where the text's checksum does not say it all."""
    corpus = source_of(context)
    if not isinstance(corpus, Corpus) or not (len(corpus.sources) > 1 or corpus.spec.startswith("package:")):
        return {}
    return {"sources": [{**asdict(source), "spec": without_folder(source.spec)} for source in corpus.sources]}


def epochs(context: Context, counted: dict[str, dict[str, Any]]) -> float | None:
    """How often a training reads the train split on average; None where no model of the run is trained here on text."""
    suite = context.suite
    trained = any(m.source is None and m.view_of is None and not m.untrained for m in suite.models)
    if suite.images is not None or not trained or TRAINED_HERE not in counted:
        return None
    return float(suite.training.tokens / max(1, counted[TRAINED_HERE]["tokens"]["train"]))


def source_facts(context: Context, source: str) -> dict[str, str]:
    """A pretrained model's source by name, and what it holds."""
    return {"source": named(source), **identity_of(context, source)}


def described_suite(context: Context) -> dict[str, Any]:
    """The suite's settings, without folders of this machine."""
    suite = context.suite
    described = suite.described()
    described["corpus" if suite.images is None else "images"]["spec"] = spec_of(context)
    for model in described["models"]:
        model.update({key: named(model[key]) for key in ("source", "lens") if model[key] is not None})
    return described
