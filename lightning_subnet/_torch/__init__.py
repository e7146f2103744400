# SPDX-License-Identifier: Apache-2.0
"""Helpers for torch without subnets: inputs, contexts, fingerprints, MACs."""
