# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens out: scheduling, sampling, delivery."""
