// SPDX-License-Identifier: Apache-2.0
//
// The kernels' entries, called as XLA does. Without arguments every test is run, else those named.

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tests.h"

static const struct {
    const char *name;
    void (*function)(void);
} TESTS[] = {
    {"fork", test_fork}, // while no thread of a test has ended: its stack is libc's to keep
    {"products", test_products},
    {"paged", test_paged},
    {"writes", test_writes},
    {"wrong_sizes", test_wrong_sizes},
    {"wrong_buffers", test_wrong_buffers},
    {"wrong_attributes", test_wrong_attributes},
    {"wrong_places", test_wrong_places},
    {"version", test_version},
    {"no_memory", test_no_memory},
    {"pools", test_pools},
    {"callers", test_callers},
    {"rounding", test_rounding},
};

static int threads_of_process(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/task");
    while (folder && readdir(folder)) count++;
    if (folder) closedir(folder);
    return count;
}

int main(int count, char **names) {
    int ran = 0;
    alarm(SECONDS);
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++) {
        int wanted = count == 1;
        for (int n = 1; n < count; n++) wanted |= !strcmp(names[n], TESTS[i].name);
        if (!wanted) continue;
        pool_start(3);
        const int threads = threads_of_process();
        TESTS[i].function();
        pool_wait();
        at("%s", TESTS[i].name);
        CHECK(threads_of_process() == threads, "threads outlive the calls");
        CHECK(!allocated, "%ld blocks of memory were not freed", (long)allocated);
        pool_stop();
        printf("%s: passed\n", TESTS[i].name);
        fflush(stdout);
        ran++;
    }
    return ran ? 0 : 2;
}
