// Bindings of adamw_step.cuh; the ops are in fastlora/ops/adamw_step.py. Positions of the index are not checked: it lies on the GPU.
#include "cuda/adamw_step.cuh"

#include "cuda/binding.h"

namespace fastlora {

// ranges: int64 [matrices, 2] on the GPU; most_entries: of a matrix.
Tensor gradient_norms(Tensor grad, Tensor index, Tensor ranges, int64_t most_entries) {
  const char* op = "gradient_norms";
  check(op, "grad", grad, ScalarType::Float);
  check(op, "index_k", index, ScalarType::Int);
  check(op, "ranges_m2", ranges, ScalarType::Long, 2 * ranges.size(0));
  const int64_t matrices = ranges.size(0), slices = slices_of(most_entries);
  const OnDevice device(grad);
  Tensor norms = torch::stable::new_empty(grad, {matrices}), arrivals = torch::stable::new_zeros(grad, {matrices}, ScalarType::Int);
  Tensor partial = torch::stable::new_empty(grad, {matrices * slices}, ScalarType::Double);
  GradientNorms p{};
  p.grad = grad.const_data_ptr<float>(), p.index = index.const_data_ptr<int32_t>(), p.ranges = ranges.const_data_ptr<int64_t>();
  p.matrices = matrices, p.slices = slices, p.partial = partial.mutable_data_ptr<double>();
  p.arrivals = arrivals.mutable_data_ptr<int>(), p.norms = norms.mutable_data_ptr<float>();
  launch_gradient_norms(p, device.stream());
  check_launch(op);
  return norms;
}

void adamw_step(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor clip_coef, Tensor index, int64_t step, double lr,
                double beta1, double beta2, double eps, double weight_decay) {
  const char* op = "adamw_step";
  const int64_t k = index.numel();
  check(op, "param", param, ScalarType::Float);
  check(op, "grad", grad, ScalarType::Float, param.numel());
  check(op, "index_k", index, ScalarType::Int);
  check(op, "exp_avg", exp_avg, ScalarType::Float, k);
  check(op, "exp_avg_sq", exp_avg_sq, ScalarType::Float, k);
  check(op, "clip_coef", clip_coef, ScalarType::Float, 1);
  const OnDevice device(param);
  AdamwStep p{};
  p.param = param.mutable_data_ptr<float>(), p.grad = grad.const_data_ptr<float>(), p.exp_avg = exp_avg.mutable_data_ptr<float>();
  p.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>(), p.index = index.const_data_ptr<int32_t>();
  p.clip = clip_coef.const_data_ptr<float>(), p.k = k, p.scalars = adamw_scalars(step, lr, beta1, beta2, eps, weight_decay);
  launch_adamw_step(p, device.stream());
  check_launch(op);
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cuda, m) {
  m.def("gradient_norms(Tensor grad, Tensor index_k, Tensor ranges_m2, int most_entries) -> Tensor");
  m.def(
      "adamw_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor clip_coef, Tensor index_k, int step, "
      "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cuda, CUDA, m) {
  m.impl("gradient_norms", TORCH_BOX(&fastlora::gradient_norms));
  m.impl("adamw_step", TORCH_BOX(&fastlora::adamw_step));
}
