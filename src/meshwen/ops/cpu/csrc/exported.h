// SPDX-License-Identifier: Apache-2.0
//
// A function that the library shows to others; all else is its own.

#ifndef MESHWEN_EXPORTED_H
#define MESHWEN_EXPORTED_H

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

#endif
