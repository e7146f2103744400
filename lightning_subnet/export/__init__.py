# SPDX-License-Identifier: Apache-2.0
"""Export: a network as a file that gives the same outputs, and back."""
