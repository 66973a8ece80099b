// Kernels of planted.cu by name, for the tests of the emulator.
#pragma once

#include <string>

namespace planted {

// Runs a small kernel by name and returns the number that it computes.
int run(const std::string& name);

}  // namespace planted
