"""Policies for one hardware on another (Han et al., table 5): each should be best at home.

HW1 is ``bitfusion`` (spatial), HW2 ``zynq7020`` (edge FPGA), HW3 ``vu9p`` (cloud FPGA, batch 16). Bits of all layers of
two small MobileNets on Fashion-MNIST, chosen exactly by what each layer loses at each choice (``fxopt.sensitivity``).

- ``equal_loss``: for each hardware the fastest policy whose losses sum to no more than those of the same bits
  everywhere; the latency of each policy on each hardware, and its test accuracy.
- ``equal_latency``: for each hardware the policy that loses least within the latency of the same bits everywhere, and
  in its place the best of those for another hardware that is within that latency here; their losses and test accuracy.

    .venv/bin/python benchmarks/specialization.py --parts specialization.jsonl > specialization.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from common.output import finish, keep_memory
from common.parts import Parts
from mixed_precision import NETWORKS, WIDTHS, Trained, hash_of

from fxopt import targets
from fxopt.decisions import Capabilities, Policy, SearchSpace
from fxopt.lowering import lower
from fxopt.passes import Quantize
from fxopt.search.solver import solve

HARDWARE = {"HW1": "bitfusion", "HW2": "zynq7020", "HW3": "vu9p"}
BATCHES = {"HW1": 1, "HW2": 1, "HW3": 16}
FRONTIER = 200


class Machine:
    """What policies of one network cost on one hardware."""

    def __init__(self, network: Trained, name: str, space: SearchSpace) -> None:
        self.target = targets.load(HARDWARE[name])
        self.space = space
        self.workload = lower(network.gm, batch=BATCHES[name])
        base = Policy(dict.fromkeys((one.key for one in space), (8, 8)))
        whole = self.latency([base])[0]
        self.tables = [
            self.latency([base.merged(Policy({one.key: choice})) for choice in one.choices])
            - whole * (1 - 1 / len(space))
            for one in space
        ]

    def latency(self, policies: list[Policy]) -> npt.NDArray[np.float64]:
        """Seconds for a batch."""
        return np.asarray(self.workload.estimate(self.target, policies).metric("latency"))


class Comparison:
    """All machines, and what is lost at each choice."""

    def __init__(self, network: Trained) -> None:
        self.network = network
        able = Capabilities({"*": tuple((w, a) for w in WIDTHS for a in WIDTHS)})
        self.space = SearchSpace(Quantize().search_space(network.gm, able))
        known = network.losses(False)
        self.losses = [np.array([known[one.site].get(choice, 0.0) for choice in one.choices]) for one in self.space]
        self.machines = {name: Machine(network, name, self.space) for name in HARDWARE}

    def lost(self, policy: Policy) -> float:
        """The sum of what the layers lose."""
        row = self.space.encode(policy)
        return sum(float(table[i]) for table, i in zip(self.losses, row, strict=True))

    def uniform(self, bits: int) -> Policy:
        """The same bits everywhere."""
        return Policy(dict.fromkeys((one.key for one in self.space), (bits, bits)))

    def fastest(self, name: str, loss: float) -> Policy:
        """The least latency within a loss."""
        return self.space.decode(solve(self.machines[name].tables, self.losses, loss).indices)

    def best(self, name: str, limit: float) -> Policy:
        """The least loss within a latency."""
        return self.space.decode(solve(self.losses, self.machines[name].tables, limit).indices)

    def elsewhere(self, home: str, here: str, limit: float) -> Policy:
        """Of the best policies for ``home``, at any latency there, the one that loses least within a latency here."""
        tables = self.machines[home].tables
        low, high = (sum(float(pick(table)) for table in tables) for pick in (np.min, np.max))
        found = [self.best(home, low + share * (high - low)) for share in np.linspace(0.0, 1.0, FRONTIER)]
        within = np.flatnonzero(self.machines[here].latency(found) <= limit)
        return min((found[i] for i in within), key=self.lost)

    def told(self, policy: Policy) -> dict[str, Any]:
        """What a policy is worth everywhere."""
        latencies = {name: float(machine.latency([policy])[0]) * 1e6 for name, machine in self.machines.items()}
        accuracy = self.network.told(policy, False, 0.0)["accuracy"]
        return {"loss": self.lost(policy), "latency_us": latencies, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="4,5")
    parser.add_argument("--parts", type=Path, help="a file to keep results in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    parts = Parts(options.parts)
    for name in options.networks.split(","):
        made = Comparison(Trained(name, 0, samples=1024, probe=256, judged=0, rate=0.0))
        for bits in map(int, options.bits.split(",")):
            key = {"network": name, "bits": bits}
            same = made.uniform(bits)
            wanted = {("uniform", "", ""): same}
            for home in HARDWARE:
                wanted["equal_loss", home, ""] = made.fastest(home, made.lost(same))
                for here in HARDWARE:
                    limit = float(made.machines[here].latency([same])[0])
                    wanted["equal_latency", home, here] = (
                        made.best(home, limit) if home == here else made.elsewhere(home, here, limit)
                    )
            for (kind, home, here), policy in wanted.items():
                digest = hash_of(policy.to_json())
                told = parts.add({"network": name, "policy": digest}, made.told, policy)
                line = {one: told[one] for one in ("loss", "latency_us", "accuracy")}
                parts.add({**key, "kind": kind, "for": home, "on": here}, lambda line=line: line)
    finish("specialization", {"all": parts.done}, **{one: str(value) for one, value in vars(options).items()})


if __name__ == "__main__":
    main()
