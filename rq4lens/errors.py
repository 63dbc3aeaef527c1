"""The one error a user is meant to read, and the check of types of what a user calls."""

from __future__ import annotations

import builtins
import functools
import inspect
from typing import Any


class UserError(ValueError):
    """Bad input, said in one sentence: the value, what is allowed, and the fix.

    The command line prints the sentence and exits with code 2; a script can catch it as an
    ordinary ``ValueError``.

    >>> rq.Patching(alpha=2)
    Traceback (most recent call last):
    rq4lens.errors.UserError: Patching: alpha = '2' is not allowed ...
    """

    def __str__(self) -> str:
        """The sentence without characters that would act on a terminal."""
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in super().__str__())


WRITTEN = {
    "Experiment": "rq.prepare(pair, maps)",
    "GridResult": "rq.run_grid(pair, maps, layer=1) or the grid of a run",
    "Head": "rq.Head(1, 0) or 'L1H0'",
    "HookedTransformer": "pair.base.model",
    "LoadedModel": "rq.load_hooked('a/folder')",
    "Mapping[int, GridResult]": "{1: rq.run_grid(pair, maps, layer=1)}",
    "Mapping[int, LayerMap]": "rq.fit_maps(pair, layers=1)",
    "MeasuresPatches": "rq.prepare(pair, maps)",
    "Metric": "rq.Metric('margin', function) or 'answer_logprob'",
    "ModelPair": "rq.load_pair('etiquette') or rq.ModelPair(base_model, tuned_model, prompts)",
    "Patching": "rq.Patching(layer=1)",
    "Path": "'a/path'",
    "Run": "rq.read_run('runs/demo')",
    "RunConfig": "rq.preset('etiquette') or rq.RunConfig(patching=rq.Patching(layer=1))",
}
"""What to write for a type of a signature; parameters of other types are checked where used."""


def checks_types(public: Any) -> Any:
    """What is public; a function refuses, in one sentence, what its signature has no type for."""
    if not inspect.isfunction(public):
        return public
    signature, names = inspect.signature(public), inspect.unwrap(public).__globals__

    @functools.wraps(public)
    def checked(*args: Any, **named: Any) -> Any:
        for name, value in signature.bind_partial(*args, **named).arguments.items():
            kinds = str(signature.parameters[name].annotation).split(" | ")
            said = [WRITTEN[kind] for kind in kinds if kind in WRITTEN]
            if said and not isinstance(value, tuple(_type_of(kind, names) for kind in kinds)):
                raise UserError(
                    f"{public.__name__}({name}=...) takes no {type(value).__name__}: give "
                    f"{' or '.join(said)}."
                )
        return public(*args, **named)

    return checked


def _type_of(kind: str, names: dict[str, Any]) -> Any:
    """The type that an annotation names; a mapping is one, whatever it holds."""
    first, *inner = kind.partition("[")[0].split(".")
    found = functools.reduce(getattr, inner, names.get(first, getattr(builtins, first, None)))
    return type(None) if found is None else found
