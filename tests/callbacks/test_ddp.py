"""Law 5: processes agree, and together they do what one process does with the whole batch."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import ddp_cases
import pytest
import torch
from ddp_cases import CASES, run_script
from lightning_modules import LIGHTNING_WARNINGS, assert_same

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both processes say of a case."""
    folder = tmp_path_factory.mktemp("ddp")
    done = run_script(Path(ddp_cases.__file__), folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)], folder


@pytest.mark.parametrize("name", [*CASES, "resumed"])
def test_ranks_agree_to_the_bit(ranks: Any, name: str) -> None:
    first, second = ranks[0](name)
    statistics = [key for key in first["weights"] if "running" in key]  # DDP keeps rank 0's at each forward
    assert bool(statistics) == (name in ("batch norm", "own random numbers", "recalibrated"))
    for key in statistics:
        assert first["weights"].pop(key).shape == second["weights"].pop(key).shape
    assert_same(second, first)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.same])
def test_two_processes_do_what_one_does(ranks: Any, name: str) -> None:
    together = ranks[0](name)[0]
    alone = CASES[name].run(seed=0, batch_size=16)
    assert [state.get("plan", {}).get("kept") for state in together["callbacks"]] == [
        state.get("plan", {}).get("kept") for state in alone["callbacks"]
    ]
    assert_same([s.get("masks") for s in together["callbacks"]], [s.get("masks") for s in alone["callbacks"]])
    torch.testing.assert_close(together["weights"], alone["weights"], rtol=1e-8, atol=1e-8)


def test_resume_equals_never_stopping(ranks: Any) -> None:
    assert_same(ranks[0]("resumed")[0], ranks[0]("whole")[0])


def test_only_rank_zero_reports(ranks: Any) -> None:
    first, second = ranks[0]("report")
    assert second == [None, None]
    assert first[0] == first[1]
    assert (ranks[1] / "output.txt").read_text().count(first[0]) == 1


FORKED = """
    import sys, warnings, torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning_modules import *
    from lightning_modules import CLASSES
    from lightning_prune import Prunable

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork does not survive the threads of its parent

    class Loadable(Prunable, Task):
        pass

    small = seeded(Loadable)
    fit(small, neurons(0.5), strategy="ddp_fork", devices=2)
    assert sum(layer.out_features for layer in small.net if hasattr(layer, "out_features")) == 11 + CLASSES

    module, callback = seeded(Task), weights(0.5, end=1.0)
    trainer = fit(module, callback, strategy="ddp_fork", devices=2)
    assert zeros(prunable(module)) == (116, 232), zeros(prunable(module))
    fit(module, callback, strategy="ddp_fork", devices=2)
    assert zeros(prunable(module)) == (116, 232), zeros(prunable(module))
    fit(module, callback)
    assert zeros(prunable(module)) == (116, 232), zeros(prunable(module))

    def refused(module, callback, **options):
        before = snapshot(module)
        try:
            fit(module, callback, **options)
        except Exception as error:
            assert_same(snapshot(module), before)
            return str(error)

    alone = seeded(lambda: Task(batch_size=16, batches=2))
    fit(alone, neurons(0.5))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor)

    message = "NeuronPruning can bring a smaller model back from forked or spawned processes only if the module can"
    assert message in refused(seeded(Task), neurons(0.5), strategy="ddp_fork", devices=2)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    message = "NeuronPruning works with SingleDeviceStrategy, DDPStrategy, not with ModelParallel"
    assert message in refused(LateLayers(), neurons(0.5), strategy=strategy, devices=1)
"""


SPAWNED = """
    import warnings, torch
    from lightning_modules import *
    from lightning_prune import Prunable

    class Loadable(Prunable, Task):
        pass

    if __name__ == "__main__":
        warnings.simplefilter("ignore")
        module = seeded(Loadable)
        fit(module, neurons(0.5), strategy="ddp_spawn", devices=2)
        assert module.pruning_plan
        assert sum(layer.out_features for layer in module.net[:-1:2]) == 11
"""


def test_spawned_processes_bring_the_small_model_back(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(textwrap.dedent(SPAWNED))
    done = run_script(script)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_forked_processes_are_served_or_refused(tmp_path: Path) -> None:
    script = tmp_path / "forked.py"
    script.write_text(textwrap.dedent(FORKED))
    done = run_script(script)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
