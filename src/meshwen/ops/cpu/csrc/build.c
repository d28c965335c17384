// SPDX-License-Identifier: Apache-2.0
//
// What the library was compiled by and from, as scripts/build_kernels.py says.

#include "exported.h"

#ifndef MESHWEN_COMPILER
#define MESHWEN_COMPILER "an unknown compiler"
#define MESHWEN_SOURCES "unknown"
#endif

EXPORTED const char *meshwen_compiler(void) { return MESHWEN_COMPILER; }

// A digest of the sources and of the script with their flags.
EXPORTED const char *meshwen_sources(void) { return MESHWEN_SOURCES; }
