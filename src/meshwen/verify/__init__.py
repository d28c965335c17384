# SPDX-License-Identifier: Apache-2.0
"""Does a mesh give what one device gives, and if not, in which layer does it part?"""
