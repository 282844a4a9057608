// Which instruction sets this process may use: what CPUID reports *and* what the operating system
// lets us use (XGETBV; for AMX on Linux also a permission that is asked for once per process).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace nybble {

// Levels in ascending order; each names one folder of native/kernels.
enum class Isa : int { portable, avx2, avx_vnni, avx512, avx512_vnni, amx, count };

const char* isa_name(Isa isa);

// Level of that name, or Isa::count.
Isa isa_from_name(std::string_view name);

struct CpuFeatures {
    bool available[static_cast<int>(Isa::count)] = {};
    std::string why_not[static_cast<int>(Isa::count)];  // empty where available
};

// Detected once.
const CpuFeatures& cpu_features();

// Levels that this machine has, ascending.
std::vector<Isa> available_isas();

// The level in use: the highest available, or what the environment variable NYBBLE_ISA asks for.
// Throws std::runtime_error when it names an unknown or unavailable level.
Isa selected_isa();

}  // namespace nybble
