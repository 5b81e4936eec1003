// Binding of sparse_db.cuh; the op is fastlora/ops/sparse_db.py.
#include "cuda/sparse_db.cuh"

#include "cuda/binding.h"

namespace fastlora {

// Of dys [t, n_m], h_t [t, Σ r or with ranks rounded up to 16] of one dtype. sums_4k is added to in place.
Tensor sparse_db(std::vector<Tensor> dys, Tensor h, Tensor index, std::vector<int64_t> ranks, std::vector<double> scales,
                 std::optional<Tensor> sums) {
  const char* op = "sparse_db";
  const int64_t tokens = h.size(0), k = index.numel();
  const ScalarType type = h.scalar_type();
  const bool index_is_64 = index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(dys.size() <= kMaxModules, op, ": a group of ", dys.size(), " modules, the CUDA kernel takes ", kMaxModules);
  STD_TORCH_CHECK(k < int64_t{1} << 31, op, ": ", k, " entries, the CUDA kernel takes 2^31 − 1");
  check(op, "h", h, type);
  check(op, "index_k", index, index_is_64 ? ScalarType::Long : ScalarType::Int);

  SparseDb p{};
  p.tokens = tokens, p.h = h.const_data_ptr(), p.h_stride = h.size(1);
  p.index = index.const_data_ptr(), p.index_is_64 = index_is_64, p.k = k;
  int64_t total_rank = 0;
  for (const int64_t rank : ranks) total_rank += rank;
  for (size_t m = 0; m < dys.size(); ++m) {
    check(op, "dy", dys[m], type, tokens * dys[m].size(1));
    add_module(p, dys[m].const_data_ptr(), dys[m].size(1), ranks[m], scales[m], h.size(1) != total_rank, 16 / h.element_size());
  }
  plan(p);

  const OnDevice device(h);
  Tensor db = torch::stable::new_empty(h, {k}, ScalarType::Float);
  Tensor partial = torch::stable::new_empty(h, {p.splits > 1 ? p.splits * k : 0}, ScalarType::Float);
  Tensor arrivals = torch::stable::new_zeros(h, {p.splits > 1 ? p.tiles : 0}, ScalarType::Int);
  p.db = db.mutable_data_ptr<float>(), p.partial = partial.mutable_data_ptr<float>(), p.arrivals = arrivals.mutable_data_ptr<int>();
  if (sums) {
    check(op, "sums_4k", *sums, ScalarType::Float, 4 * k);
    p.sums = sums->mutable_data_ptr<float>();
  }
  with_element(op, type, [&](auto element) { launch_sparse_db<decltype(element)>(p, device.stream()); });
  check_launch(op);
  return db;
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cuda, m) {
  m.def("sparse_db(Tensor[] dys, Tensor h, Tensor index_k, int[] ranks, float[] scales, Tensor(a!)? sums_4k) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cuda, CUDA, m) { m.impl("sparse_db", TORCH_BOX(&fastlora::sparse_db)); }
