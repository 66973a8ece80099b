// What tests may ask of the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Threads run in an order drawn from this seed; 0 is the order of their numbers.
void use_schedule(unsigned seed);

// Shared memory of a block that the emulated device allows.
void use_shared_memory_limit(size_t bytes);

struct Counts {
  int64_t launches, memsets, accesses;  // accesses: of memory that were looked at for races
};
Counts counts();

}  // namespace emulator
