# SPDX-License-Identifier: Apache-2.0
"""Numerics policies: how sums are ordered and functions rounded."""
