// The Python module of the emulator. Importing it also registers the project's CUDA ops, run by the emulator, as
// torch.ops.detr_fast_emulated.* for tensors of the CPU.
#include <pybind11/pybind11.h>

#include "emulator.h"
#include "planted.h"

PYBIND11_MODULE(_emulated, m) {
  m.def("use_schedule", &emulator::use_schedule, pybind11::arg("seed"), "Order of threads and blocks; 0: by number.");
  m.def("use_shared_memory_limit", &emulator::use_shared_memory_limit, pybind11::arg("bytes"));
  m.def("counts", [] {
    const auto counts = emulator::counts();
    return pybind11::make_tuple(counts.launches, counts.memsets, counts.accesses);
  });
  m.def("planted", &planted::run, pybind11::arg("name"), "Runs a kernel with a fault in it.");
}
