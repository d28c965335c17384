# SPDX-License-Identifier: Apache-2.0
"""Evaluations: prompts and grading as their sources define them, and paired comparisons."""
