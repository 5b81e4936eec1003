// y = x / sqrt(mean(x^2) + eps) * w over rows of width d; formulas and shapes in fastlora/ops/rms_norm.py. Memory-bound: forward reads x
// and writes y; backward reads dy and x and writes dx. Everything between is float, rounded once.
#include "cpu/variant.h"

namespace fastlora {
struct RmsNorm {
  void (*forward[2])(const void* x, const void* w, void* y, float* rstd, int64_t rows, int64_t d, float eps);
  void (*backward[2])(const void* dy, const void* x, const void* w, const float* rstd, void* dx, float* dw, int64_t rows, int64_t d);
};
}  // namespace fastlora

#ifdef VARIANT
#include "cpu/simd.h"

namespace fastlora::VARIANT {

template <class T> void forward(const void* x_, const void* w_, void* y_, float* rstd, int64_t rows, int64_t d, float eps) {
  const T* w = (const T*)w_;
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = (const T*)x_ + i * d;
    T* y = (T*)y_ + i * d;
    floatv squares{};
    for (int64_t j = 0; j < d; j += kLanes) {
      const floatv v = load_upto(x + j, d - j);
      squares += v * v;
    }
    const float r = rstd[i] = 1.0f / std::sqrt(sum(squares) / d + eps);
    for (int64_t j = 0; j < d; j += kLanes) store_upto(y + j, load_upto(x + j, d - j) * r * load_upto(w + j, d - j), d - j);
  }
}

// dx = r (g - x r^2 mean(g x)) with g = w dy; dw (where wanted) collects dy x r.
template <class T>
void backward(const void* dy_, const void* x_, const void* w_, const float* rstd, void* dx_, float* dw, int64_t rows, int64_t d) {
  const T* w = (const T*)w_;
  for (int64_t i = 0; i < rows; ++i) {
    const T *dy = (const T*)dy_ + i * d, *x = (const T*)x_ + i * d;
    T* dx = (T*)dx_ + i * d;
    const float r = rstd[i];
    floatv dot{};
    for (int64_t j = 0; j < d; j += kLanes) dot += load_upto(dy + j, d - j) * load_upto(w + j, d - j) * load_upto(x + j, d - j);
    const float along_x = sum(dot) / d * r * r;
    for (int64_t j = 0; j < d; j += kLanes) {
      const floatv g = load_upto(dy + j, d - j), v = load_upto(x + j, d - j);
      store_upto(dx + j, (g * load_upto(w + j, d - j) - v * along_x) * r, d - j);
      if (dw) store_upto(dw + j, load_upto(dw + j, d - j) + g * v * r, d - j);
    }
  }
}

DEFINE_KERNELS(RmsNorm) = {{forward<float>, forward<bf16>}, {backward<float>, backward<bf16>}};

}  // namespace fastlora::VARIANT

#else
#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(RmsNorm)

static void check_gain(const Tensor& x, const Tensor& weight) {
  check_same("rms_norm", x, weight);
  STD_TORCH_CHECK(weight.numel() == x.size(-1), "rms_norm: a gain of ", weight.numel(), " elements for rows of ", x.size(-1));
}

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double eps) {
  const int64_t d = x.size(-1), rows = d ? x.numel() / d : 0;
  const Dtype type = check_rows("rms_norm", x);
  check_gain(x, weight);
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const auto kernel = RmsNorm_kernels().forward[type];
  const char *xs = bytes(x), *w = bytes(weight);
  char* ys = mutable_bytes(y);
  float* r = rstd.mutable_data_ptr<float>();
  const int64_t row_bytes = d * width(type);
  torch::stable::parallel_for(0, rows, grain(d), [&](int64_t begin, int64_t end) {
    kernel(xs + begin * row_bytes, w, ys + begin * row_bytes, r + begin, end - begin, d, (float)eps);
  });
  return {y, rstd};
}

// dweight is empty unless wanted; its partial sums, one row for each of a fixed number of blocks, make it independent of the threads.
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_dweight) {
  const int64_t d = x.size(-1), rows = d ? x.numel() / d : 0;
  const Dtype type = check_rows("rms_norm", x);
  check_like("rms_norm", x, dy);
  check_gain(x, weight);
  check_per_row("rms_norm", "rstd", rstd, rows);
  Tensor dx = torch::stable::empty_like(x);
  const int64_t blocks = need_dweight ? 32 : (rows + grain(d) - 1) / grain(d);
  Tensor partial = torch::stable::new_zeros(x, {need_dweight ? blocks : 0, d}, ScalarType::Float);
  const auto kernel = RmsNorm_kernels().backward[type];
  const char *dys = bytes(dy), *xs = bytes(x), *w = bytes(weight);
  char* dxs = mutable_bytes(dx);
  const float* r = rstd.const_data_ptr<float>();
  float* dw = need_dweight ? partial.mutable_data_ptr<float>() : nullptr;
  const int64_t row_bytes = d * width(type), per_block = blocks ? (rows + blocks - 1) / blocks : 0;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * per_block, count = std::min(per_block, rows - first);
      if (count > 0)
        kernel(dys + first * row_bytes, xs + first * row_bytes, w, r + first, dxs + first * row_bytes, dw ? dw + block * d : nullptr, count, d);
    }
  });
  return {dx, partial};
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_dweight) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&fastlora::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&fastlora::rms_norm_backward));
}
#endif
