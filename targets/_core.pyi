from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class CostModel:
    @property
    def fuses(self) -> bool: ...
    @property
    def has_energy(self) -> bool: ...
    @property
    def fixed_s(self) -> float: ...
    @property
    def searches(self) -> bool: ...
    @property
    def computes_curves(self) -> bool: ...
    @property
    def shares_memory(self) -> bool: ...
    @property
    def stores_otherwise(self) -> bool: ...
    @property
    def stores_zeros(self) -> bool: ...
    def __init__(self, fuses: bool) -> None: ...
    def totals(
        self,
        rows: NDArray[np.void],
        latency_s: NDArray[np.float64],
        energy_j: NDArray[np.float64],
        weight_bytes_out: NDArray[np.float64],
        peak_bytes: NDArray[np.float64],
        macs_out: NDArray[np.float64],
        uncosted: NDArray[np.uint8],
    ) -> None: ...
    def column_totals(
        self,
        template: NDArray[np.void],
        columns: Sequence[Mapping[str, NDArray[Any]]],
        offsets: Mapping[str, int],
        first: int,
        latency_s: NDArray[np.float64],
        energy_j: NDArray[np.float64],
        weight_bytes_out: NDArray[np.float64],
        peak_bytes: NDArray[np.float64],
        macs_out: NDArray[np.float64],
        uncosted: NDArray[np.uint8],
    ) -> None: ...
    def per_row(
        self,
        rows: NDArray[np.void],
        latency_s: NDArray[np.float64],
        energy_j: NDArray[np.float64],
        dram_bytes: NDArray[np.float64],
    ) -> None: ...
    def held_bytes(self, rows: NDArray[np.void], activation_bytes: NDArray[np.float64]) -> None: ...
    def sizes(self, rows: NDArray[np.void], parameter_bytes: NDArray[np.float64]) -> None: ...
