# SPDX-License-Identifier: Apache-2.0
"""A client of servers with OpenAI's interface, meshwen's or others'.

It knows nothing of models: what it is asked and what it gives is JSON.
"""
