from collections.abc import Sequence

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
    def add_row(
        self,
        template: NDArray[np.void],
        integers: Sequence[tuple[int, NDArray[np.int32]]],
        amounts: Sequence[tuple[int, NDArray[np.float64]]],
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

def first_fault(rows: NDArray[np.void]) -> tuple[int, int] | None: ...
def row_layout() -> dict[str, int]: ...
