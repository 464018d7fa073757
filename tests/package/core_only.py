"""What must work where nothing but the core dependencies is installed; run by test_package.py and `nox -s package`.

    python tests/package/core_only.py          # in an environment that has no extra installed
    python tests/package/core_only.py --hide   # in one that has: imports of what extras bring fail

Prints one line for each feature that needs an extra, and ends non-zero if one doesn't say which.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MODULES = {"scikit-learn": "sklearn"}
"""Distributions whose module has another name."""


def brought_by_extras() -> set[str]:
    """Distributions that the extras of users ask for."""
    found = set()
    for requirement in importlib.metadata.requires("lightning-prune") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == [\"'](\w+)", requirement)
        if name and extra and extra[1] not in ("dev", "docs", "bench"):
            found.add(name[0].lower())
    return found - {"lightning-prune", "tqdm"}


class Without:
    """A finder that doesn't find some distributions and their modules."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder = finder
        self.hidden = hidden
        self.modules = {MODULES.get(name, name.replace("-", "_")) for name in hidden}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.modules else self.finder.find_spec(name, path, target)

    def find_distributions(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for found in self.finder.find_distributions(*args, **kwargs):
            if found.metadata["Name"].lower() not in self.hidden:
                yield found


def import_everything() -> int:
    """Import every module of the package; those of the command line may say which extra they are in."""
    import lightning_prune

    count = 0
    for module in pkgutil.walk_packages(lightning_prune.__path__, "lightning_prune."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
            count += 1
        except ImportError as error:
            if not module.name.startswith("lightning_prune.cli.") or "lightning-prune[cli]" not in str(error):
                raise
    return count


def features() -> dict[str, Callable[[], Any]]:
    """What needs an extra, by the extra's name and a word of what it is."""
    import torch
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    import lightning_prune as lp
    from lightning_prune.models import ImageClassifier, LeNet

    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)

    def search() -> None:
        loader = DataLoader(TensorDataset(images, labels), batch_size=4)
        callback = lp.ActivationSearch(("relu", "tanh"), mode="trial", strategy="optuna", trials=1)
        Trainer(
            max_epochs=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(ImageClassifier(LeNet()), loader, loader)

    def curves() -> Any:
        return lp.sensitivity(LeNet(), [(images, labels)], lambda out, y: (out.argmax(1) == y).float().mean())

    return {
        "plots: plot_lr": lambda: lp.plot_lr("cosine", lr=0.1, steps=5, T_max=5),
        "plots: Sensitivity.plot": lambda: curves().plot(),
        "plots: Report.to_html": lambda: lp.compare(LeNet(), LeNet(), images[:1], latency=False).to_html(),
        "search: ActivationSearch(strategy='optuna')": search,
    }


def prune_something() -> None:
    """The core's own work."""
    import torch

    import lightning_prune as lp
    from lightning_prune.models import LeNet

    model = LeNet()
    plan = lp.prune_neurons(model, torch.rand(1, 3, 32, 32), 0.5, of="macs")
    lp.prune_weights(model, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        lp.save_pruned(model, Path(folder, "lenet.safetensors"))
        again = lp.load_pruned(Path(folder, "lenet.safetensors"), LeNet())
    x = torch.rand(2, 3, 32, 32)
    assert plan
    assert torch.equal(again(x), model(x))
    print(lp.compare(LeNet(), model, x[:1], plan=plan, latency=False))


def command_line() -> tuple[int, str]:
    """``python -m lightning_prune --help`` and what it says, in a process of its own that hides the same."""
    hide = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import core_only; core_only.hide(); "
    run = "import runpy; sys.argv = ['lightning-prune', '--help']; runpy.run_module('lightning_prune', run_name='__main__')"
    code = (hide if any(isinstance(f, Without) for f in sys.meta_path) else "import sys; ") + run
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def hide() -> None:
    """From now on extras can't be imported."""
    hidden = brought_by_extras()
    wrapped = [Without(each, hidden) if hasattr(each, "find_distributions") else each for each in sys.meta_path]
    sys.meta_path[:] = wrapped


def main() -> None:
    """Check everything."""
    if "--hide" in sys.argv:
        hide()
    found = [name for name in ("matplotlib", "optuna", "jsonargparse", "sklearn", "onnx") if _importable(name)]
    assert not found, f"extras are installed: {', '.join(found)}; use --hide"
    print(f"{import_everything()} modules imported")
    prune_something()
    from lightning_prune import PruningError

    for name, run in features().items():
        extra = name.partition(":")[0]
        said = "nothing"
        try:
            run()
        except PruningError as error:
            said = str(error).splitlines()[0]
        print(f"{name}: {said}")
        assert f"lightning-prune[{extra}]" in said, f"{name} must name its extra"
    if importlib.util.find_spec("lightning_prune.__main__"):
        code, said = command_line()
        print(f"lightning-prune --help: exit code {code}: {said.strip().splitlines()[-1]}")
        assert code in (0, 2), said
        assert code == 0 or "lightning-prune[cli]" in said, said
        assert "Traceback" not in said, said


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
