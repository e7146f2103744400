# SPDX-License-Identifier: Apache-2.0
"""Elasticity: the protocol of a super-network, and layers to make one of."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
