# SPDX-License-Identifier: Apache-2.0
"""What is particular to CPUs: the kernels, and workarounds for XLA's CPU back end."""
