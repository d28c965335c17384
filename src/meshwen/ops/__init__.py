# SPDX-License-Identifier: Apache-2.0
"""What a model computes with: linear layers, attention, norms, rotary embeddings."""
