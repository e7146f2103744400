# SPDX-License-Identifier: Apache-2.0
"""Quality of predictions: how well the measures of a history can be predicted from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_subnet.errors import SearchError
from lightning_subnet.predictors import _sklearn
from lightning_subnet.predictors.additive import Effects
from lightning_subnet.predictors.auto import Auto
from lightning_subnet.predictors.base import Predictor, fold_of, kendall_tau
from lightning_subnet.predictors.masked_features import features
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.study.history import History

if TYPE_CHECKING:
    import pandas as pd

    from lightning_subnet.study.problem import Problem


def report(space: SearchSpace, history: History, names: Sequence[str]) -> pd.DataFrame:
    """Return the quality of predictions of the measures of a history, one row per measure.

    Args:
        space: The space of the subnets.
        history: The evaluations; failed ones are left out.
        names: The names of the measures.

    Returns:
        `predictor`, the choice of `Auto`; `tau`, Kendall's tau on left-out folds, and its standard
        deviation `spread`; `mape`, the mean absolute error in % of the value; and `n`.
    """
    import pandas as pd

    rows = []
    for name in names:
        y = history.column(name)
        finite = np.isfinite(y)
        row: dict[str, Any] = {"predictor": "", "tau": np.nan, "spread": np.nan, "mape": np.nan}
        if finite.any():
            y = y[finite]
            auto = Auto(effects=Effects.of(space))
            auto.fit(features(space, history.indices[finite]), y)
            row["predictor"] = "+".join(auto.chosen) if auto.used == "auto" else auto.used
            if auto.used != Predictor.name:
                tau = kendall_tau(auto.out_of_fold, y, fold_of(len(y), auto.random_state))
                row |= {"tau": float(tau.mean()), "spread": float(tau.std())}
            if (nonzero := y != 0).any():
                error = np.abs((auto.out_of_fold - y)[nonzero] / y[nonzero])
                row["mape"] = 100 * float(error.mean())
        rows.append({**row, "n": int(finite.sum())})
    index = pd.Index(list(names), name="measure")
    return pd.DataFrame(rows, index=index, columns=["predictor", "tau", "spread", "mape", "n"])


def expensive_report(name: str, problem: Problem | None, history: History | None) -> pd.DataFrame:
    """Return the report on the measures of a search that are not exact.

    Args:
        name: The study's name.
        problem: The problem of the search; None before there is one.
        history: The evaluations so far.

    Raises:
        SearchError: Nothing was measured yet, or all measures are exact.
    """
    if problem is None or history is None or not history.ok.any():
        msg = (
            f"Study {name!r} has no successful evaluation yet, so there is nothing to predict "
            "from. Run the search first: fit(model, datamodule), run(evaluator) or ask and tell."
        )
        raise SearchError(msg)
    measures = [measure for measure in problem.names if measure not in problem.exact]
    if not measures:
        msg = f"All measures of study {name!r} are exact ({', '.join(problem.exact)}): none is "
        raise SearchError(msg + "predicted.")
    with _sklearn.one_thread():
        return report(problem.space, history, measures)
