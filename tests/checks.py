"""Each call in the package is checked against its annotations, shapes included, once and cheaply.

The import hook of jaxtyping decorates every function and dataclass with ``jaxtyping.jaxtyped``,
which binds the arguments of each call and checks them twice, and makes its checks anew whenever a
function inside another one is defined: most of the time of a run of a small pair. What it is
replaced by here checks as much. Beartype checks each function where it stands, array annotations
get a scope for the names of their axes, and an inner function takes over the checks that were
made when it was first defined.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

AXES = jaxtyping.jaxtyped("context")
"""A scope in which the name of an axis is one size."""

_by_jaxtyping = jaxtyping.jaxtyped
"""For generators alone: Beartype would check them at their first step, in the scope of a caller."""

FUNCTION = "__beartype_func"
"""The default by which a check of Beartype knows what it calls."""


@dataclasses.dataclass(frozen=True)
class Checks:
    """What was made of a function: its checks, or None where it has none, and whether of axes."""

    made: Callable | None
    of_axes: bool

    @classmethod
    def of(cls, function: Callable) -> Checks:
        """The checks of a function, whose annotations become what they name."""
        for name, annotation in function.__annotations__.items():
            function.__annotations__[name] = _meant(annotation, function.__globals__)
        made = beartype(function)
        of_axes = any(map(_has_axes, function.__annotations__.values()))
        return cls(None if made is function else made, of_axes)

    def around(self, function: Callable) -> Callable:
        """The checks around one definition of their function."""
        if self.made is None:
            return function
        if self.of_axes and inspect.isgeneratorfunction(function):
            return _by_jaxtyping(function, typechecker=beartype)
        made = self.made
        if made.__kwdefaults__[FUNCTION] is not function:
            made = types.FunctionType(
                made.__code__, made.__globals__, made.__name__, made.__defaults__, made.__closure__
            )
            made.__kwdefaults__ = {**self.made.__kwdefaults__, FUNCTION: function}
            functools.update_wrapper(made, function)
        return _in_scope(made) if self.of_axes else made


_known: dict[tuple, Checks] = {}


def checked(thing: Any = None, *, typechecker: object = None) -> Any:
    """A function that checks its arguments and what it returns; a dataclass that checks fields."""
    if thing is None:
        return functools.partial(checked, typechecker=typechecker)
    if not isinstance(thing, type):
        return _checked(thing)
    if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
        thing.__init__ = _checked(thing.__init__)
    return thing


def _checked(function: Callable) -> Callable:
    key = (function.__module__, function.__code__, tuple(function.__annotations__.items()))
    try:
        known = _known.get(key)
    except TypeError:  # an annotation that cannot be looked up
        return Checks.of(function).around(function)
    if known is None:
        known = _known[key] = Checks.of(function)
    return known.around(function)


def _meant(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation names; anything where that does not exist yet."""
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["it"]
    except Exception:
        return Any


def _has_axes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_axes, typing.get_args(annotation)))


def _in_scope(function: Callable) -> Callable:
    @functools.wraps(function)
    def scoped(*arguments, **settings):
        with AXES:
            return function(*arguments, **settings)

    return scoped


jaxtyping.jaxtyped = checked
