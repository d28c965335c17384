// SPDX-License-Identifier: Apache-2.0
//
// What MinGW's start-up code and library would bring into a Windows DLL: without them it is linked in
// seconds, of Windows' own libraries alone.

#if defined(_WIN32)

#include <stdarg.h>
#include <stdio.h>
#include <windows.h>

BOOL WINAPI DllMainCRTStartup(HINSTANCE library, DWORD reason, void *reserved) {
    (void)library, (void)reason, (void)reserved;
    return TRUE;
}

int vsnprintf(char *text, size_t room, const char *format, va_list arguments) {
    const unsigned long long standard = _CRT_INTERNAL_PRINTF_STANDARD_SNPRINTF_BEHAVIOR;
    return __stdio_common_vsprintf(standard, text, room, format, NULL, arguments);
}

#endif
