# SPDX-License-Identifier: Apache-2.0
"""How well the measures of a history can be predicted."""

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
    """Return how well the measures of a history can be predicted, one row per measure.

    Args:
        space: The space of the subnets.
        history: What was measured; failed evaluations are left out.
        names: The names of the measures.

    Returns:
        `predictor`, what `Auto` chose; `tau`, Kendall's tau on left-out folds, and its standard
        deviation `spread`; `mape`, the mean absolute error in % of the value; and `n`.
    """
    import pandas as pd

    rows = []
    for name in names:
        y = history.column(name)
        known = np.isfinite(y)
        row: dict[str, Any] = {"predictor": "", "tau": np.nan, "spread": np.nan, "mape": np.nan}
        if known.any():
            y = y[known]
            auto = Auto(effects=Effects.of(space))
            auto.fit(features(space, history.indices[known]), y)
            row["predictor"] = "+".join(auto.chosen) if auto.used == "auto" else auto.used
            if auto.used != Predictor.name:
                tau = kendall_tau(auto.out_of_fold, y, fold_of(len(y), auto.random_state))
                row |= {"tau": float(tau.mean()), "spread": float(tau.std())}
            if (some := y != 0).any():
                error = np.abs((auto.out_of_fold - y)[some] / y[some])
                row["mape"] = 100 * float(error.mean())
        rows.append({**row, "n": int(known.sum())})
    index = pd.Index(list(names), name="measure")
    return pd.DataFrame(rows, index=index, columns=["predictor", "tau", "spread", "mape", "n"])


def expensive_report(name: str, problem: Problem | None, history: History | None) -> pd.DataFrame:
    """Return the report on the measures of a search that are not exact.

    Args:
        name: The study's name.
        problem: What is searched; None where that is not known yet.
        history: What was measured.

    Raises:
        SearchError: Nothing was measured yet, or all measures are exact.
    """
    if problem is None or history is None or not history.ok.any():
        msg = (
            f"Study {name!r} has no successful evaluation yet, so there is nothing to predict "
            "from. Run the search first: fit(model, datamodule), run(evaluator) or ask and tell."
        )
        raise SearchError(msg)
    if not (wanted := [measure for measure in problem.names if measure not in problem.exact]):
        msg = f"All measures of study {name!r} are exact ({', '.join(problem.exact)}): none is "
        raise SearchError(msg + "predicted.")
    with _sklearn.one_thread():
        return report(problem.space, history, wanted)
