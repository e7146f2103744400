# SPDX-License-Identifier: Apache-2.0
"""What `elasticize` is made of: the plan of a space, and the network that follows it."""
