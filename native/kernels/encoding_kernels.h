// The tables of quantized-weight kernels, one per instruction set.
//
// Each function returns an array with one entry per Encoding. A level overrides what it does
// better and takes the rest from the level below, so every table is complete. Call a level's
// function only on a machine that has the level.
#pragma once

#include "core/cpu_features.h"
#include "kernels/kernels.h"

namespace nybble {

const EncodingKernels* encoding_kernels_portable();
#if NYBBLE_X86
const EncodingKernels* encoding_kernels_avx2();         // AVX2, FMA, F16C, BMI2
const EncodingKernels* encoding_kernels_avx_vnni();     // + AVX-VNNI
const EncodingKernels* encoding_kernels_avx512();       // AVX-512 F, BW, DQ, VL
const EncodingKernels* encoding_kernels_avx512_vnni();  // + AVX512_VNNI
const EncodingKernels* encoding_kernels_amx();          // + AVX512_BF16, AVX512_VBMI
#endif

// The table of a level; `isa` must be available here (cpu_features.h).
const EncodingKernels* encoding_kernels(Isa isa);

// A complete table: what EncodingKernels* of each level's static data looks like.
struct EncodingKernelTable {
    EncodingKernels entries[static_cast<int>(Encoding::count)];

    EncodingKernels& operator[](Encoding encoding) { return entries[static_cast<int>(encoding)]; }
};

}  // namespace nybble
