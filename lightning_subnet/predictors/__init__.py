# SPDX-License-Identifier: Apache-2.0
"""Predictors: surrogates of expensive measures, fitted on a history.

A new predictor is a file here with one class and a line in the table of `registry.py`; then
`python -m tests.stubs` writes the list of public names. The class derives from `base.Predictor`,
which says what it has to implement, and its test from `PredictorContract`. A predictor of another
package has the same class and test, and in place of the line an entry point of the group
`lightning_subnet.predictors`. Any regressor with scikit-learn's `fit` and `predict` is a predictor
without either.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
