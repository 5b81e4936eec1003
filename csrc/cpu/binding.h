// What the bindings share: torch's stable ABI, checks that name op and argument, raw pointers for the kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/variant.h"

namespace fastlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* bytes(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
inline char* mutable_bytes(const Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

// float32 or bfloat16, or an error that names the op.
inline Dtype dtype_of(const char* op, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return kFloat;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, op, ": the C++ kernels take float32 and bfloat16 only");
  return kBFloat16;
}

// The same, of a tensor that must be contiguous.
inline Dtype check_rows(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), op, ": the C++ kernels take contiguous tensors");
  return dtype_of(op, x);
}

inline void check_same(const char* op, const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.scalar_type() == other.scalar_type() && other.is_contiguous(), op, ": operands differ in dtype or are not contiguous");
}

// The same, and of one shape.
inline void check_like(const char* op, const Tensor& x, const Tensor& other) {
  check_same(op, x, other);
  STD_TORCH_CHECK(x.numel() == other.numel(), op, ": operands of ", x.numel(), " and ", other.numel(), " elements");
}

// A float32 vector with an element for each row.
inline void check_per_row(const char* op, const char* name, const Tensor& vector, int64_t rows) {
  STD_TORCH_CHECK(vector.scalar_type() == ScalarType::Float && vector.is_contiguous() && vector.numel() == rows, op, ": ", name,
                  " must be float32, contiguous and have ", rows, " elements");
}

inline int64_t width(Dtype type) { return type == kFloat ? 4 : 2; }

// Rows of d elements per task: some 16k elements, a few microseconds, so that waking a thread pays.
inline int64_t grain(int64_t d) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, d)); }

}  // namespace fastlora
