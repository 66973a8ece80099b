// Where the CUDA implementations of the ops run: the device and the current stream of their tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

// The tests compile these files once more, with an emulator of CUDA, as ops of another name for tensors of the CPU.
#if defined(DETR_EMULATED)
#define DETR_LIBRARY detr_fast_emulated
#define DETR_CUDA_KEY CPU
#else
#define DETR_LIBRARY detr_fast
#define DETR_CUDA_KEY CUDA
// Absent from CPU builds of PyTorch, where no CUDA tensor can reach the code that calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace detr::ops {

// Makes a tensor's device current while it lives.
class OnDevice {
 public:
#if defined(DETR_EMULATED)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(DETR_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                         const char* first_name) {
  const auto place = [](const Tensor& x) {
    return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : std::string(x.is_cpu() ? "cpu" : "another");
  };
  check(place(tensor) == place(first), op, ": ", name, " must be on ", place(first), " as ", first_name, ", got ",
        place(tensor));
}

inline void check_devices(const char* op, const CostInputs& in) {
  check_device(op, "boxes", in.boxes, in.logits, "logits");
  check_device(op, "labels", in.labels, in.logits, "logits");
  check_device(op, "target_boxes", in.target_boxes, in.logits, "logits");
  check_device(op, "offsets", in.offsets, in.logits, "logits");
}

// Uninitialised bytes on a tensor's device, aligned for any type.
inline Tensor new_bytes(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace detr::ops
