// SPDX-License-Identifier: Apache-2.0
//
// The instruction sets that kernels are compiled for, and which of them this processor has.

#ifndef MESHWEN_INSTRUCTION_SETS_H
#define MESHWEN_INSTRUCTION_SETS_H

#include "kernels.h"

struct instruction_set {
    const char *name;
    int (*asked)(void); // whether the processor has it
    const struct float_kernels *floats;
    const struct int8_kernels *int8;
};

// The fastest first; the last, in portable C, is there on every processor.
extern const struct instruction_set instruction_sets[];
extern const int instruction_set_count;

// Whether this processor has the one of a number.
int supported(int number);

// The one of a name, or 0 where there is none that this processor has.
const struct instruction_set *instruction_set(const char *name);

#endif
