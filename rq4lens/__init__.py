"""rq4lens: which attention heads carry what a fine-tune changed.

>>> import rq4lens as rq
>>> pair = rq.load_pair("etiquette")
>>> maps = rq.fit_maps(pair, layers=[1, 2])
>>> run = rq.run_grid(pair, maps, layer=1, control_layer=2, alpha=0.3)
>>> run.ranking.top(4)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rq4lens import figures as figures
    from rq4lens.analysis.analyse import analyse as analyse
    from rq4lens.analysis.saved import read_run as read_run
    from rq4lens.analysis.structure.layers import compare_layers as compare_layers
    from rq4lens.config import AnalysisEffort as AnalysisEffort
    from rq4lens.config import Effort as Effort
    from rq4lens.config import Patching as Patching
    from rq4lens.config import Place as Place
    from rq4lens.config import Reading as Reading
    from rq4lens.config import RunConfig as RunConfig
    from rq4lens.config import config_from as config_from
    from rq4lens.config import preset as preset
    from rq4lens.config import preset_names as preset_names
    from rq4lens.config import read_config as read_config
    from rq4lens.errors import UserError as UserError
    from rq4lens.heads import Head as Head
    from rq4lens.heads import HeadSet as HeadSet
    from rq4lens.jobs.run import run as run
    from rq4lens.jobs.sweep import sweep_layers as sweep_layers
    from rq4lens.models.catalog import load_pair as load_pair
    from rq4lens.models.load.loading import load_hooked as load_hooked
    from rq4lens.models.pair import ModelPair as ModelPair
    from rq4lens.models.pair import PairMember as PairMember
    from rq4lens.models.prompts.audit import audit_prompts as audit_prompts
    from rq4lens.models.prompts.prompt_set import PromptSet as PromptSet
    from rq4lens.models.prompts.record import Message as Message
    from rq4lens.models.prompts.record import Prompt as Prompt
    from rq4lens.patching.engines.hooks import patched_heads as patched_heads
    from rq4lens.patching.experiment import Experiment as Experiment
    from rq4lens.patching.experiment import prepare as prepare
    from rq4lens.patching.grid import measure_grid as measure_grid
    from rq4lens.patching.grid import run_grid as run_grid
    from rq4lens.patching.grid import run_sweep as run_sweep
    from rq4lens.patching.maps.fitting import fit_maps as fit_maps
    from rq4lens.results import ConditionResult as ConditionResult
    from rq4lens.results import GridResult as GridResult
    from rq4lens.results import HeadRanking as HeadRanking
    from rq4lens.validation.planting import plant as plant
    from rq4lens.validation.suite import validate as validate

# Where each public name lives. Importing rq4lens loads none of them: torch and TransformerLens
# take seconds, and the command line must answer at once.
_HOMES = {
    "analyse": "rq4lens.analysis.analyse",
    "compare_layers": "rq4lens.analysis.structure.layers",
    "AnalysisEffort": "rq4lens.config",
    "Effort": "rq4lens.config",
    "Patching": "rq4lens.config",
    "Place": "rq4lens.config",
    "Reading": "rq4lens.config",
    "RunConfig": "rq4lens.config",
    "config_from": "rq4lens.config",
    "preset": "rq4lens.config",
    "preset_names": "rq4lens.config",
    "read_config": "rq4lens.config",
    "UserError": "rq4lens.errors",
    "Head": "rq4lens.heads",
    "HeadSet": "rq4lens.heads",
    "audit_prompts": "rq4lens.models.prompts.audit",
    "plant": "rq4lens.validation.planting",
    "load_pair": "rq4lens.models.catalog",
    "load_hooked": "rq4lens.models.load.loading",
    "ModelPair": "rq4lens.models.pair",
    "PairMember": "rq4lens.models.pair",
    "Message": "rq4lens.models.prompts.record",
    "Prompt": "rq4lens.models.prompts.record",
    "PromptSet": "rq4lens.models.prompts.prompt_set",
    "Experiment": "rq4lens.patching.experiment",
    "prepare": "rq4lens.patching.experiment",
    "fit_maps": "rq4lens.patching.maps.fitting",
    "measure_grid": "rq4lens.patching.grid",
    "run_grid": "rq4lens.patching.grid",
    "run_sweep": "rq4lens.patching.grid",
    "patched_heads": "rq4lens.patching.engines.hooks",
    "ConditionResult": "rq4lens.results",
    "GridResult": "rq4lens.results",
    "HeadRanking": "rq4lens.results",
    "read_run": "rq4lens.analysis.saved",
    "run": "rq4lens.jobs.run",
    "sweep_layers": "rq4lens.jobs.sweep",
    "validate": "rq4lens.validation.suite",
}

# Modules that are used as they are: `rq.figures.head_plane(...)`.
_ROOMS = ("figures",)

__all__ = [*_ROOMS, *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"rq4lens.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rq4lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
