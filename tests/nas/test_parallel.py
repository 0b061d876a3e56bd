"""Two processes under torchrun train as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxopt.data import IGNORED_LABEL, TensorLoader
from fxopt.errors import DataError
from fxopt.nas import CostTerm, Supernet, SupernetResult, SupernetSettings, train_supernet
from fxopt.nas._parallel import Workers
from fxopt.passes import SelectOperators
from tests.nas.toys import between, loader, mobile, mobile_table, table, toy_graph

METHODS = ("binary", "relaxed", "reinforce")


def toy(method: str, checkpoint: Path | None = None, stop_after: int | None = None) -> SupernetResult:
    """Train without batch norm, on batches of 5 and of 1, some samples without a label."""
    supernet = Supernet(toy_graph(), SelectOperators(candidates=("conv-k3", "separable-k3", "identity")))
    supernet.net.double()
    data = loader(16, 5)
    labels = data.labels.clone()
    labels[:3] = IGNORED_LABEL
    data = TensorLoader(data.inputs.double(), labels, 5)
    settings = SupernetSettings(method=method, warm_up=1, epochs=2)
    terms = [CostTerm("latency", 1e-4, "multiplicative")]
    costs = table(supernet)
    options = {"settings": settings, "checkpoint": checkpoint, "stop_after": stop_after}
    return train_supernet(supernet, data, data, costs, terms, **options)


def state(result: SupernetResult) -> dict[str, torch.Tensor]:
    history = torch.tensor([[one.loss, one.architecture_loss, *one.costs] for one in result.history])
    net = {name: tensor.clone() for name, tensor in result.supernet.net.state_dict().items()}
    return {**net, "alpha": result.supernet.alpha.detach().clone(), "history": history}


def work(folder: Path) -> None:
    """What each of the processes does."""
    rank = torch.distributed.get_rank()
    for method in METHODS:
        save_file(state(toy(method)), folder / f"{method}-{rank}.safetensors")
        toy(method, folder / method, stop_after=7)
        save_file(state(toy(method, folder / method)), folder / f"{method}-resumed-{rank}.safetensors")
    supernet = Supernet(*mobile())
    with torch.no_grad():
        supernet.alpha.add_(float(rank))
    terms = [CostTerm("latency", between(0.5))]
    settings = SupernetSettings(warm_up=1, epochs=1)
    result = train_supernet(supernet, loader(), loader(16, seed=1), mobile_table(), terms, settings=settings)
    save_file(state(result), folder / f"normed-{rank}.safetensors")
    try:  # a checkpoint that one process alone sees
        toy("binary", folder / ("binary" if rank else "elsewhere"))
    except Exception as failure:
        (folder / f"refused-{rank}").write_text(str(failure))


_SCRIPT = """
import gc, pathlib, sys, torch
from tests.nas.test_parallel import work

torch.distributed.init_process_group("gloo")
work(pathlib.Path(sys.argv[1]))
kept = [one for one in gc.get_objects() if isinstance(one, torch.nn.parallel.DistributedDataParallel)]
assert not kept, "they keep the process group, whose threads abort a process that ends now and then"
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes, started by torchrun, have written to."""
    folder, root = tmp_path_factory.mktemp("torchrun"), Path(__file__).parents[2]
    script = folder / "train.py"
    script.write_text(_SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), str(folder)], env=environment, cwd=root, timeout=280, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "told").write_text(done.stderr)
    return folder


def test_processes_end_with_the_same_supernet(trained: Path) -> None:
    for name in (*METHODS, *(f"{one}-resumed" for one in METHODS), "normed"):
        one, other = (load_file(trained / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert list(one) == list(other)
        assert all(torch.equal(one[key].nan_to_num(-1), other[key].nan_to_num(-1)) for key in one), name


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(trained: Path, method: str) -> None:
    """Without batch norm, also where a batch cannot be halved or has but one sample; resumed or not."""
    wanted = state(toy(method))
    for name in (method, f"{method}-resumed"):
        found = load_file(trained / f"{name}-0.safetensors")
        assert sorted(found) == sorted(wanted)
        for key, value in wanted.items():
            assert torch.allclose(found[key], value, atol=1e-6, equal_nan=True), (name, key)


def test_nothing_is_told_that_nobody_can_change(trained: Path) -> None:
    assert "find_unused_parameters" not in (trained / "told").read_text()


def test_processes_that_see_different_checkpoints_are_told(trained: Path) -> None:
    for rank in (0, 1):
        assert "begin at the steps [0, 12]" in (trained / f"refused-{rank}").read_text()


def test_a_share_of_a_batch() -> None:
    workers = Workers(torch.nn.Linear(1, 1))
    batch = (torch.arange(3.0)[:, None], torch.arange(3))
    assert workers.share(batch, "train") is batch
    workers.size = 2
    inputs, labels = workers.share(batch, "train")
    assert (inputs.flatten().tolist(), labels.tolist()) == ([0.0, 2.0], [0, 2])
    workers._rank = 4
    inputs, labels = workers.share((({"x": batch[0]}, 3), batch[1]), "train")
    assert (inputs[0]["x"].tolist(), inputs[1], labels.tolist()) == ([[0.0]], 3, [IGNORED_LABEL])
    with pytest.raises(DataError, match="pair"):
        workers.share(3, "train")
