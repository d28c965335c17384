// SPDX-License-Identifier: Apache-2.0

#ifndef TESTS_H
#define TESTS_H

#include "cases.h"

#define SECONDS 300 // until a process that hangs is ended

void test_products(void);
void test_paged(void);
void test_writes(void);
void test_wrong_sizes(void);
void test_wrong_buffers(void);
void test_wrong_attributes(void);
void test_wrong_places(void);
void test_version(void);
void test_no_memory(void);
void test_pools(void);
void test_callers(void);
void test_fork(void);
void test_rounding(void);

#endif
