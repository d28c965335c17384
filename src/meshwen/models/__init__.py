# SPDX-License-Identifier: Apache-2.0
"""One file an architecture: its config, its weights, its forward pass."""
