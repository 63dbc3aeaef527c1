"""Where each drawing lives: read when a name is first used, and by type checkers."""

from .alphas import alpha_sweep as alpha_sweep
from .coverage import coverage_curve as coverage_curve
from .coverage import method_curves as method_curves
from .export import find_browser as find_browser
from .export import picture as picture
from .export import write_figures as write_figures
from .export import write_html as write_html
from .heatmaps import agreement_matrix as agreement_matrix
from .heatmaps import interaction_matrix as interaction_matrix
from .heatmaps import layer_heatmap as layer_heatmap
from .heatmaps import position_map as position_map
from .ladder import ladder as ladder
from .layers import global_ranking as global_ranking
from .layers import layer_curves as layer_curves
from .page.gallery import run_figures as run_figures
from .page.parts import Report as Report
from .page.report import report_page as report_page
from .page.report import write_report as write_report
from .plane import head_plane as head_plane
from .plane import map_quality as map_quality
from .plane import per_prompt as per_prompt
from .ranking import rank_flow as rank_flow
from .ranking import ranking_bars as ranking_bars
