# SPDX-License-Identifier: Apache-2.0
"""An HTTP server in front of an engine: OpenAI's and Anthropic's interfaces."""
