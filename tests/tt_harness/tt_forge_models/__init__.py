# SPDX-License-Identifier: Apache-2.0
"""A stand-in for what loaders import of tt-forge-models."""
