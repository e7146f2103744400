# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_subnet._torch import fingerprints
from lightning_subnet._torch.fingerprints import code_fingerprint
from lightning_subnet.elasticity import ElasticLinear
from lightning_subnet.supernets import ElasticMobileNetV3

NET = """
class Net(nn.Module):
    @torch.no_grad()
    def forward(self, x, scale=2.0, *, shift=0):
        kinds = {"a", "b"}

        class Parts:
            size = 3

        def inner(y):
            return [y * Parts.size for _ in range(2)]

        return inner(x * scale + shift) if kinds else None
"""


def fingerprint(source: str, name: str = "Net", **names: Any) -> str:
    """Return the hash of a network that stands in a text, as a user's module has it."""
    scope = {"nn": nn, "torch": torch, "__name__": "users", **names}
    exec(source, scope)  # the same class in several versions
    return code_fingerprint(scope[name]())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("class Net(nn.Module):\n", 'class Net(nn.Module):\n    """A network."""\n'),
        ("*, shift=0):\n", '*, shift=0):\n        """Return two."""\n'),
        ("class Parts:\n", 'class Parts:\n            """Sizes."""\n'),
        ("inner(y):\n", 'inner(y):\n            """Return a list."""\n'),
        ("inner(y):\n", "inner(y):\n            # twice\n\n"),
        ("x * scale + shift", "(x * scale) + shift"),
        ("\nclass", "\n\n\nclass"),
        ("(self, x,", "(self, x: torch.Tensor,"),
    ],
)
def test_docstrings_comments_lines_and_form_do_not_count(before: str, after: str) -> None:
    assert before in NET
    assert fingerprint(NET.replace(before, after)) == fingerprint(NET)
    documented = NET.replace("shift=0):\n", 'shift=0):\n        """One."""\n')
    again = documented.replace("One.", "Another: 2.0, None.")
    assert fingerprint(documented) == fingerprint(again) == fingerprint(NET)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("range(2)", "range(3)"),
        ("x * scale", "x / scale"),
        ("scale=2.0", "scale=2.5"),
        ("shift=0", "shift=1"),
        ("size = 3", "size = 4"),
        ('"b"', '"c"'),
        ("        return", "        x = x + 1\n        return"),
        (
            "else None",
            "else ...",
        ),
        ("*, shift", "shift"),
        ("y * Parts", "-y * Parts"),
        ("    def forward", "    def other(self): ...\n    def forward"),
    ],
)
def test_constants_and_statements_count(before: str, after: str) -> None:
    assert before in NET
    assert fingerprint(NET.replace(before, after)) != fingerprint(NET)


def test_the_names_of_keywords_of_a_call_count() -> None:
    call = "class Net(nn.Module):\n    def forward(self, x):\n        return f(x, gain=5.0)\n"
    other = call.replace("gain", "offset")
    assert fingerprint(call) != fingerprint(other)
    twice = call.replace("gain=5.0", "gain=5.0, to=1")
    assert len(set(map(fingerprint, (call, twice, twice.replace("to", "at"))))) == 3


def test_a_text_that_is_no_docstring_counts() -> None:
    stated = "class Net(nn.Module):\n    def forward(self, x):\n        return 'a'\n"
    assert fingerprint(stated) != fingerprint(stated.replace("'a'", "'b'"))


def test_what_a_decorator_of_ours_does_is_ours() -> None:
    wrapper = (
        "def wrap(f):\n    @functools.wraps(f)\n    def g(*a):\n        return {}\n    return g"
    )
    net = "class Net(nn.Module):\n    @wrap\n    def forward(self, x):\n        return {}\n"
    hashes = {}
    for package in ("lightning_subnet.parts", "torch.parts", "theirs"):
        for body in ("f(*a)", "f(*a) or None"):
            scope: dict[str, Any] = {"__name__": package}
            exec("import functools\n" + wrapper.format(body), scope)
            for value in ("x", "-x"):
                hashes[package, body, value] = fingerprint(net.format(value), wrap=scope["wrap"])
    for package in ("lightning_subnet.parts", "torch.parts", "theirs"):
        same = hashes[package, "f(*a)", "x"] == hashes[package, "f(*a) or None", "x"]
        assert same == (package != "theirs")
        assert hashes[package, "f(*a)", "x"] != hashes[package, "f(*a)", "-x"]


class Mine(ElasticMobileNetV3):
    """A user's version of a network of ours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Theirs(Mine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


def test_classes_of_this_package_count_by_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    net, layer = ElasticMobileNetV3.tiny(n_classes=10), ElasticLinear(2, 2)
    mine, theirs = Mine.tiny(n_classes=10), Theirs.tiny(n_classes=10)
    before = [code_fingerprint(module) for module in (net, layer, mine, theirs)]
    assert len(set(before)) == 4
    # Stored values depend on it: it changes with the version alone, or with the parts of a network.
    assert before[0] == "d63335365dc4dc8a67a106e77c79eb57"

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Do something else."""
        return x + 1

    with monkeypatch.context() as tidied:
        tidied.setattr(ElasticLinear, "forward", forward)
        tidied.setattr(ElasticMobileNetV3, "forward", forward)
        tidied.setattr(ElasticMobileNetV3, "__doc__", "Another.")
        assert [code_fingerprint(module) for module in (net, layer, mine, theirs)] == before
    with monkeypatch.context() as changed:
        changed.setattr(fingerprints, "NETWORKS_VERSION", fingerprints.NETWORKS_VERSION + 1)
        after = [code_fingerprint(module) for module in (net, layer, mine, theirs)]
    assert not {*before} & {*after}
    monkeypatch.setattr(Mine, "forward", forward)
    assert code_fingerprint(mine) != before[2]
    assert code_fingerprint(net) == before[0]


class _Scaling:
    def __call__(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2


def test_forward_hooks_count_and_those_of_libraries_do_not() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def double(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2

    def triple(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 3

    prints = {code_fingerprint(net())}
    for place, hook in ((0, double), (1, double), (0, triple), (0, _Scaling())):
        nets = [net(), net()]
        for each in nets:
            each[place].register_forward_hook(hook)
        assert code_fingerprint(nets[0]) == code_fingerprint(nets[1])
        prints.add(code_fingerprint(nets[0]))
    assert len(prints) == 5
    library = net()
    nn.utils.spectral_norm(library[0])  # a hook of torch
    assert code_fingerprint(library) == code_fingerprint(net())
