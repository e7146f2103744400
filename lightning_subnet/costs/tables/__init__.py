# SPDX-License-Identifier: Apache-2.0
"""Tables: latency by parts of a network, measured once and added up."""
