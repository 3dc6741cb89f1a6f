"""What the stages of a run share: its suite, its folder, its processes, and what has been loaded so far."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lensbench.data.corpus import Corpus
from lensbench.data.images import ImageSet
from lensbench.data.inputs import Data, Texts
from lensbench.runtime.environment import git_revision
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.stages import Stage, Stages
from lensbench.streams.half import HalfAgreement
from lensbench.streams.stream import ResidualStream
from lensbench.suite.recipes import ModelRecipe, Suite

CODE_VERSION = 3
"""Raised when lensbench measures something else from the same settings; manifests report it."""


STAGE_FORMAT = 1
"""Raised when the files of a stage change, so that stages of earlier versions are computed anew."""


@dataclass
class Cache:
    """What a run has read and loaded so far, each once."""

    stages: dict[str, Stage] = field(default_factory=dict)
    """Finished stages by name: two views of a model share its training"""
    streams: dict[tuple[str, str], ResidualStream] = field(default_factory=dict)
    """Streams of one model at a time, by its digest and the view"""
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    """What each pretrained source holds"""
    data: dict[str, Data] = field(default_factory=dict)
    """Tokenised texts, or images, by the name of the tokenizer"""
    captures: dict[str, str] = field(default_factory=dict)
    """Captures on disk that this process has made or read: key -> name of the model"""
    reported: set[str] = field(default_factory=set)
    """Stages of other processes that the user was told of"""
    warned: set[str] = field(default_factory=set)
    """Sources that the user was warned about"""
    half: dict[str, HalfAgreement | None] = field(default_factory=dict)
    """How well passes in float16 agree, by the digest of a model; None where they are not used"""
    corpus: Corpus | None = None
    images: ImageSet | None = None

    def texts_alone(self) -> "Cache":
        """A new cache with the texts of this one, for another process; images hold functions that cannot be sent."""
        texts = {name: one for name, one in self.data.items() if isinstance(one, Texts)}
        return Cache(sources=dict(self.sources), data=dict(texts), corpus=self.corpus)

    def read_so_far(self) -> "Cache":
        """A new cache with what this one knows of texts, images and sources, for the next task of the same process."""
        return Cache(sources=dict(self.sources), data=dict(self.data), corpus=self.corpus, images=self.images)


@dataclass(frozen=True)
class Context:
    """A suite, and where and how its stages are computed.

    Copies made with :func:`dataclasses.replace` share stages and cache.
    """

    suite: Suite
    stages: Stages
    device: torch.device
    progress: Progress = QUIET
    ranks: Ranks = ALONE
    """The processes that train, fit and score together; the first one does everything else."""
    compute: bool = True
    """Whether missing stages are computed; else one raises :class:`lensbench.runtime.stages.NotFinished`."""
    probes: tuple[str, ...] = ()
    """The probes that are computed, all of the suite's where it is empty; finished results of others are still read."""
    only: tuple[str, ...] = ()
    """The models that are computed, all of the suite's where it is empty."""
    max_hours: float = 1.0
    """A run to a stated precision is refused where scoring is predicted to take longer."""
    sequences: int | None = None
    """How many held-out sequences are scored, in place of the suite's number: what its precision needs."""
    options: tuple[str, ...] = ()
    """What the command line changed of the suite's file, as its options"""
    cache: Cache = field(default_factory=Cache)
    revision: str | None = field(default_factory=git_revision)
    """Of the code that runs, whatever is committed meanwhile."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.stages.root.parent

    @property
    def unit(self) -> str:
        """What a model makes one prediction for: ``token`` or ``image``."""
        return "token" if self.suite.images is None else "image"

    @property
    def computed(self) -> list[ModelRecipe]:
        """The models of the suite that are computed."""
        return [model for model in self.suite.models if not self.only or model.name in self.only]

    def stage(
        self, name: str, key: dict[str, Any], compute: Callable[[Path], None], *, together: bool = False
    ) -> Stage:
        """The stage of this name, computed unless it is finished, and reported once.

        Of several processes the first computes alone, or all ``together``. Raises
        :class:`lensbench.runtime.stages.NotFinished` where it is missing and this context computes nothing.
        """
        if name in self.cache.stages:
            return self.cache.stages[name]
        full = self._whole(key)
        if self.compute and self.ranks.first and (spent := self.stages.begun(name, full)) is not None:
            self.progress.say(f"{name}: goes on where an earlier attempt of {spent:.0f} s stopped")
        stage = self.stages.run(name, full, compute if self.compute else None, together=together)
        if name not in self.cache.reported:
            self.progress.finished(name, self.stages.seconds[name], stage.reused)
        self.cache.stages[name] = stage
        return stage

    def say_once(self, line: str) -> None:
        """Tell the user, the first time: a model may be loaded, and its states captured, several times in a run."""
        if line not in self.cache.warned:
            self.cache.warned.add(line)
            self.progress.say(line)

    def report_others(self, before: set[str]) -> None:
        """Tell of the stages that other processes have finished meanwhile, which were not there ``before``."""
        new = self.stages.finished() - before - self.cache.reported - self.cache.stages.keys()
        for name, seconds in self.stages.took(new).items():
            self.cache.reported.add(name)
            self.progress.finished(name, seconds, reused=False)

    def digest(self, key: dict[str, Any]) -> str:
        """The digest of a stage of this key."""
        return Stages.digest_of(self._whole(key))

    def _whole(self, key: dict[str, Any]) -> dict[str, Any]:
        """A stage's key with what every stage depends on."""
        return {**key, "code": CODE_VERSION, "format": STAGE_FORMAT, "device": self.device.type}


def digest_of(key: dict[str, Any]) -> str:
    """SHA-256 (hex) of a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
