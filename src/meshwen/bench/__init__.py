# SPDX-License-Identifier: Apache-2.0
"""How fast a model runs on a mesh, beside what the machine could do."""
