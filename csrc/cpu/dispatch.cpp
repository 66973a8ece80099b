// Chooses the kernels for this processor and keeps each thread's scratch memory.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "../kernels.h"

namespace detr::cpu {

extern const Kernels portable;
#if defined(DETR_X86)
extern const Kernels avx2;
extern const Kernels avx512;
#endif

namespace {

const Kernels* kernels_named(const char* name) {
  if (std::strcmp(name, "portable") == 0) return &portable;
#if defined(DETR_X86)
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (std::strcmp(name, "avx2") == 0 && has_avx2) return &avx2;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx512") == 0 && has_avx512) return &avx512;
#endif
  return nullptr;
}

const Kernels* best_kernels() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = kernels_named(name)) return found;
  return &portable;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

class Block {
 public:
  ~Block() { std::free(memory_); }

  void* of_size(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const size_t slack =
          bytes < (size_t(1) << 20) ? bytes / 2 : 0;  // small blocks grow rarely, large ones waste nothing
      const size_t rounded = (bytes + slack + 63) / 64 * 64;
      memory_ = std::aligned_alloc(64, rounded);
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_instruction_set(const char* name) {
  const Kernels* found = kernels_named(name);
  if (found) chosen().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

void* scratch(Scratch which, size_t bytes) {
  thread_local Block blocks[2];
  return blocks[static_cast<int>(which)].of_size(bytes);
}

}  // namespace detr::cpu
