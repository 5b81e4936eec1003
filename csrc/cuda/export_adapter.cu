// Binding of export_adapter.cuh; the op, its table and its outputs are made by fastlora/ops/export_adapter.py.
#include "cuda/export_adapter.cuh"

#include "cuda/binding.h"

namespace fastlora {

void export_adapter(Tensor flat, Tensor tiles, Tensor scales, Tensor out_a, Tensor out_b) {
  const char* op = "export_adapter";
  check(op, "flat", flat, ScalarType::Float);
  check(op, "tiles", tiles, ScalarType::Long, 8 * tiles.size(0));
  check(op, "scales", scales, ScalarType::Float, tiles.size(0));
  check(op, "out_a", out_a, out_b.scalar_type());
  check(op, "out_b", out_b, out_a.scalar_type());
  const OnDevice device(flat);
  ExportAdapter p{};
  p.flat = flat.const_data_ptr<float>(), p.scales = scales.const_data_ptr<float>(), p.count = tiles.size(0);
  p.tiles = reinterpret_cast<const ExportTile*>(tiles.const_data_ptr<int64_t>());
  p.out_a = out_a.mutable_data_ptr(), p.out_b = out_b.mutable_data_ptr();
  with_element(op, out_a.scalar_type(), [&](auto element) { launch_export_adapter<decltype(element)>(p, device.stream()); });
  check_launch(op);
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cuda, m) {
  m.def("export_adapter(Tensor flat, Tensor tiles, Tensor scales, Tensor(a!) out_a, Tensor(b!) out_b) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cuda, CUDA, m) { m.impl("export_adapter", TORCH_BOX(&fastlora::export_adapter)); }
