// What machine this is and which instruction set is in use.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "core/cpu_features.h"
#include "core/thread_pool.h"

namespace nb = nanobind;
using namespace nybble;

void register_machine(nb::module_& module) {
    module.def(
        "isa_levels",
        [] {
            std::vector<std::string> names;
            for (const Isa isa : available_isas()) {
                names.emplace_back(isa_name(isa));
            }
            return names;
        },
        "Instruction-set levels that this machine has, ascending.");
    module.def(
        "isa", [] { return std::string(isa_name(selected_isa())); },
        "The level in use: the highest, or what NYBBLE_ISA asks for.");
    module.def(
        "isa_report",
        [] {
            nb::dict report;
            for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
                report[isa_name(static_cast<Isa>(i))] = cpu_features().why_not[i];
            }
            return report;
        },
        "Every level, and why it cannot be used here (an empty text: it can).");
    module.def(
        "default_threads", [] { return default_thread_count(); }, "Threads used when the user does not say.");
    module.def(
        "default_threads_reason", [] { return std::string(default_thread_count_reason()); },
        "How default_threads came to its answer.");
}
