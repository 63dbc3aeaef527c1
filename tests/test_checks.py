"""The checks of annotations that every test runs under: they are there, and they refuse."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from checks import Checks, checked
from jaxtyping import Float, TypeCheckError

import rq4lens
from rq4lens.patching.patch import blend


def modules():
    """All but the one that runs the command line, and the one that needs Triton."""
    names = [each.name for each in pkgutil.walk_packages(rq4lens.__path__, "rq4lens.")]
    without = ("rq4lens.__main__", "rq4lens.patching.engines.kernels")
    return [importlib.import_module(name) for name in names if name not in without]


def functions_of(module):
    """Functions and methods that a module defines."""
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        members = vars(thing).values() if inspect.isclass(thing) else [thing]
        for each in members:
            function = getattr(each, "__func__", getattr(each, "fget", each))
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                yield function


def test_every_function_of_the_package_is_checked():
    """No function is without a wrapper, unless its annotations allow everything."""
    n_checked, unchecked = 0, []
    for module in modules():
        for function in functions_of(module):
            if hasattr(function, "__wrapped__"):
                n_checked += 1
            elif not hasattr(function, "__no_type_check__") and Checks.of(function).made:
                unchecked.append(f"{function.__module__}.{function.__qualname__}")
    assert n_checked > 1000
    assert unchecked == []


def test_the_package_refuses_other_axes():
    """Two arrays of one call whose axes of one name differ in size."""
    z, mask = torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    assert blend(z, z + 1, mask, 0.5).shape == z.shape
    with pytest.raises(BeartypeCallHintViolation, match="dimension"):
        blend(z, torch.ones(2, 4, 5), mask, 0.5)


def test_an_inner_function_is_checked_whenever_it_is_defined():
    """The second definition calls itself, not the first one, and is checked like it."""

    def outer(added):
        @checked
        def inner(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
            return x + y + added

        return inner

    first, second = outer(1.0), outer(2.0)
    two = np.zeros(2)
    assert first(two, two).tolist() == [1, 1]
    assert second(two, two).tolist() == [2, 2]
    assert first(two, two).tolist() == [1, 1]
    for inner in (first, second):
        with pytest.raises(BeartypeCallHintViolation):
            inner(two, np.zeros(3))
        with pytest.raises(BeartypeCallHintViolation):
            inner("two", "two")


def test_what_comes_back_is_checked():
    """Against the axes of what was handed over."""

    @checked
    def first(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        return x[:1]

    assert first(np.zeros(1)).shape == (1,)
    with pytest.raises(BeartypeCallHintViolation):
        first(np.zeros(2))


def test_axes_are_those_of_one_call():
    """The name of an axis is another size in a call inside, and in the next call."""

    @checked
    def inner(x: Float[np.ndarray, "n"]) -> int:
        return len(x)

    @checked
    def outer(x: Float[np.ndarray, "n"]) -> int:
        return inner(x[1:]) + len(x)

    assert [outer(np.zeros(n)) for n in (2, 5)] == [3, 9]


def test_a_generator_is_checked_in_a_scope_of_its_own():
    """Its arguments are, when it is called, whatever sizes the axes of its caller have."""

    @checked
    def steps(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> Iterator[float]:
        yield from x + y

    @checked
    def caller(x: Float[np.ndarray, "n"]) -> list[float]:
        return [*steps(x[1:], x[1:]), *steps(x, x)]

    assert caller(np.ones(3)) == [2.0] * 5
    with pytest.raises(TypeCheckError):
        steps(np.ones(2), np.ones(3))


def test_fields_are_checked():
    """A dataclass refuses a field of another type."""

    @checked
    @dataclass
    class Named:
        name: str

    assert Named("a").name == "a"
    with pytest.raises(BeartypeCallHintViolation):
        Named(1)
