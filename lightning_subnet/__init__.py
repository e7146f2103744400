# SPDX-License-Identifier: Apache-2.0
"""Find the best sub-networks of any elastic super-network, inside an ordinary Lightning project.

The names of every day are here, the rest in the packages: `lightning_subnet.costs` and so on. All
are loaded on first use, so that importing the package costs next to nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
