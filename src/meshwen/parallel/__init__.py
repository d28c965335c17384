# SPDX-License-Identifier: Apache-2.0
"""Meshes, the layout of a model on them, and the contractions in which devices meet."""
