# SPDX-License-Identifier: Apache-2.0
"""Export: a network as a file that gives the same outputs, and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
