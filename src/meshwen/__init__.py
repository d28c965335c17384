# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5 in JAX, tensor-parallel on any mesh of devices."""
