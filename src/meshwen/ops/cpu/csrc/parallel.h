// SPDX-License-Identifier: Apache-2.0
//
// A task shared among the threads of XLA's pool.

#ifndef MESHWEN_PARALLEL_H
#define MESHWEN_PARALLEL_H

#include "ffi.h"
#include "kernels.h"

// Threads that may help, the one that calls among them: those of the pool, but at most so many.
error *count_threads(const call *call, int64_t most, int64_t *threads);

// How many of a task's parts are a unit: neighbours, an even number, as two panels may be read at once;
// but so few that a thread that comes late holds up nothing.
int64_t unit_parts(int64_t parts, int64_t threads);

// Does all units of a task. Whoever is first takes the next unit, so that nothing waits for a thread
// that is busy elsewhere; when this returns, no thread will look at the task again.
error *parallel(const call *call, unit_function *function, const void *task, int64_t units,
                int64_t threads);

#endif
