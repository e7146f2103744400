# SPDX-License-Identifier: Apache-2.0
"""Elasticity: what a network must offer to be searched."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
