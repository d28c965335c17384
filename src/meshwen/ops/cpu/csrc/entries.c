// SPDX-License-Identifier: Apache-2.0
//
// What XLA calls, and what Python asks. Entries check every buffer against the others, and return an
// error of XLA's where something does not fit.

#include <stddef.h>

#include "entries.h"
#include "exported.h"
#include "instruction_sets.h"
#include "panels.h"
#include "parallel.h"

// The name of an instruction set, by number; 0 behind the last.
EXPORTED const char *meshwen_instruction_set(int number) {
    return number >= 0 && number < instruction_set_count ? instruction_sets[number].name : 0;
}

// Whether this processor has it.
EXPORTED int meshwen_supported(int number) {
    return number >= 0 && number < instruction_set_count && supported(number);
}

// Whether it has an instruction for dot products of bfloat16.
EXPORTED int meshwen_has_bf16_dot(int number) {
    return number >= 0 && number < instruction_set_count &&
           instruction_sets[number].floats->matmul_dot;
}

error *asked(const call *call, const struct instruction_set **set, int64_t *threads) {
    char name[32];
    int64_t most;
    TRY(attribute_text(call, "instruction_set", name, sizeof name));
    TRY(attribute_int(call, "threads", &most));
    *set = instruction_set(name);
    if (!*set) return refused(call, "meshwen: this processor has no kernels for %s", name);
    return count_threads(call, most, threads);
}

// y [rows, columns] = a [rows, in] b, of b in panels [columns/32, steps, 32, numbers of a step].
//   float32 a and b; bfloat16 a and b, by an instruction for dot products of pairs; or float32 a
//   and bfloat16 b, widened to float32.
EXPORTED error *meshwen_matmul(call *call) {
    if (described(call)) return 0;
    const struct instruction_set *set;
    int64_t threads;
    TRY(counted(call, 2, 1));
    TRY(asked(call, &set, &threads));
    const buffer *a = argument(call, 0), *b = argument(call, 1), *y = result(call, 0);
    const int numbers = b->dtype == F32 ? 1 : 2;
    TRY(checked(call, b, (struct expected){"b", numbers == 1 ? F32 : BF16, 4, {ANY, ANY, COLUMNS, numbers}}));
    const int dot = a->dtype == BF16;
    if (dot && numbers == 1) return refused(call, "meshwen: a is bfloat16, but b is float32");
    const int64_t panels = b->dims[0], steps = b->dims[1];
    TRY(checked(call, a, (struct expected){"a", dot ? BF16 : F32, 2, {ANY, steps * numbers}}));
    TRY(checked(call, y, (struct expected){"the result", F32, 2, {a->dims[0], ANY}}));
    if (quotient_up(y->dims[1], COLUMNS) != panels)
        return refused(call, "meshwen: %lld columns are not in %lld panels", (long long)y->dims[1],
                       (long long)panels);
    unit_function *function = numbers == 1 ? set->floats->matmul_float32
                              : dot        ? set->floats->matmul_dot
                                           : set->floats->matmul_widened;
    if (!function) return refused(call, "meshwen: %s has no dot product of bfloat16", set->name);
    if (!a->dims[0] || !panels) return 0;
    if (!steps) return refused(call, "meshwen: sums of nothing");
    const struct matmul task = {
        .a = a->data,
        .b = b->data,
        .y = y->data,
        .rows = a->dims[0],
        .steps = steps,
        .columns = y->dims[1],
        .unit_panels = unit_parts(panels, threads),
    };
    return parallel(call, function, &task, quotient_up(panels, task.unit_panels), threads);
}

// y [rows, columns] = a [rows, in] b, of float32 a and of b in int8 panels [columns/32, in/4, 32, 4]
// with bfloat16 scales [columns/32, in/32, 32].
EXPORTED error *meshwen_matmul_int8(call *call) {
    if (described(call)) return 0;
    const struct instruction_set *set;
    int64_t threads;
    TRY(counted(call, 3, 1));
    TRY(asked(call, &set, &threads));
    const buffer *a = argument(call, 0), *b = argument(call, 1), *scales = argument(call, 2);
    const buffer *y = result(call, 0);
    TRY(checked(call, scales, (struct expected){"scales", BF16, 3, {ANY, ANY, COLUMNS}}));
    const int64_t panels = scales->dims[0], groups = scales->dims[1];
    TRY(checked(call, b, (struct expected){"b", S8, 4, {panels, groups * GROUP_STEPS, COLUMNS, STEP}}));
    TRY(checked(call, a, (struct expected){"a", F32, 2, {ANY, groups * GROUP}}));
    TRY(checked(call, y, (struct expected){"the result", F32, 2, {a->dims[0], ANY}}));
    if (quotient_up(y->dims[1], COLUMNS) != panels)
        return refused(call, "meshwen: %lld columns are not in %lld panels", (long long)y->dims[1],
                       (long long)panels);
    const int64_t rows = a->dims[0], all_groups = rows * groups;
    if (!rows || !panels) return 0;
    if (!groups) return refused(call, "meshwen: sums of nothing");
    int8_t *space = allocate(all_groups * (GROUP + sizeof(float) + sizeof(int32_t)));
    if (!space) return out_of_memory(call);
    // A few rows are quantised sooner than another thread is woken.
    const int64_t quantising = all_groups < 1024 ? 1 : threads;
    const struct int8_matmul task = {
        .a = a->data,
        .quantised = space,
        .a_scales = (float *)(space + all_groups * GROUP),
        .corrections = (int32_t *)(space + all_groups * (GROUP + sizeof(float))),
        .b = b->data,
        .b_scales = scales->data,
        .y = y->data,
        .rows = rows,
        .groups = groups,
        .columns = y->dims[1],
        .unit_rows = unit_parts(rows, quantising),
        .unit_panels = unit_parts(panels, threads),
    };
    error *error = parallel(call, set->int8->quantise, &task, quotient_up(rows, task.unit_rows), quantising);
    if (!error)
        error = parallel(call, set->int8->matmul, &task, quotient_up(panels, task.unit_panels), threads);
    release(space);
    return error;
}
