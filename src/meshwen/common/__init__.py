# SPDX-License-Identifier: Apache-2.0
"""What knows nothing of models: arguments, files, paths, units, contained processes."""
