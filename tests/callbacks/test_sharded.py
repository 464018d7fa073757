"""WeightPruning in one process, under DDP and sharded (FSDP2): one result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_cases import run_script
from sharded_cases import CASES, RESUMED

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 doesn't run on a CPU"
)

KINDS = {"one": 1, "ddp": 2, "sharded": 2}
SCRIPT = Path(__file__).parents[1] / "sharded_cases.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    for kind in KINDS:
        done = run_script(SCRIPT, Path(kind), folder)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return {kind: [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(n)] for kind, n in KINDS.items()}


def assert_close(first: Any, second: Any) -> None:
    assert first["masks"].keys() == second["masks"].keys()
    for name, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][name]), name
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_two_processes_do_what_one_does(results: Any, kind: str, name: str) -> None:
    one, (first, second) = results["one"][0][name], (each[name] for each in results[kind])
    for part in ("masks", "weights"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items()), part
    assert_close(one, first)
    gone = sum(int((~mask).sum()) for mask in first["masks"].values())
    total = sum(mask.numel() for mask in first["masks"].values())
    assert abs(gone - total / 2) <= len(first["masks"])
    assert all(not first["weights"][key][~mask].any() for key, mask in first["masks"].items())


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_never_stopping(results: Any, kind: str, name: str) -> None:
    for each in results[kind]:
        whole, resumed = each[f"{name} resumed"]
        for part in ("masks", "weights"):
            assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items()), part
        assert all(map(torch.equal, whole["state"], resumed["state"]))
