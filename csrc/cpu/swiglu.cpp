// y = silu(gate) * up, element by element; formulas in fastlora/ops/swiglu.py. Memory-bound.
#include "cpu/variant.h"

namespace fastlora {
struct Swiglu {
  void (*forward[2])(const void* gate, const void* up, void* y, int64_t n);
  void (*backward[2])(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t n);
};
}  // namespace fastlora

#ifdef VARIANT
#include "cpu/simd.h"

namespace fastlora::VARIANT {

INLINE floatv sigmoid(floatv x) { return 1.0f / (1.0f + exp(-x)); }

template <class T> void forward(const void* gate_, const void* up_, void* y_, int64_t n) {
  const T *gate = (const T*)gate_, *up = (const T*)up_;
  T* y = (T*)y_;
  for (int64_t i = 0; i < n; i += kLanes) {
    const floatv g = load_upto(gate + i, n - i);
    store_upto(y + i, g * sigmoid(g) * load_upto(up + i, n - i), n - i);
  }
}

// d silu(g) / dg = s + g s (1 - s) with s = sigmoid(g).
template <class T> void backward(const void* dy_, const void* gate_, const void* up_, void* dgate_, void* dup_, int64_t n) {
  const T *dy = (const T*)dy_, *gate = (const T*)gate_, *up = (const T*)up_;
  T *dgate = (T*)dgate_, *dup = (T*)dup_;
  for (int64_t i = 0; i < n; i += kLanes) {
    const floatv d = load_upto(dy + i, n - i), g = load_upto(gate + i, n - i), u = load_upto(up + i, n - i), s = sigmoid(g);
    store_upto(dgate + i, d * u * s * (1.0f + g * (1.0f - s)), n - i);
    store_upto(dup + i, d * g * s, n - i);
  }
}

DEFINE_KERNELS(Swiglu) = {{forward<float>, forward<bf16>}, {backward<float>, backward<bf16>}};

}  // namespace fastlora::VARIANT

#else
#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(Swiglu)

constexpr int64_t kGrain = 16384;

Tensor swiglu_forward(Tensor gate, Tensor up) {
  const Dtype type = check_rows("swiglu", gate);
  check_like("swiglu", gate, up);
  Tensor y = torch::stable::empty_like(gate);
  const auto kernel = Swiglu_kernels().forward[type];
  const char *g = bytes(gate), *u = bytes(up);
  char* out = mutable_bytes(y);
  const int64_t w = width(type);
  torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(g + begin * w, u + begin * w, out + begin * w, end - begin);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dy, Tensor gate, Tensor up) {
  const Dtype type = check_rows("swiglu", gate);
  check_like("swiglu", gate, up);
  check_like("swiglu", gate, dy);
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  const auto kernel = Swiglu_kernels().backward[type];
  const char *d = bytes(dy), *g = bytes(gate), *u = bytes(up);
  char *dg = mutable_bytes(dgate), *du = mutable_bytes(dup);
  const int64_t w = width(type);
  torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernel(d + begin * w, g + begin * w, u + begin * w, dg + begin * w, du + begin * w, end - begin);
  });
  return {dgate, dup};
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) {
  m.def("swiglu_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&fastlora::swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&fastlora::swiglu_backward));
}
#endif
