"""What to run: a suite, read from TOML and checked before anything starts."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lensbench.data.corpus import FRACTIONS
from lensbench.data.images import SPECS
from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError, nearest
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import UpdateRecipe
from lensbench.measures.verdict import VerdictRule
from lensbench.models import FAMILIES, fitting_width
from lensbench.models.pretrained import SOURCES, check_source
from lensbench.probes.registry import PROBES
from lensbench.studies.curves import CurveRecipe
from lensbench.suite.claims import Claim, check_claim, of_each_model
from lensbench.suite.evaluation import LARGEST_GROUPS, EvaluateRecipe
from lensbench.suite.snapshots import written_out


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CorpusRecipe(_Strict):
    """The text, its splits and the tokenizer that models trained here share."""

    spec: str = Field(
        "stdlib", description="stdlib, file:PATH, hf:NAME[/CONFIG][@SPLIT] or package:NAME; several are joined by ' + '"
    )
    vocab_size: int = Field(1024, ge=257, description="entries of the byte-level BPE trained on the train split")
    train: float = Field(FRACTIONS["train"], ge=0, lt=1, description="share of the bytes for training")
    fit: float = Field(FRACTIONS["fit"], gt=0, lt=1, description="share for fitting lenses")
    dev: float = Field(FRACTIONS["dev"], gt=0, lt=1, description="share for choosing")
    eval: float = Field(FRACTIONS["eval"], gt=0, lt=1, description="share that every reported number is measured on")
    seed: int = Field(0, ge=0, description="seed of the split")
    max_bytes: int | None = Field(None, gt=0, description="read no more than this")

    @property
    def fractions(self) -> dict[str, float]:
        """The share of the bytes that each split has."""
        return {"train": self.train, "fit": self.fit, "dev": self.dev, "eval": self.eval}


class ImageRecipe(_Strict):
    """Labelled images in place of a text, and how they are split and shown to models trained here."""

    spec: str = Field("digits", description=SPECS)
    parts: tuple[int, int, int, int] = Field(
        (900, 350, 150, 397),
        description="images to train on, to fit lenses on, to choose on, to measure on; their proportion where there are "
        "more or fewer",
    )
    seed: int = Field(0, ge=0, description="seed of the split")
    max_images: int | None = Field(None, gt=0, description="take no more than this, at random")
    size: int | None = Field(None, ge=2, description="pixels of a side; 8 for digits, else 32")
    channels: Literal[1, 3] | None = Field(None, description="1: grey, 3: colours; 1 for digits, else 3")
    shift: int = Field(1, ge=0, description="augmentation: pixels that a training image is moved by at most, each way")

    @field_validator("parts")
    @classmethod
    def _positive(cls, parts: tuple[int, ...]) -> tuple[int, ...]:
        if parts[0] < 0 or min(parts[1:]) < 1:
            raise ValueError(f"parts are {list(parts)}: fit, dev and eval must have at least 1, train at least 0")
        return parts

    @model_validator(mode="after")
    def _shift_within(self) -> "ImageRecipe":
        if self.shift >= self.shape[1]:
            raise ValueError(f"shift is {self.shift}: images of {self.shape[1]} pixels would be moved out of sight")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Channels, and pixels of a side, of what is trained here."""
        digits = self.spec == "digits"
        return self.channels or (1 if digits else 3), self.size or (8 if digits else 32)


class ModelRecipe(_Strict):
    """A model to train, a pretrained one (``source``), or a second view (``view_of``) of either."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+@-]*$")
    family: str | None = None
    # Bounds far beyond what one machine trains: a slip of the keyboard is refused before anything is built.
    d_model: int | None = Field(None, gt=0, le=2**16)
    layers: int | None = Field(None, ge=2, le=512)
    heads: int | None = Field(None, ge=1, le=2**12)
    parameters: int | None = Field(None, gt=0, le=10**12, description="met within 1 % by the width of the MLPs")
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="some of the suite's seeds; all if left out")
    untrained: bool = Field(False, description="leave it at its initial weights")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the family")
    training: dict[str, Any] = Field(default_factory=dict, description="what differs from the suite's training")
    source: str | None = Field(None, description=f"a pretrained model: {SOURCES}")
    revisions: tuple[str, ...] = Field(
        (),
        description="of a source on the hub, or folders within a path:FOLDER; each is a model NAME@REVISION of its own",
    )
    train_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens that a pretrained model was trained on, a list for revisions; left out, what its config says",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what a pretrained model computes in; lenses are float32"
    )
    device: str | None = Field(None, description="where a pretrained model goes: cpu, cuda or cuda:N; else the run's")
    device_map: str | None = Field(
        None, description="spread a pretrained model over the devices there are: auto, balanced, sequential"
    )
    lens: str | None = Field(
        None,
        description="per-layer lenses in tuned-lens's format for the transfer matrix instead of fitting it: "
        "path:FOLDER or hub:RESOURCE",
    )
    view: Literal["state", "prediction"] = Field(
        "state", description="the whole stream, or what norm and head see of it"
    )
    view_of: str | None = Field(None, description="name of the model that this is another view of")
    rotated: bool = Field(
        False,
        description="every layer before the last seen in a random basis of its own; NAME+rotated alone says so too",
    )
    checkpoint: int | None = Field(
        None, ge=0, description="tokens of the training of checkpoint_of; training.checkpoints writes such models out"
    )
    checkpoint_of: str | None = Field(None, description="name of the model whose training kept this one")

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes that every family is built from."""
        return {key: getattr(self, key) for key in ("d_model", "layers", "heads", "parameters")}

    @model_validator(mode="after")
    def _complete(self) -> "ModelRecipe":
        if self.rotated:
            self._rotates_a_view()
        if self.source is not None:
            self._is_pretrained_alone(self.source)
            return self
        self._loads_nothing()
        if (self.checkpoint is None) != (self.checkpoint_of is None):
            raise ValueError(f"model {self.name!r}: checkpoint and checkpoint_of go together")
        if self.untrained and self.training:
            raise ValueError(f"model {self.name!r} is untrained and cannot set training")
        if self.view_of is None:
            self._can_be_built()
        elif made := self._made_here():
            raise ValueError(f"model {self.name!r} is a view of {self.view_of!r} and cannot set {', '.join(made)}")
        return self

    def _made_here(self) -> list[str]:
        """The settings of a model that is built and trained here which are given."""
        optional = {"family": self.family, **self.shape, "seeds": self.seeds}
        given = [key for key, value in optional.items() if value is not None]
        return given + [key for key in ("settings", "training", "untrained") if getattr(self, key)]

    def _rotates_a_view(self) -> None:
        if self.lens is not None:
            wrong = "lens: lenses of others read no rotated states"
        elif self.view_of is None:
            wrong = "no view_of: whose rotated view is it?"
        else:
            return
        raise ValueError(f"model {self.name!r} is a rotated view and has {wrong}")

    def _is_pretrained_alone(self, source: str) -> None:
        """A pretrained model sets nothing that is for models built here."""
        try:
            check_source(source)
        except LensbenchError as error:  # pydantic says which model of which file it is
            raise ValueError(str(error)) from error
        made = [key for key in ("view_of", "checkpoint") if getattr(self, key) is not None] + self._made_here()
        if made:
            raise ValueError(f"model {self.name!r} is pretrained ({source}) and cannot set {', '.join(made)}")
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"model {self.name!r} sets device and device_map; give one of them")

    def _loads_nothing(self) -> None:
        """A model that is built here sets nothing that is for pretrained models."""
        loading: dict[str, Any] = {"device": self.device, "device_map": self.device_map}
        loading["train_tokens"] = self.train_tokens
        if self.dtype != "float32":
            loading["dtype"] = self.dtype
        wrong = next((key for key, value in loading.items() if value is not None), None)
        if wrong is not None:
            raise ValueError(f"model {self.name!r} sets {wrong}, which is for pretrained models: it has no source")

    def _can_be_built(self) -> None:
        """Its family is known, and what the family needs is given."""
        attends = self.family not in FAMILIES or FAMILIES[self.family].attention
        shape = {"family": self.family, **self.shape}
        missing = [key for key, value in shape.items() if value is None and (key != "heads" or attends)]
        if missing:
            raise ValueError(f"model {self.name!r} needs {', '.join(missing)}")
        if self.family not in FAMILIES:
            raise ValueError(f"unknown model family {self.family!r}; {nearest(str(self.family), list(FAMILIES))}")
        if not attends and self.heads is not None:
            raise ValueError(f"model {self.name!r} sets heads: {self.family} has no attention")


IMAGES_FIX: dict[str, dict[str, int]] = {
    "training": {"length": 1},
    "fit": {"positions": 1, "dev_positions": 1},
    "evaluate": {"positions": 1, "first_position": 0},
}
"""What the settings of sequences are where inputs are images."""


DEFAULT = "default"
"""The preset that changes nothing"""


class Suite(_Strict):
    """One benchmark: which models, on which text or images, fitted and evaluated how."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1, description="what it answers, in one sentence")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    threads: int | None = Field(
        None, ge=1, description="CPU threads of torch: very small models gain little from a second one"
    )
    workers: int = Field(
        1, ge=1, description="models at most at once on a CPU, as far as cores are there for `threads`"
    )
    corpus: CorpusRecipe = CorpusRecipe()
    images: ImageRecipe | None = Field(None, description="labelled images in place of a text")
    training: TrainingRecipe = TrainingRecipe()
    fit: FitRecipe = FitRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    update: UpdateRecipe | None = Field(
        UpdateRecipe(), description="the update decomposition, on by default; `update = false` leaves it out"
    )
    curve: CurveRecipe | None = Field(None, description="learning curves of the models that are trained")
    probes: tuple[str, ...] = Field((), description="measurements next to the lenses, by name")
    verdict: VerdictRule = VerdictRule()
    claims: tuple[Claim, ...] = Field((), description="what `compare` tests, corrected together (Holm)")
    models: tuple[ModelRecipe, ...] = Field(min_length=1)
    presets: dict[str, dict[str, Any]] = Field(
        {},
        exclude=True,
        description="settings in place of the file's, by the name that `--preset` takes; default: none",
    )

    @field_validator("probes")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PROBES:
                raise ValueError(f"unknown probe {name!r}; {nearest(name, list(PROBES))}")
        if len(set(names)) < len(names):
            raise ValueError("a probe is named twice")
        return names

    @field_validator("presets")
    @classmethod
    def _not_the_default(cls, presets: dict[str, Any]) -> dict[str, Any]:
        if DEFAULT in presets:
            raise ValueError(f"the preset {DEFAULT!r} is the file as it is, and cannot be set")
        for name, table in presets.items():
            if inner := {"name", "presets"} & set(table):
                raise ValueError(f"preset {name!r} cannot set {min(inner)!r}")
        return presets

    @field_validator("claims", mode="before")
    @classmethod
    def _of_each_model(cls, given: Any) -> Any:
        return of_each_model(given)

    @field_validator("update", mode="before")
    @classmethod
    def _left_out(cls, given: Any) -> Any:
        return None if given is False else given

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, content: Any) -> Any:
        return written_out(content)

    @model_validator(mode="before")
    @classmethod
    def _one_position_an_image(cls, content: Any) -> Any:
        """Of images each is one position, and a model sees one at a time: what is asked per sequence has one answer."""
        if not isinstance(content, dict) or content.get("images") is None:
            return content
        whole = dict(content)
        for section, fixed in IMAGES_FIX.items():
            given = whole.get(section, {})
            if not isinstance(given, dict):
                continue
            for key, value in fixed.items():
                if given.get(key, value) != value:
                    raise ValueError(f"{section}.{key} is {given[key]}: of images there is nothing to choose there")
            whole[section] = {**given, **fixed}
        if isinstance(evaluate := whole["evaluate"], dict):  # images are read in no time: probes look at all of them
            every = evaluate.get("sequences", EvaluateRecipe.model_fields["sequences"].default)
            whole["evaluate"] = {"probe_sequences": every, **evaluate}
        for section in ("corpus", "curve"):
            if section in whole:
                raise ValueError(f"a suite with [images] cannot have [{section}]")
        return whole

    @model_validator(mode="after")
    def _consistent(self) -> "Suite":
        self._names_differ()
        self._without_the_matrix()
        self._claims_are_of_this_suite()
        for model in self.models:
            self._has_an_owner(model)
            if model.view_of is None and model.source is None:
                self._can_be_trained(model)
        if self.images is not None:
            self._probes_see_images()
            if self.fit.lenses:
                raise ValueError(f"fit.lenses names {self.fit.lenses[0]}: that is for language models")
        else:
            self._text_is_long_enough()
        return self

    def _without_the_matrix(self) -> None:
        """Raise for what is read off a transfer matrix that the suite leaves out, and for one of lenses not fitted."""
        evaluate, fit = self.evaluate, self.fit
        if evaluate.jacobian_matrix and "jacobian" not in fit.lenses:
            raise ValueError("evaluate.jacobian_matrix is true: fit.lenses must name jacobian")
        if evaluate.matrix:
            return
        needs = {
            "fit.tolerances must be empty": bool(fit.tolerances),
            "fit.refits must be 0": bool(fit.refits),
            "evaluate.exact_share must be 1": evaluate.exact_share != 1,
            "evaluate.precision must be left out": evaluate.precision is not None,
        }
        if wrong := [need for need, is_so in needs.items() if is_so]:
            raise ValueError(f"evaluate.matrix is false: {' and '.join(wrong)}, or matrix = true")

    def _names_differ(self) -> None:
        names = [m.name for m in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two models are named {next(n for n in names if names.count(n) > 1)!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")

    def _claims_are_of_this_suite(self) -> None:
        models = {m.name: m.rotated for m in self.models}
        decomposed, landmarks = self.update is not None, self.update is not None and self.update.landmarks
        for claim in self.claims:
            check_claim(claim, models, self.probes, decomposed=decomposed, landmarks=landmarks)

    def _has_an_owner(self, model: ModelRecipe) -> None:
        """A view is of a model of the suite that is no view itself."""
        if model.view_of is None:
            return
        owner = next((m for m in self.models if m.name == model.view_of), None)
        if owner is None or owner.view_of is not None:
            raise ValueError(f"model {model.name!r} is a view of {model.view_of!r}, which no model of the suite is")

    def _can_be_trained(self, model: ModelRecipe) -> None:
        """Its seeds and inputs are the suite's, its sequences long enough, and some width has its parameters."""
        absent = sorted(set(model.seeds or ()) - set(self.seeds))
        if absent:
            raise ValueError(f"model {model.name!r} names seed {absent[0]}, which the suite's seeds are without")
        recipe = self.training_of(model)
        if self.length > recipe.length:
            raise ValueError(
                f"evaluate.length is {self.length}: model {model.name!r} is trained on sequences of {recipe.length}"
            )
        self._fits_what_it_reads(model)
        try:
            if (shape := self._read_shape(recipe)) is not None:
                fitting_width(str(model.family), **shape, **model.shape, **model.settings)
        except LensbenchError as error:
            raise ValueError(f"model {model.name!r}: {error}") from error

    def _probes_see_images(self) -> None:
        """Probes of a suite of images need no text."""
        textual = [name for name in self.probes if not PROBES[name].images]
        if textual:
            others = ", ".join(name for name, probe in PROBES.items() if probe.images)
            raise ValueError(f"probe {textual[0]!r} reads text; probes of images are {others}")

    def _text_is_long_enough(self) -> None:
        """The splits are the whole text, and sequences have the positions that are scored, and that curves ask for."""
        if abs(sum(self.corpus.fractions.values()) - 1) > 1e-6:
            raise ValueError("the corpus fractions train, fit, dev and eval must sum to 1")
        if self.curve is not None:
            self._curve_lies_within(self.curve)
        longest = self.length - 1 - self.evaluate.first_position
        counts = {
            "evaluate.positions": self.evaluate.positions,
            "fit.positions": self.fit.positions,
            "fit.dev_positions": self.fit.dev_positions,
        }
        if too_many := [f"{key} is {count}" for key, count in counts.items() if count > longest]:
            raise ValueError(
                f"{', '.join(too_many)}: sequences of {self.length} tokens (evaluate.length) have no more than {longest} "
                "positions to score"
            )

    def _curve_lies_within(self, curve: CurveRecipe) -> None:
        if curve.budgets and curve.budgets[-1] >= self.training.tokens:
            raise ValueError(f"curve.budgets must stay below training.tokens, {self.training.tokens}")
        step = self.training.batch * self.training.length
        if curve.budgets and curve.budgets[0] < step:
            raise ValueError(f"curve.budgets: {curve.budgets[0]} tokens are less than one step of {step}")
        if curve.positions[-1] > self.length - 2:
            raise ValueError(f"curve.positions: sequences of {self.length} tokens end at {self.length - 2}")

    def _fits_what_it_reads(self, model: ModelRecipe) -> None:
        """Raise ValueError for a model of images in a suite of text, and the other way about."""
        sees = FAMILIES[str(model.family)].images
        if sees != (self.images is not None):
            there = [name for name, family in FAMILIES.items() if family.images != sees]
            what = "sees images, and the suite has no [images]" if sees else "reads text, and the suite has [images]"
            raise ValueError(f"model {model.name!r}: family {model.family} {what}; there are {', '.join(there)}")
        if sees and model.training.get("deep_supervision"):
            raise ValueError(f"model {model.name!r}: deep_supervision is for language models")

    def _read_shape(self, recipe: TrainingRecipe) -> dict[str, int] | None:
        """The part of a model's shape that follows from what it reads; None where one must look at the images."""
        if self.images is None:
            return {"vocab_size": self.corpus.vocab_size, "context": recipe.length}
        if self.images.spec != "digits":
            return None
        channels, size = self.images.shape
        return {"vocab_size": 10, "context": size, "channels": channels}

    def training_of(self, model: ModelRecipe) -> TrainingRecipe:
        """The suite's training with what the model changes; ``tokens``, ``length`` and ``batch`` are common to all."""
        fixed = sorted({"tokens", "length", "batch"} & set(model.training))
        if fixed:
            raise ValueError(
                f"model {model.name!r} changes training.{fixed[0]}: that is the same for all models of a suite"
            )
        unknown = sorted(set(model.training) - set(TrainingRecipe.model_fields))
        if unknown:
            hint = nearest(unknown[0], list(TrainingRecipe.model_fields))
            raise ValueError(f"model {model.name!r}: unknown key 'training.{unknown[0]}'; {hint}")
        try:
            return TrainingRecipe.model_validate({**self.training.model_dump(), **model.training})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"model {model.name!r}: training.{first['loc'][0]}: {first['msg']}") from error

    def seeds_of(self, model: ModelRecipe) -> tuple[int, ...]:
        """The seeds that a model is run with: those it names, or all; a pretrained one is the same at all of them."""
        owner = self.trained(model)
        if owner.source is not None:
            return self.seeds[:1]
        return tuple(seed for seed in self.seeds if owner.seeds is None or seed in owner.seeds)

    def known(self, model: ModelRecipe) -> str | None:
        """What a model's construction says of its stream; None where it says nothing."""
        owner = self.trained(model)
        if owner.untrained or owner.checkpoint == 0:
            return "nothing learned"
        if model.rotated:
            return "re-representation"
        if owner.family == "gpt-partitioned":
            return "carry-along"
        # Every layer reads it out with the model's one head, to see its errors. Without errors the inner layers are free.
        tied = owner.family == "predictive-coding" and owner.settings.get("error", "softmax") == "softmax"
        return "one representation" if tied and model.view == "prediction" else None

    def described(self) -> dict[str, Any]:
        """What a manifest says of the suite; what it does without is not named, as before there was any."""
        absent = {name for name in ("curve", "images") if getattr(self, name) is None}
        settings = self.model_dump(mode="json", exclude=absent | (set() if self.images is None else {"corpus"}))
        settings["claims"] = [claim.model_dump(mode="json", exclude_none=True) for claim in self.claims]
        if not self.training.checkpoints:
            del settings["training"]["checkpoints"]
        for model in settings["models"]:
            for key in ("revisions", "train_tokens", "checkpoint", "checkpoint_of"):
                if model[key] in (None, []):
                    del model[key]
        if self.evaluate.groups == LARGEST_GROUPS:
            del settings["evaluate"]["groups"]
        if self.evaluate.exact_share == 1:
            del settings["evaluate"]["exact_share"]
        if self.evaluate.matrix:
            del settings["evaluate"]["matrix"]
        for added in ("top", "jacobian_matrix"):
            if not settings["evaluate"][added]:
                del settings["evaluate"][added]
        return settings

    @property
    def length(self) -> int:
        """Tokens of the sequences that lenses are fitted, chosen and scored on."""
        return self.evaluate.length or self.training.length

    def trained(self, model: ModelRecipe) -> ModelRecipe:
        """The model itself, or the one it is a view of."""
        return model if model.view_of is None else next(m for m in self.models if m.name == model.view_of)

    def whole_training(self, model: ModelRecipe) -> ModelRecipe:
        """The model at the end of the training that ``model`` or what it is a view of comes from; a checkpoint is not."""
        owner = self.trained(model)
        return next(m for m in self.models if m.name == (owner.checkpoint_of or owner.name))
