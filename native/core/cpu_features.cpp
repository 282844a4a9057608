#include "core/cpu_features.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(NYBBLE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace nybble {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"};

#if defined(NYBBLE_X86)
struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int values[4];
    __cpuidex(values, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1]), static_cast<uint32_t>(values[2]),
         static_cast<uint32_t>(values[3])};
#else
    __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
#endif
    return r;
}

uint64_t xgetbv() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low = 0;
    uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

// Linux hands out the 8 KiB of tile registers only to processes that ask (since 5.16).
bool request_amx() {
#if defined(__linux__)
    constexpr long kArchReqXcompPerm = 0x1023;
    constexpr long kXfeatureTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
    return true;  // Windows enables tiles for every process when XCR0 says so
#endif
}

bool bit(uint32_t value, int index) { return ((value >> index) & 1U) != 0; }
#endif

CpuFeatures detect() {
    CpuFeatures features;
    auto set = [&](Isa isa, bool has, const char* why) {
        features.available[static_cast<int>(isa)] = has;
        if (!has) {
            features.why_not[static_cast<int>(isa)] = why;
        }
    };
    set(Isa::portable, true, "");
#if defined(NYBBLE_X86)
    const uint32_t max_leaf = cpuid(0, 0).a;
    const Registers one = cpuid(1, 0);
    const Registers seven = max_leaf >= 7 ? cpuid(7, 0) : Registers{};
    const Registers seven_one = max_leaf >= 7 && seven.a >= 1 ? cpuid(7, 1) : Registers{};
    const bool osxsave = bit(one.c, 27);
    const uint64_t xcr0 = osxsave ? xgetbv() : 0;
    const bool os_avx = (xcr0 & 0x6) == 0x6;
    const bool os_avx512 = (xcr0 & 0xe6) == 0xe6;
    const bool os_amx = (xcr0 & 0x60000) == 0x60000;

    const bool avx2 =
        bit(seven.b, 5) && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 3) && bit(seven.b, 8);
    const bool has_avx2 = avx2 && os_avx;
    set(Isa::avx2, has_avx2,
        avx2 ? "the operating system does not save AVX registers" : "the CPU lacks AVX2, FMA or F16C");
    set(Isa::avx_vnni, has_avx2 && bit(seven_one.a, 4), "the CPU lacks AVX-VNNI");
    const bool avx512 = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);
    const bool has_avx512 = has_avx2 && avx512 && os_avx512;
    set(Isa::avx512, has_avx512,
        avx512 ? "the operating system does not save AVX-512 registers"
               : "the CPU lacks AVX-512 F, BW, DQ or VL");
    const bool has_vnni = has_avx512 && bit(seven.c, 11);
    set(Isa::avx512_vnni, has_vnni, "the CPU lacks AVX-512 VNNI");
    const bool amx = bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25);
    const bool bf16 = bit(seven_one.a, 5) && bit(seven.c, 1);
    if (!amx) {
        set(Isa::amx, false, "the CPU lacks AMX tiles, int8 or bf16");
    } else if (!(has_vnni && bf16)) {
        set(Isa::amx, false, "the CPU lacks AVX-512 VNNI, BF16 or VBMI beside AMX");
    } else if (!os_amx) {
        set(Isa::amx, false, "the operating system does not save AMX tiles");
    } else {
        set(Isa::amx, request_amx(), "the operating system refused the permission to use AMX tiles");
    }
#else
    for (int i = 1; i < static_cast<int>(Isa::count); ++i) {
        set(static_cast<Isa>(i), false, "not an x86-64 CPU");
    }
#endif
    return features;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(std::string_view name) {
    for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
        if (name == kNames[i]) {
            return static_cast<Isa>(i);
        }
    }
    return Isa::count;
}

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

std::vector<Isa> available_isas() {
    std::vector<Isa> result;
    for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
        if (cpu_features().available[i]) {
            result.push_back(static_cast<Isa>(i));
        }
    }
    return result;
}

Isa selected_isa() {
    const char* wanted = std::getenv("NYBBLE_ISA");
    if (wanted == nullptr || *wanted == '\0') {
        return available_isas().back();
    }
    const Isa isa = isa_from_name(wanted);
    if (isa == Isa::count) {
        throw std::runtime_error(
            std::string("NYBBLE_ISA=") + wanted +
            " is unknown; levels are portable, avx2, avx_vnni, avx512, avx512_vnni, amx");
    }
    if (!cpu_features().available[static_cast<int>(isa)]) {
        throw std::runtime_error(std::string("NYBBLE_ISA=") + wanted +
                                 " cannot be used here: " + cpu_features().why_not[static_cast<int>(isa)]);
    }
    return isa;
}

}  // namespace nybble
