# SPDX-License-Identifier: Apache-2.0
"""Whether measured latencies can be trusted (D of the benchmark protocol).

    OMP_NUM_THREADS=1 python -m benchmarks.latency_fidelity [--runtimes eager onnxruntime openvino]

On the elastic MobileNetV3 for 32 x 32 pixels, one sample, one thread, for each runtime:
- repeat: 50 random subnets at once, then again with a new measure. Kendall's tau between the
  two (target: at least .95 for eager and onnxruntime), the median relative difference once a
  common factor, that of the two references, is divided out, and the z score of the differences by
  the standard errors that the measure gave (1 where those are right).
- predict: tau of predictors of 25, 50 and 100 other subnets, timed with the defaults of
  `Latency`, on those 50, mean of both.
- table: error and tau, on the same 50, of a `LatencyTable` that timed each block once, with those
  defaults, and ten whole subnets for its scale.
- extracted: the time of the extracted subnet relative to that of the super-network with the subnet
  in force, in turns, in eager torch.

Rows of other runtimes and parts that `--out` has stay in it. Exits with 1 where the target is
missed. With `compile`, take few subnets.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.data import RESULTS
from lightning_subnet import Latency, activated, extract
from lightning_subnet.costs import LatencyTable
from lightning_subnet.costs.runtimes.registry import names
from lightning_subnet.predictors import features, kendall_tau, make
from lightning_subnet.supernets import ElasticMobileNetV3

TARGET, HELD_TO_IT = 0.95, ("eager", "onnxruntime")
SAMPLES, PREDICTORS = (25, 50, 100), ("auto", "ridge", "additive")
IMAGE = torch.zeros(1, 3, 32, 32)


class Sample:
    """Random subnets in one runtime, and their latencies.

    Args:
        settings: The measure.
        n: The number of subnets with two latencies.
    """

    def __init__(self, settings: Latency, n: int) -> None:
        torch.manual_seed(0)
        self.net = ElasticMobileNetV3.small()
        self.settings, self.n = settings, n
        self.usual = Latency(runtime=settings.runtime)
        self.space = self.net.search_space()
        self.subnets = self.space.sample(n + max(SAMPLES), rng=0)
        self.passes: list[np.ndarray] = []  # (n, 2): values and standard errors, in ms
        self.seconds: list[float] = []
        self.preparing: list[float] = []

    def measure(self, start: int, stop: int, settings: Latency | None = None) -> np.ndarray:
        """Return values and errors (n, 2) of some of the subnets, by a measure of their own."""
        measure = (settings or self.settings).bind(self.net, IMAGE)
        measure([self.space.largest])  # the reference, once for all
        began = time.perf_counter()
        rows = np.array(measure(self.subnets[start:stop]))
        self.seconds.append((time.perf_counter() - began) / len(rows))
        self.preparing += [timing.preparing for timing in measure.timings.values()]
        return rows


def repeat(sample: Sample) -> Iterator[dict[str, Any]]:
    for _ in range(2):
        sample.passes.append(sample.measure(0, sample.n))
    (a, a_error), (b, b_error) = (rows.T for rows in sample.passes)
    ratio = a / b
    ratio /= np.median(ratio)
    z = np.log(ratio) / np.hypot(a_error / a, b_error / b)
    yield {
        "tau": float(kendall_tau(a, b)[0]),
        "median difference": np.median(np.abs(ratio - 1)),
        "z": np.median(np.abs(z)) / 0.6745,
        "spread of subnets": a.std() / a.mean(),
        "s/subnet": np.mean(sample.seconds),
        "of these preparing": np.median(sample.preparing),
    }


def predict(sample: Sample) -> Iterator[dict[str, Any]]:
    unseen = np.mean([rows[:, 0] / np.median(rows[:, 0]) for rows in sample.passes], axis=0)
    values = sample.measure(sample.n, sample.n + max(SAMPLES), sample.usual)[:, 0]
    F = features(sample.space, sample.space.indices(sample.subnets))
    for n in SAMPLES:
        for name in PREDICTORS:
            fitted = make(name, space=sample.space).fit(F[sample.n :][:n], values[:n])
            tau = kendall_tau(fitted.predict(F[: sample.n]), unseen)[0]
            yield {"samples": n, "predictor": name, "tau": float(tau)}


def table(sample: Sample) -> Iterator[dict[str, Any]]:
    whole = np.mean([rows[:, 0] for rows in sample.passes], axis=0)
    began = time.perf_counter()
    built = LatencyTable.build(sample.net, IMAGE, latency=sample.usual)
    seconds = time.perf_counter() - began
    measure = built.bind(sample.net, IMAGE)
    summed = measure.evaluate(sample.space, sample.space.indices(sample.subnets))[0]
    summed = summed[: sample.n]
    yield {
        "tau": float(kendall_tau(summed, whole)[0]),
        "mape": 100 * float(np.mean(np.abs(summed / whole - 1))),
        "blocks": len(built.blocks),
        "seconds": seconds,
    }


def extracted(sample: Sample) -> Iterator[dict[str, Any]]:
    if sample.settings.runtime != "eager":
        return  # the others cannot run a super-network without making a subnet of it first
    ratios = []
    for subnet in sample.subnets[:10]:
        with activated(sample.net, subnet):
            timing = sample.settings.timing(
                extract(sample.net, subnet), IMAGE, reference=sample.net
            )
        ratios.append(timing.value)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    yield {"extracted / sliced": middle, "quartiles": f"{low:.2f}-{high:.2f}"}


PARTS: dict[str, Callable[[Sample], Iterator[dict[str, Any]]]] = {
    "repeat": repeat,
    "predict": predict,
    "table": table,
    "extracted": extracted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runtimes", nargs="+", default=["eager", "onnxruntime", "openvino"], choices=names()
    )
    parser.add_argument("--subnets", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=4.0, help="as in Latency")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency_fidelity.csv")
    args = parser.parse_args()
    rows = []
    for name in args.runtimes:
        settings = Latency(runtime=name, seconds=args.seconds, repeats=10_000, tolerance=0.0005)
        sample = Sample(settings, args.subnets)
        for part in dict.fromkeys(["repeat", *args.parts]):
            began = time.perf_counter()
            rows += [{"runtime": name, "part": part} | row for row in PARTS[part](sample)]
            print(f"{name}, {part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    frame = pd.DataFrame(rows)
    if args.out.exists():  # other parts stay
        old = pd.read_csv(args.out)
        new = pd.MultiIndex.from_frame(frame[["runtime", "part"]])
        keep = ~pd.MultiIndex.from_frame(old[["runtime", "part"]]).isin(new)
        frame = pd.concat([frame, old[keep]], ignore_index=True)
        frame = frame.sort_values(["runtime", "part"], kind="stable")
    print(frame.to_string(index=False, na_rep="", float_format="{:.3f}".format))
    args.out.parent.mkdir(exist_ok=True, parents=True)
    frame.to_csv(args.out, index=False, float_format="%.4f")
    taus = frame[frame.part == "repeat"].set_index("runtime").tau
    missed = [n for n in HELD_TO_IT if n in taus and not taus[n] >= TARGET]
    for name in missed:
        print(f"FAIL: tau of {name} is {taus[name]:.3f}, target {TARGET}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
