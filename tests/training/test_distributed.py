from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file
from tiny_prepared import tiny_recipe, write_tiny_prepared

from training.errors import RunError
from training.loop.distributed import ALONE, Ranks, joined
from training.loop.train_network import build_model, train_network
from training.patches.sampler import PatchSampler
from training.prepared import PreparedSet
from training.recipe import MODELS, ModelName
from training.runs import WEIGHTS

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 240
CPU = torch.device("cpu")
RECIPE = tiny_recipe(train={"batch": 4}, validation={"every_steps": 3, "studies": 1})
FIRST_STEP = ((0, 0, 1, 0, 0), 4)  # entropy, samples

# One of two processes: one step of both models with its gradients kept, then a whole training of each.
WORKER = """
import os, sys
from pathlib import Path
import torch
from test_distributed import RECIPE, gradients
from training.loop.distributed import joined
from training.loop.train_network import train_network
from training.prepared import open_prepared
torch.set_num_threads(1)
prepared, out = open_prepared(Path(sys.argv[1])), Path(sys.argv[2])
with joined(os.environ, "cpu") as ranks:
    found = {model: gradients(model, prepared, ranks) for model in ("pix2pix", "cyclegan")}
    torch.save(found, out / f"{ranks.rank}.pt")
    for model in ("pix2pix", "cyclegan"):
        record = train_network(RECIPE, prepared, model=model, network="legs", seed=0, runs=out / "runs",
                               device=ranks.device, ranks=ranks)
        assert (record.state, record.step) == ("done", 6), record
sys.stdout.flush()
os._exit(0)  # all is written: a thread of torch's that wants the interpreter while it winds down may abort it
"""


def gradients(model: ModelName, prepared: PreparedSet, ranks: Ranks) -> dict[str, torch.Tensor]:
    """What one step leaves in every trained parameter; each process draws its share of the batch."""
    sampler = PatchSampler(
        prepared.load_split("train"),
        "legs",
        window=RECIPE.window,
        input_mask="body",
        train=RECIPE.train,
        augment=RECIPE.augment,
        device=CPU,
    )
    torch.manual_seed(ranks.rank)  # other first weights in every process: the first one's count
    made = build_model(model, RECIPE, CPU, ranks)
    entropy, batch = FIRST_STEP
    made.step(sampler.draw([(*entropy, sample) for sample in ranks.share(batch)]), 1.0, entropy)
    parts = (
        {"generator": made.generator, "discriminator": made.discriminator}
        if model == "pix2pix"
        else {"generators": made.generators, "discriminators": made.discriminators}
    )
    return {
        f"{part}.{name}": parameter.grad.clone()
        for part, network in parts.items()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    folder = tmp_path_factory.mktemp("prepared")
    return write_tiny_prepared(folder, studies=3, recipe=RECIPE, coverage=(0.0, 0.45))


@pytest.fixture(scope="module")
def two_processes(prepared: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real processes on loopback, as torchrun would start them; where they left their results."""
    out = tmp_path_factory.mktemp("two")
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS / "training", TESTS.parent))),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WORKER, str(prepared.folder), str(out)]
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return out


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(
    model: ModelName, prepared: PreparedSet, two_processes: Path
) -> None:
    alone = gradients(model, prepared, ALONE)
    assert len(alone) > 10
    for rank in range(2):
        there = torch.load(two_processes / f"{rank}.pt", weights_only=True)[model]
        assert there.keys() == alone.keys()
        for name, gradient in alone.items():
            torch.testing.assert_close(there[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(gradient.abs().max()) for gradient in alone.values()) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_one_network_to_the_weights_of_one_process(
    model: ModelName, prepared: PreparedSet, two_processes: Path, tmp_path: Path
) -> None:
    record = train_network(RECIPE, prepared, model=model, network="legs", seed=0, runs=tmp_path, device=CPU)
    alone = load_file(tmp_path / record.folder_name / WEIGHTS)
    together = load_file(two_processes / "runs" / record.folder_name / WEIGHTS)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-2, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_is_shared_without_rest_and_without_overlap() -> None:
    shares = [list(Ranks(rank=rank, world=4).share(8)) for rank in range(4)]
    assert sorted(sample for share in shares for sample in share) == list(range(8))
    assert {len(share) for share in shares} == {2}
    with pytest.raises(RunError, match="a batch of 8 cannot be shared by 3 processes"):
        Ranks(rank=0, world=3).share(8)


def test_without_torchrun_there_is_no_group() -> None:
    with joined({}, "cpu") as ranks:
        assert ranks is None
    assert ALONE.any(True) is True
    assert ALONE.wrap(torch.nn.Linear(1, 1)).__class__ is torch.nn.Linear
