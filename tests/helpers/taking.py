"""The public functions of lensbench that are given a model, found by their annotations."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

import lensbench
from lensbench.api import Lenses
from lensbench.models.pretrained import Pretrained
from lensbench.probes.subject import Subject
from lensbench.streams.stream import ResidualStream

HOLDERS = (PreTrainedModel, Pretrained, ResidualStream, Subject, Lenses)
"""A model, and what lensbench holds one in"""


def holds_a_model(annotation: Any) -> bool:
    """Whether an annotation names a holder, alone or in a union, a list or a dict; a function of a holder is none."""
    if isinstance(annotation, str):
        return any(kind.__name__ in annotation for kind in HOLDERS)
    if inspect.isclass(annotation):
        return issubclass(annotation, HOLDERS)
    parts = [part for part in get_args(annotation) if not isinstance(part, list)]
    return "Callable" not in str(annotation).partition("[")[0] and any(map(holds_a_model, parts))


def takes_a_model(function: Any) -> bool:
    """Whether a function, or a class when it is made, is given a model."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        holds_a_model(p.annotation) or (p.name in ("model", "network") and p.annotation is nn.Module)
        for p in parameters
    )


def modules() -> Iterator[ModuleType]:
    yield lensbench.api
    for found in pkgutil.walk_packages(lensbench.__path__, "lensbench."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods; of a class that holds a model all of them, properties too."""
    for name, held in vars(kind).items():
        if name.startswith("_"):
            continue
        if kind in HOLDERS and (inspect.isfunction(held) or isinstance(held, property)):
            yield name, held
        elif callable(bound := getattr(kind, name)) and takes_a_model(bound):
            yield name, bound


def public_functions() -> dict[str, Any]:
    """Every public function, class and method that is given a model or has one: its full name -> it."""
    found: dict[str, Any] = {}
    for module in modules():
        for name, held in vars(module).items():
            if name.startswith("_") or getattr(held, "__module__", "") != module.__name__ or not callable(held):
                continue
            if takes_a_model(held):
                found[f"{module.__name__}.{name}"] = held
            if inspect.isclass(held):
                found |= {f"{module.__name__}.{name}.{method}": f for method, f in members(held)}
    return found


def code_of(function: Callable[..., Any]) -> Any:
    """The code that runs when a function, method or property is used; decorators are taken off."""
    if isinstance(function, property):
        function = function.fget  # type: ignore[assignment]
    function = inspect.unwrap(getattr(function, "__func__", function))
    if inspect.isclass(function):
        function = function.__init__
    return getattr(function, "__code__", None)
