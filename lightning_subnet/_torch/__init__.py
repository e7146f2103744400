# SPDX-License-Identifier: Apache-2.0
"""Helpers for torch that know nothing of subnets: inputs, contexts, fingerprints, devices, MACs."""
