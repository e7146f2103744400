# SPDX-License-Identifier: Apache-2.0
"""Results: the record of a search, as tables, pictures, files and modules."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
