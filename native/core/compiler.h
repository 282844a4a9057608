// What differs between compilers, in one place: GCC, Clang and MSVC.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define NYBBLE_RESTRICT __restrict
#define NYBBLE_ALWAYS_INLINE __forceinline
#define NYBBLE_NOINLINE __declspec(noinline)
#define NYBBLE_PREFETCH(address) ((void)(address))
#define NYBBLE_LAMBDA_INLINE
#else
#define NYBBLE_RESTRICT __restrict__
#define NYBBLE_ALWAYS_INLINE inline __attribute__((always_inline))
#define NYBBLE_NOINLINE __attribute__((noinline))
#define NYBBLE_PREFETCH(address) __builtin_prefetch(address)
#define NYBBLE_LAMBDA_INLINE __attribute__((always_inline))
#endif
