# SPDX-License-Identifier: Apache-2.0
"""Predictors: surrogates of expensive measures, fitted on a history."""
