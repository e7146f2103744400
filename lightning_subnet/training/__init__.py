# SPDX-License-Identifier: Apache-2.0
"""Training: training and validating subnets with a Lightning Trainer."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
