# SPDX-License-Identifier: Apache-2.0
"""A weight's declaration, and how it gets onto the devices."""
