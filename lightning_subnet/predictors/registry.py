# SPDX-License-Identifier: Apache-2.0
"""Predictors by name; a new one is a file beside this one and a line in the table."""

from __future__ import annotations

from typing import Any

from lightning_subnet._messages import did_you_mean
from lightning_subnet._registry import Registry
from lightning_subnet.errors import PredictorError
from lightning_subnet.predictors.base import Predictor
from lightning_subnet.predictors.wrapped import Wrapped
from lightning_subnet.space.space import SearchSpace

PREDICTORS = Registry(
    "predictor",
    "lightning_subnet.predictors",
    {
        "ridge": "lightning_subnet.predictors.base:Ridge",
        "svr": "lightning_subnet.predictors.base:SVR",
        "stack": "lightning_subnet.predictors.base:Stack",
        "gp": "lightning_subnet.predictors.gaussian_process:GP",
        "additive": "lightning_subnet.predictors.additive:Additive",
        "forest": "lightning_subnet.predictors.wrapped:forest",
        "extra-trees": "lightning_subnet.predictors.wrapped:extra_trees",
        "boosting": "lightning_subnet.predictors.wrapped:boosting",
        "auto": "lightning_subnet.predictors.auto:Auto",
    },
)


def names() -> list[str]:
    """Return the names that `make` takes."""
    return PREDICTORS.names()


def make(predictor: Any, *, random_state: int = 0, space: SearchSpace | None = None) -> Predictor:
    """Return an unfitted predictor by name, or around a regressor of scikit-learn.

    Args:
        predictor: One of `names()`, a `Predictor`, or an object with fit and predict; objects are
            copied.
        random_state: The seed of folds and trees; a `Predictor` keeps its own.
        space: The space whose features come, which tells "additive" which of them are alike.

    Raises:
        PredictorError: The name is unknown, or the object is not a predictor.
        PluginError: The name is of another package, and cannot be used.

    Example:
        >>> import numpy as np
        >>> F = np.random.default_rng(0).random((30, 3))
        >>> mean, std = make("ridge").fit(F, F.sum(axis=1)).predict(F, return_std=True)
        >>> bool(np.abs(mean - F.sum(axis=1)).max() < 0.01), bool((std > 0).all())
        (True, True)
    """
    if isinstance(predictor, str) and predictor in PREDICTORS:
        return _by_name(predictor, random_state, space)
    if isinstance(predictor, Predictor):
        return type(predictor)(**predictor.get_params())
    if _is_regressor(predictor):
        return Wrapped(predictor, random_state=random_state)
    is_class = isinstance(predictor, type)
    what = "the class, not an object: add ()" if is_class else f"{predictor!r:.60}"
    hint = did_you_mean(predictor, names()) if isinstance(predictor, str) else ""
    msg = (
        f"The predictor is {what}.{hint} Give one of {', '.join(map(repr, names()))}, "
        "or an object with fit(F, y) and predict(F)."
    )
    raise PredictorError(msg)


def _by_name(name: str, random_state: int, space: SearchSpace | None) -> Predictor:
    """Return the predictor of a name: a class, or a function, that takes `random_state`."""
    factory = PREDICTORS[name]
    if space is not None and isinstance(factory, type) and issubclass(factory, Predictor):
        return factory.for_space(space, random_state=random_state)
    try:
        predictor = factory(random_state=random_state) if callable(factory) else factory
    except TypeError as error:
        if name in PREDICTORS.table:
            raise
        raise PREDICTORS.unusable(name, f"does not take random_state=: {error}") from error
    if isinstance(predictor, Predictor) or _is_regressor(predictor):
        return make(predictor, random_state=random_state)  # a copy: each learns something else
    raise PREDICTORS.unusable(name, f"is {predictor!r:.80}, which has no fit and predict")


def _is_regressor(predictor: Any) -> bool:
    """Return whether an object, not a class, has fit and predict."""
    usable = all(callable(getattr(predictor, method, None)) for method in ("fit", "predict"))
    return usable and not isinstance(predictor, type)
