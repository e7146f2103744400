# SPDX-License-Identifier: Apache-2.0
"""Predictors: surrogates of expensive measures, fitted on a history."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
