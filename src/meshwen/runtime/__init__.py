# SPDX-License-Identifier: Apache-2.0
"""How JAX is used: its settings, compiled programs and where they are kept, shape buckets."""
