# SPDX-License-Identifier: Apache-2.0
"""Groups of channels that `elasticize`, NVIDIA Model-Optimizer and Torch-Pruning find.

    python -m benchmarks.elasticize [--networks resnet18 ...] [--times]

Networks are those of tests/zoo, of tiny configurations. Per network and tool: `groups`, how many
groups of channels, heads or streams may be smaller; `exact`, of how many a network that is cut to
half of one group gives what the whole network gives if nothing reads the other half; `run`, how
many others run after the cut (a normalisation over fewer channels gives other numbers); `failed`,
the rest; `why`, the first error. With `--times` also `seconds` to find the groups (ours: with the
proof of each) and their ratio to ours, all in one run: they count on an idle machine only.

Model-Optimizer is converted with "fastnas", any number of channels allowed; its half is the first
one. Torch-Pruning drops every second channel of each group of `get_all_groups` whose layers are not
the last ones. Both are in an environment that this script makes, in scratch/, on top of .venv/zoo
(`make install-zoo`), with the pins of elasticize_constraints.txt.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENV = HERE / "scratch" / "elasticize"
ZOO = ROOT / ".venv" / "zoo"
CONSTRAINTS = HERE / "elasticize_constraints.txt"
REQUIREMENTS = ("nvidia-modelopt", "torch-pruning", "requests")  # the last is not declared
EXACT = 1e-4


def environment() -> Path:
    """Return the interpreter of the environment, which is made if it is not there."""
    python = ENV / "bin" / "python"
    stamp = ENV / ".installed"
    if not stamp.exists():
        if not (ZOO / ".installed").exists():
            sys.exit("There is no .venv/zoo: run `make install-zoo` first.")
        subprocess.run([ZOO / "bin" / "python", "-m", "venv", "--clear", ENV], check=True)
        [packages] = (ENV / "lib").glob("python*/site-packages")
        shared = ZOO / packages.relative_to(ENV)
        (packages / "zoo.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
        pins = [
            option
            for name in (ROOT / "constraints.txt", ROOT / "constraints-zoo.txt", CONSTRAINTS)
            for option in ("-c", name)
        ]
        subprocess.run([python, "-m", "pip", "install", "-q", *pins, *REQUIREMENTS], check=True)
        stamp.touch()
    return python


class Ours:
    """`elasticize`; a group is a choice, and half of it its smallest value."""

    name = "lightning-subnet"

    def find(self, net: Any, example: Any) -> int:
        from lightning_subnet.supernets.elasticizing import elasticize

        self.net = elasticize(
            copy.deepcopy(net), example, widths=(0.5, 1), divisor=1, streams=True, depth=False,
            importance=None,
        )  # fmt: skip
        self.names = list(self.net.search_space().names)
        return len(self.names)

    def cut(self, net: Any, example: Any, i: int) -> Any:
        space = self.net.search_space()
        half = space.values[self.names[i]][0]
        self.net.load_state_dict(net.state_dict())
        return self.net.extract(space.subnet({**space.largest.to_json(), self.names[i]: half}))


class ModelOptimizer:
    """NVIDIA's; a group is a symbol of its search space."""

    name = "Model-Optimizer"

    def _converted(self, net: Any, example: Any) -> tuple[Any, list[tuple[str, Any]]]:
        import modelopt.torch.nas as mtn
        from modelopt.torch.opt.utils import named_hparams

        rule = {"*": {"channels_ratio": (0.5, 1.0), "channel_divisor": 1}}
        linear = {"*": {"features_ratio": (0.5, 1.0), "feature_divisor": 1}}
        config = {
            "nn.Conv1d": rule, "nn.Conv2d": rule, "nn.Conv3d": rule,
            "nn.ConvTranspose1d": rule, "nn.ConvTranspose2d": rule, "nn.ConvTranspose3d": rule,
            "nn.Linear": linear,
        }  # fmt: skip
        converted = mtn.convert(net, mode=[("fastnas", config)])
        hparams = named_hparams(converted, configurable=True, unique=True)
        return converted, [(n, h) for n, h in hparams if "depth" not in n]

    def find(self, net: Any, example: Any) -> int:
        try:
            return len(self._converted(copy.deepcopy(net), example)[1])
        except Exception as error:
            if "any configurable hyperparameters" in str(error):
                return 0
            raise

    def cut(self, net: Any, example: Any, i: int) -> Any:
        import modelopt.torch.nas as mtn

        converted, hparams = self._converted(net, example)
        hparam = hparams[i][1]
        hparam.active = min(hparam.choices)
        return mtn.export(converted)


class TorchPruning:
    """Torch-Pruning; a group is one of its dependency graph."""

    name = "Torch-Pruning"

    def _groups(self, net: Any, example: Any) -> tuple[Any, list[Any]]:
        import torch_pruning as tp
        from torch import nn

        for p in net.parameters():
            p.requires_grad_(True)  # it follows the graph of gradients
        graph = tp.DependencyGraph().build_dependency(net, example, verbose=False)
        last = [m for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1:]
        types = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)
        return graph, list(graph.get_all_groups(ignored_layers=last, root_module_types=types))

    def find(self, net: Any, example: Any) -> int:
        return len(self._groups(copy.deepcopy(net), example)[1])

    def cut(self, net: Any, example: Any, i: int) -> Any:
        graph, groups = self._groups(net, example)
        root = groups[i][0]
        channels = list(range(1, len(root.idxs), 2))
        graph.get_pruning_group(root.dep.target.module, root.dep.handler, channels).prune()
        return net


def checked(tool: Any, net: Any, example: Any, i: int) -> tuple[str, str]:
    """Return "exact", "run" or "failed" for half of a group, and the error."""
    from lightning_subnet._torch.outputs import difference
    from tests.zoo.masks import forget, mark, marks, outputs

    try:
        part = tool.cut(copy.deepcopy(net), example, i)
        found = outputs(part, example)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0]:.100}"
    marked, whole = copy.deepcopy(net), copy.deepcopy(net)
    mark(marked)
    try:
        kept = marks(tool.cut(marked, example, i), net)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {str(error).splitlines()[0]:.100}"
    shapes = {n: p.shape for n, p in net.named_parameters()}
    if all(p.shape == shapes.get(n) for n, p in part.named_parameters()):
        return "failed", "nothing was cut"
    forget(whole, kept)
    expected = outputs(whole, example)
    same = difference(expected, found).relative <= EXACT
    return ("exact" if same else "run"), ""


def row(name: str, tool: Any) -> dict[str, Any]:
    """Return what a tool makes of a network."""
    import torch

    from tests.zoo.masks import shaken
    from tests.zoo.networks import CASES

    torch.manual_seed(0)
    net, example = shaken(CASES[name].build()), CASES[name].inputs(2)
    start = time.perf_counter()
    result: dict[str, Any] = {"network": name, "tool": tool.name, "groups": 0}
    counts = {"exact": 0, "run": 0, "failed": 0}
    why = ""
    try:
        result["groups"] = tool.find(net, example)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]:.100}"
    result["seconds"] = time.perf_counter() - start
    for i in range(result["groups"]):
        outcome, error_of_it = checked(tool, net, example, i)
        counts[outcome] += 1
        why = why or error_of_it
    return {**result, **counts, "why": why}


def main() -> None:
    import pandas as pd
    import torch

    import tests.zoo.networks as zoo

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(zoo.CASES))
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "elasticize.csv")
    arguments = parser.parse_args()
    tools: list[Callable[[], Any]] = [Ours, TorchPruning, ModelOptimizer]
    rows = []
    for name in arguments.networks:
        of_network = [row(name, tool()) for tool in tools]
        ours = of_network[0]["seconds"]
        for result in of_network:
            seconds = result.pop("seconds")
            if arguments.times:
                result |= {"seconds": round(seconds, 2), "ratio": round(seconds / ours, 3)}
        rows += of_network
        print(*of_network, sep="\n", flush=True)
        pd.DataFrame(rows).to_csv(arguments.out, index=False)
    print(pd.DataFrame(rows).drop(columns="why").to_string(index=False))


if __name__ == "__main__":
    if Path(sys.prefix).resolve() != ENV:
        python = environment()
        os.execv(python, [str(python), "-m", "benchmarks.elasticize", *sys.argv[1:]])
    warnings.filterwarnings("ignore")
    main()
