// What the bindings share: torch's stable ABI, the current stream, checks that name op and argument.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/device.cuh"

// libtorch_cuda has it. Weak, so that this library also loads under a torch without CUDA, where none of its ops can be called.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's GPU the current one; the stream is the one that torch would use there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

inline void check(const char* op, const char* name, const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.is_cuda(), op, ": ", name, " must be a contiguous CUDA tensor of ",
                  torch::headeronly::toString(type));
}

inline void check(const char* op, const char* name, const Tensor& x, ScalarType type, int64_t numel) {
  check(op, name, x, type);
  STD_TORCH_CHECK(x.numel() == numel, op, ": ", name, " has ", x.numel(), " elements, it needs ", numel);
}

// Calls `call` with an element of the dtype.
template <class Call> void with_element(const char* op, ScalarType type, const Call& call) {
  if (type == ScalarType::Float) call(float{});
  else if (type == ScalarType::BFloat16) call(bfloat16{});
  else if (type == ScalarType::Half) call(float16{});
  else STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, bfloat16 and float16, not ", torch::headeronly::toString(type));
}

}  // namespace fastlora
