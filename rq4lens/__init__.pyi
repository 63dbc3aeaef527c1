"""Where each public name lives: read when a name is first used, and by type checkers."""

from . import figures as figures
from .analysis.analyse import analyse as analyse
from .analysis.card.card import head_card as head_card
from .analysis.card.records import HeadCard as HeadCard
from .analysis.saved import read_run as read_run
from .analysis.structure.layers import compare_layers as compare_layers
from .config import AnalysisEffort as AnalysisEffort
from .config import Effort as Effort
from .config import Patching as Patching
from .config import Place as Place
from .config import Reading as Reading
from .config import RunConfig as RunConfig
from .config import config_from as config_from
from .config import preset as preset
from .config import preset_names as preset_names
from .config import read_config as read_config
from .errors import UserError as UserError
from .heads import Head as Head
from .heads import HeadSet as HeadSet
from .jobs.run import run as run
from .jobs.sweep import sweep_layers as sweep_layers
from .models.catalog import load_pair as load_pair
from .models.load.loading import load_hooked as load_hooked
from .models.pair import ModelPair as ModelPair
from .models.pair import PairMember as PairMember
from .models.prompts.audit import audit_prompts as audit_prompts
from .models.prompts.prompt_set import PromptSet as PromptSet
from .models.prompts.record import Message as Message
from .models.prompts.record import Prompt as Prompt
from .patching.engines.hooks import patched_heads as patched_heads
from .patching.experiment import Experiment as Experiment
from .patching.experiment import prepare as prepare
from .patching.grid import measure_grid as measure_grid
from .patching.grid import run_grid as run_grid
from .patching.grid import run_sweep as run_sweep
from .patching.maps.fitting import fit_maps as fit_maps
from .patching.patched import patch as patch
from .results import ConditionResult as ConditionResult
from .results import GridResult as GridResult
from .results import HeadRanking as HeadRanking
from .validation.planting import Planting as Planting
from .validation.planting import plant as plant
from .validation.suite import ValidationSettings as ValidationSettings
from .validation.suite import validate as validate

__version__: str
