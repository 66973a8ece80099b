// Fibres, barriers, collectives and the runtime library of include/cuda_runtime.h.
#include "emulator.h"

#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace detr::cuda {
constexpr size_t kMostShared = 227 * 1024;
thread_local __attribute__((aligned(16))) unsigned char dynamic_shared[kMostShared + 1024];
}  // namespace detr::cuda

#if defined(__x86_64__)
// Saves what a called function must keep on the stack of the running fibre, and continues another one.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

dim3 blockDim, gridDim;

namespace emulator {

Indices indices;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMostThreads = 1024;

// One thread of a block, or the scheduler.
struct Fibre {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  uint3 index{};
  int number = -1;
  bool is_done = false;
  uint64_t result = 0;
  void* fake_stack = nullptr;
};

// Lanes of a warp on their way to a collective.
struct Gathering {
  unsigned mask, arrived;
  const char* name;
  Place place;
  uint64_t values[32];
};

struct WarpState {
  unsigned live = 0;
  uint32_t epoch = 0;
  std::vector<Gathering> gatherings;
};

struct BlockState {
  int live = 0, waiting = 0;
  uint32_t epoch = 0;
  Place place;
  std::vector<int> waiters;
};

struct Emulator {
  std::vector<Fibre> fibres;
  Fibre scheduler;
  Fibre* current = nullptr;
  unsigned char* stacks = nullptr;
  std::vector<int> ready;
  std::vector<WarpState> warps;
  BlockState block;
  int64_t block_number = 0;
  size_t shared_bytes = 0, shared_limit = detr::cuda::kMostShared;
  const std::function<void()>* kernel = nullptr;
  std::string fault;
  unsigned seed = 0;
  std::mt19937 random;
  Races races;
  Counts counts{};
};

Emulator& state() {
  static Emulator emulator;
  return emulator;
}

unsigned char* stack_of(int number) { return state().stacks + number * kStackBytes; }

void switch_fibre(Fibre& from, Fibre& to) {
#if defined(__SANITIZE_ADDRESS__)
  const bool to_scheduler = to.number < 0;
  static const void* main_bottom = nullptr;
  static size_t main_size = 0;
  __sanitizer_start_switch_fiber(from.is_done ? nullptr : &from.fake_stack,
                                 to_scheduler ? main_bottom : stack_of(to.number),
                                 to_scheduler ? main_size : kStackBytes);
#endif
#if defined(__x86_64__)
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(from.fake_stack, &bottom, &size);
  if (from.number >= 0 && !main_bottom) main_bottom = bottom, main_size = size;
#endif
}

void leave() { switch_fibre(*state().current, state().scheduler); }

// A fault stops the launch: the scheduler throws, the other fibres are abandoned where they are.
[[noreturn]] void fail(const std::string& text) {
  if (state().fault.empty()) state().fault = text;
  state().current->is_done = true;
  leave();
  __builtin_unreachable();
}

std::string at(Place place) {
  const std::string path = place.file_name();
  return path.substr(path.find_last_of('/') + 1) + ":" + std::to_string(place.line());
}

void release_block() {
  Emulator& e = state();
  BlockState& b = e.block;
  e.ready.insert(e.ready.end(), b.waiters.begin(), b.waiters.end());
  b.waiters.clear();
  b.waiting = 0;
  ++b.epoch;
}

void first_instruction() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Emulator& e = state();
  (*e.kernel)();
  Fibre& own = *e.current;
  WarpState& warp = e.warps[own.number / 32];
  warp.live &= ~(1u << own.number % 32);
  for (const Gathering& g : warp.gatherings)
    if (g.mask >> own.number % 32 & 1)
      fail(std::string(g.name) + " at " + at(g.place) + ": the mask has lanes that have exited");
  own.is_done = true;
  --e.block.live;
  if (e.block.waiting > 0 && e.block.waiting == e.block.live) release_block();
  leave();
}

void prepare(Fibre& fibre, int number, dim3 block) {
  fibre.number = number;
  fibre.is_done = false;
  fibre.index = {number % block.x, number / block.x % block.y, number / (block.x * block.y)};
#if defined(__x86_64__)
  // As if it had been switched away from at the start of first_instruction.
  void** top = reinterpret_cast<void**>(stack_of(number) + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(first_instruction);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  fibre.stack_pointer = top;
#else
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = stack_of(number);
  fibre.context.uc_stack.ss_size = kStackBytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, first_instruction, 0);
#endif
}

// Every variable of thread storage in this library is some kernel's shared memory.
struct SharedMemory {
  unsigned char* begin = nullptr;
  size_t size = 0;
};

SharedMemory find_shared_memory() {
  SharedMemory found;
  detr::cuda::dynamic_shared[0] = 0;  // makes sure that the storage exists
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        const auto own = reinterpret_cast<uintptr_t>(&find_shared_memory);
        bool is_own = false;
        size_t size = 0;
        for (int k = 0; k < info->dlpi_phnum; ++k) {
          const auto& header = info->dlpi_phdr[k];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD && own >= begin && own < begin + header.p_memsz) is_own = true;
          if (header.p_type == PT_TLS) size = header.p_memsz;
        }
        if (is_own) *static_cast<SharedMemory*>(data) = {static_cast<unsigned char*>(info->dlpi_tls_data), size};
        return int(is_own);
      },
      &found);
  if (!found.begin) throw std::runtime_error("emulator: shared memory was not found");
  return found;
}

const SharedMemory& shared_memory() {
  static const SharedMemory memory = find_shared_memory();
  return memory;
}

// All bits 1: NaN, and an index far outside.
void fill_shared_memory() {
  const SharedMemory& memory = shared_memory();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(memory.begin, memory.size);
#endif
  std::memset(memory.begin, 0xff, memory.size);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(detr::cuda::dynamic_shared + state().shared_bytes,
                            sizeof detr::cuda::dynamic_shared - state().shared_bytes);
#endif
}

std::string describe_deadlock() {
  const Emulator& e = state();
  std::string text = "divergent barrier: ";
  if (e.block.waiting > 0)
    text += std::to_string(e.block.waiting) + " of " + std::to_string(e.block.live) + " threads of block " +
            std::to_string(e.block_number) + " wait in __syncthreads at " + at(e.block.place) + "; ";
  for (size_t w = 0; w < e.warps.size(); ++w)
    for (const Gathering& g : e.warps[w].gatherings)
      text += std::to_string(__builtin_popcount(g.arrived)) + " of " + std::to_string(__builtin_popcount(g.mask)) +
              " lanes of warp " + std::to_string(w) + " wait in " + g.name + " at " + at(g.place) + "; ";
  return text.substr(0, text.size() - 2);
}

void run_block(dim3 block, int threads) {
  Emulator& e = state();
  e.warps.assign((threads + 31) / 32, WarpState());
  e.block = BlockState();
  e.block.live = threads;
  e.ready.clear();
  for (int number = threads - 1; number >= 0; --number) {
    prepare(e.fibres[number], number, block);
    e.warps[number / 32].live |= 1u << number % 32;
    e.ready.push_back(number);
  }
  fill_shared_memory();
  int done = 0;
  while (done < threads) {
    if (e.ready.empty()) throw std::runtime_error(describe_deadlock());
    if (e.seed) std::swap(e.ready[e.random() % e.ready.size()], e.ready.back());
    e.current = &e.fibres[e.ready.back()];
    e.ready.pop_back();
    indices.thread = e.current->index;
    switch_fibre(e.scheduler, *e.current);
    if (!e.fault.empty()) throw std::runtime_error(e.fault);
    if (!e.races.description().empty()) throw std::runtime_error(e.races.description());
    done += e.current->is_done;
  }
}

void release_gathering(WarpState& warp, size_t which, int first_thread, bool orders, Combine combine,
                       const int* arguments) {
  Emulator& e = state();
  const Gathering done = warp.gatherings[which];
  warp.gatherings.erase(warp.gatherings.begin() + which);
  if (orders && done.mask == warp.live) ++warp.epoch;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(done.mask >> lane & 1)) continue;
    Fibre& fibre = e.fibres[first_thread + lane];
    if (combine) fibre.result = combine(done.values, done.mask, lane, arguments[lane]);
    if (&fibre != e.current) e.ready.push_back(fibre.number);
  }
}

uint64_t gather(unsigned mask, uint64_t value, const char* name, Place place, bool orders, Combine combine,
                int argument) {
  Emulator& e = state();
  Fibre& own = *e.current;
  WarpState& warp = e.warps[own.number / 32];
  const int lane = own.number % 32;
  // A block that is no multiple of 32 has lanes that never lived; they are no part of the full mask.
  const int first_thread = own.number - lane, threads = int(blockDim.x * blockDim.y * blockDim.z);
  if (threads - first_thread < 32) mask &= (1u << (threads - first_thread)) - 1;
  if (!(mask >> lane & 1)) fail(std::string(name) + " at " + at(place) + ": the calling lane is not in the mask");
  if (mask & ~warp.live) fail(std::string(name) + " at " + at(place) + ": the mask has lanes that have exited");
  size_t which = 0;
  while (which < warp.gatherings.size() && warp.gatherings[which].mask != mask) ++which;
  if (which == warp.gatherings.size()) warp.gatherings.push_back({mask, 0, name, place, {}});
  Gathering& gathering = warp.gatherings[which];
  if (std::strcmp(gathering.name, name) != 0 || gathering.place.line() != place.line() ||
      std::strcmp(gathering.place.file_name(), place.file_name()) != 0)
    fail(std::string("divergent barrier: lanes of one warp call ") + gathering.name + " at " + at(gathering.place) +
         " and " + name + " at " + at(place));
  static int arguments[kMostThreads];
  arguments[own.number] = argument;
  gathering.values[lane] = value;
  gathering.arrived |= 1u << lane;
  if (gathering.arrived == mask) {
    release_gathering(warp, which, first_thread, orders, combine, arguments + first_thread);
    return own.result;
  }
  leave();
  return own.result;
}

void access(const void* address, size_t size, bool is_write, bool is_atomic) {
  Emulator& e = state();
  if (!e.current || e.current->is_done) return;
  const auto* byte = static_cast<const unsigned char*>(address);
  if (byte >= e.stacks && byte < e.stacks + kMostThreads * kStackBytes) return;
  if (address >= &indices && address < &indices + 1) return;
  const unsigned char* shared = detr::cuda::dynamic_shared;
  if (byte >= shared && byte < shared + sizeof detr::cuda::dynamic_shared && byte + size > shared + e.shared_bytes)
    fail("shared memory past the " + std::to_string(e.shared_bytes) + " bytes of the launch");
  const SharedMemory& memory = shared_memory();
  const bool is_shared = byte >= memory.begin && byte < memory.begin + memory.size;
  const int number = e.current->number;
  const Access now = {
      e.block_number, number,   e.block.epoch, e.warps[number / 32].epoch, e.races.fences(e.block_number, number),
      is_atomic,      is_shared};
  if (is_atomic) e.races.synchronize(e.block_number);
  e.races.add(reinterpret_cast<uintptr_t>(address), size, is_write, now);
}

template <typename T, typename F>
T atomically(T* address, F update) {
  access(address, sizeof(T), true, true);
  const T before = *address;
  *address = update(before);
  return before;
}

}  // namespace

void use_schedule(unsigned seed) {
  state().seed = seed;
  state().random.seed(seed);
}

void use_shared_memory_limit(size_t bytes) { state().shared_limit = std::min(bytes, detr::cuda::kMostShared); }

Counts counts() { return state().counts; }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  Emulator& e = state();
  if (!e.stacks) {
    void* memory = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    e.stacks = static_cast<unsigned char*>(memory);
    e.fibres.resize(kMostThreads);
  }
  const int threads = int(block.x * block.y * block.z);
  ++e.counts.launches;
  e.kernel = &kernel;
  e.shared_bytes = shared_bytes;
  e.fault.clear();
  e.races.clear();
  blockDim = block;
  gridDim = grid;
  // Blocks run in any order on a device.
  std::vector<int64_t> order(int64_t(grid.x) * grid.y * grid.z);
  for (size_t n = 0; n < order.size(); ++n) order[n] = int64_t(n);
  if (e.seed) std::shuffle(order.begin(), order.end(), e.random);
  for (const int64_t number : order) {
    indices.block = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    e.block_number = number;
    run_block(block, threads);
  }
  e.counts.accesses += e.races.accesses;
  e.current = nullptr;
}

uint64_t exchange(unsigned mask, uint64_t value, const char* name, Place place, Combine combine, int argument) {
  return gather(mask, value, name, place, false, combine, argument);
}

void sync_warp(unsigned mask, Place place) { gather(mask, 0, "__syncwarp", place, true, nullptr, 0); }

void sync_block(Place place) {
  Emulator& e = state();
  BlockState& b = e.block;
  if (b.waiting > 0 && (b.place.line() != place.line() || std::strcmp(b.place.file_name(), place.file_name()) != 0))
    fail("divergent barrier: threads of one block call __syncthreads at " + at(b.place) + " and at " + at(place));
  b.place = place;
  if (++b.waiting == b.live) return release_block();
  b.waiters.push_back(e.current->number);
  leave();
}

void fence() { state().races.fence(state().block_number, state().current->number); }

}  // namespace emulator

int atomicMin(int* address, int x) {
  return emulator::atomically(address, [=](int y) { return std::min(x, y); });
}
int atomicMax(int* address, int x) {
  return emulator::atomically(address, [=](int y) { return std::max(x, y); });
}
long long atomicMax(long long* address, long long x) {
  return emulator::atomically(address, [=](long long y) { return std::max(x, y); });
}
unsigned atomicAdd(unsigned* address, unsigned x) {
  return emulator::atomically(address, [=](unsigned y) { return y + x; });
}
unsigned long long atomicAdd(unsigned long long* address, unsigned long long x) {
  return emulator::atomically(address, [=](unsigned long long y) { return y + x; });
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? int(emulator::state().shared_limit) : 132;
  return cudaSuccess;
}

namespace {

// Declared by the kernels: not known here, so at most. Counts in the 48 KiB that a launch has without asking.
constexpr size_t kDeclaredShared = 2048;

// Dynamic shared memory that each kernel was allowed to have, by the last call.
std::unordered_map<const void*, size_t>& allowed_bytes() {
  static std::unordered_map<const void*, size_t> bytes;
  return bytes;
}

}  // namespace

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value + kDeclaredShared > emulator::state().shared_limit) return cudaErrorInvalidValue;
  allowed_bytes()[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  ++emulator::state().counts.memsets;
  return cudaSuccess;
}

bool emulated_launch_is_valid(const cudaLaunchConfig_t& config, const void* kernel) {
  const auto found = allowed_bytes().find(kernel);
  const size_t most = found == allowed_bytes().end() ? 48 * 1024 - kDeclaredShared : found->second;
  const dim3 block = config.blockDim;
  return block.x * block.y * block.z <= 1024 && config.dynamicSmemBytes <= most && config.gridDim.x > 0;
}

// ---- what -fsanitize=thread compiles into the kernels ---------------------------------------------------------------

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define DETR_ACCESS(size)                                                      \
  void __tsan_read##size(void* p) { emulator::access(p, size, false, false); } \
  void __tsan_write##size(void* p) { emulator::access(p, size, true, false); }
DETR_ACCESS(1)
DETR_ACCESS(2)
DETR_ACCESS(4)
DETR_ACCESS(8)
DETR_ACCESS(16)
#undef DETR_ACCESS
#define DETR_ACCESS(size)                                                                \
  void __tsan_unaligned_read##size(void* p) { emulator::access(p, size, false, false); } \
  void __tsan_unaligned_write##size(void* p) { emulator::access(p, size, true, false); }
DETR_ACCESS(2)
DETR_ACCESS(4)
DETR_ACCESS(8)
DETR_ACCESS(16)
#undef DETR_ACCESS
void __tsan_read_range(void* p, size_t size) { emulator::access(p, size, false, false); }
void __tsan_write_range(void* p, size_t size) { emulator::access(p, size, true, false); }
}
