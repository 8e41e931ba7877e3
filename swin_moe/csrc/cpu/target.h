// Whether the kernels for x86-64 instruction sets are compiled: GCC lets a file ask for one with a
// pragma, so the library needs no flags per file. Other compilers get the portable kernels.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SWIN_MOE_X86 1
// GCC's own intrinsics read a register that they leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#else
#define SWIN_MOE_X86 0
#endif
