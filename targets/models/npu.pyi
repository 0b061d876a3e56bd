from collections.abc import Mapping

from fxopt.targets._core import CostModel
from fxopt.targets.parameters import Parameter

PRECISION_NAMES: tuple[str, ...]
TERMS: Mapping[str, tuple[str, str]]
PARAMETERS: Mapping[str, Parameter]

class Model(CostModel):
    def __init__(self, values: Mapping[str, float], fuses: bool) -> None: ...
