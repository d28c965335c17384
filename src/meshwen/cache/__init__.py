# SPDX-License-Identifier: Apache-2.0
"""The key/value cache, and the memory for it."""
