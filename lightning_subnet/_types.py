# SPDX-License-Identifier: Apache-2.0
"""Array types that the whole package shares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
