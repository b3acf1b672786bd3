"""Two-Level Adaptive Learning with Error-Regulated Gradient, for Optax."""

from ._accumulate import AccumulateState as AccumulateState
from ._accumulate import accumulate as accumulate
from ._adapters import TracksParamsState as TracksParamsState
from ._adapters import tracks_params as tracks_params
from ._adapters import without_value as without_value
from ._adopt import adopt as adopt
from ._apply import apply_updates as apply_updates
from ._apply import eval_params as eval_params
from ._apply import healthy_params as healthy_params
from ._average import Average as Average
from ._carry import Carrier as Carrier
from ._carry import carry_value as carry_value
from ._carry import value_from_gradient as value_from_gradient
from ._history import LossHistory as LossHistory
from ._lalerg import lalerg as lalerg
from ._macro import ScaleByMacroRateState as ScaleByMacroRateState
from ._macro import scale_by_macro_rate as scale_by_macro_rate
from ._micro import ScaleByMicroRateState as ScaleByMicroRateState
from ._micro import scale_by_micro_rate as scale_by_micro_rate
from ._monitor import is_stuck as is_stuck
from ._monitor import metrics as metrics
from ._rebase import rebase as rebase
from ._record import Recorder as Recorder
from ._regulate import ErrorRegulateState as ErrorRegulateState
from ._regulate import error_regulate as error_regulate
from ._verdict import Verdict as Verdict
from ._watch import InterventionWarning as InterventionWarning
from ._watch import TooManyRejections as TooManyRejections

__version__ = "0.1.0"
