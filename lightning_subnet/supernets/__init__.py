# SPDX-License-Identifier: Apache-2.0
"""Super-networks of the field, each one class."""
