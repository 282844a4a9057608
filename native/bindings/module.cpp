// The Python module nybble._core: one register function per topic; conversion and forwarding only.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void register_machine(nb::module_& module);
void register_plan(nb::module_& module);
void register_session(nb::module_& module);
void register_kernels(nb::module_& module);
void register_repack(nb::module_& module);
void register_quantize(nb::module_& module);
void register_quantize_methods(nb::module_& module);

NB_MODULE(_core, module) {
    module.doc() = "nybble's native core: plans, sessions and kernels on the CPU.";
    register_machine(module);
    register_plan(module);
    register_session(module);
    register_kernels(module);
    register_repack(module);
    register_quantize(module);
    register_quantize_methods(module);
}
