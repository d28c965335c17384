# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5 for causal language modelling."""
