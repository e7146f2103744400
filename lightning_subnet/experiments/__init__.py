# SPDX-License-Identifier: Apache-2.0
"""Experiments: many searches; strategies and seeds, hardware settings, a reduced space."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
