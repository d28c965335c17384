# SPDX-License-Identifier: Apache-2.0
"""The words that choose a program. Importing this imports no JAX: the command line shows them."""

from typing import Literal, get_args

ProgramName = Literal["logits", "prefill", "decode"]
Profile = Literal["native", "portable"]
Output = Literal["logits", "tokens"]
Platform = Literal["cpu", "tpu", "cuda", "rocm"]

PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)
PROFILES: tuple[Profile, ...] = get_args(Profile)
OUTPUTS: tuple[Output, ...] = get_args(Output)
PLATFORMS: tuple[Platform, ...] = get_args(Platform)
