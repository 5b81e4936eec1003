// Norms of the gradient's matrices, and AdamW on the flat buffers with the clip folded in; formulas, the table of segments and the index of
// trained entries in fastlora/ops/adamw_step.py. Memory-bound: a step reads four and writes three floats an entry, a norm reads one. Work is
// cut into blocks of a fixed size that lie in one matrix each, so no sum depends on the number of threads.
#include "cpu/variant.h"

namespace fastlora {

struct AdamwScalars {
  float clip, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root_bias2, eps, decay;
};

// [begin, end) counts entries of the moments: entry i is element i of param and grad, or element index[i] where there is an index.
struct AdamwStep {
  void (*step)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, const int32_t* index, int64_t begin, int64_t end,
               const AdamwScalars& scalars);
  double (*sum_of_squares)(const float* grad, const int32_t* index, int64_t begin, int64_t end);
};

}  // namespace fastlora

#ifdef VARIANT
#include "cpu/simd.h"

namespace fastlora::VARIANT {

// Positions ascend without repeats, so the span of a vector of them tells whether they are neighbours in memory.
INLINE bool adjacent(const int32_t* positions, int64_t count) { return positions[count - 1] - positions[0] == count - 1; }

// Entries i, i + 1, ... of a flat buffer: a whole vector, or the `left` last ones (lanes beyond them are 0).
INLINE floatv load_entries(const float* buffer, const int32_t* index, int64_t i, int64_t left) {
  if (!index) return load_upto(buffer + i, left);
  const int64_t count = left < kLanes ? left : kLanes;
  const int32_t* positions = index + i;
  if (adjacent(positions, count)) return load_upto(buffer + positions[0], left);
  floatv v{};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = buffer[positions[lane]];
  return v;
}
INLINE void store_entries(float* buffer, const int32_t* index, int64_t i, floatv v, int64_t left) {
  if (!index) return store_upto(buffer + i, v, left);
  const int64_t count = left < kLanes ? left : kLanes;
  const int32_t* positions = index + i;
  if (adjacent(positions, count)) return store_upto(buffer + positions[0], v, left);
  for (int64_t lane = 0; lane < count; ++lane) buffer[positions[lane]] = v[lane];
}

INLINE floatv sqrt(floatv x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

// (1 - w) a + w b, from the nearer end: a tiny weight then costs no digits of a, nor a weight of 1 any of b.
INLINE floatv lerp(floatv a, floatv b, float w) { return w < 0.5f ? a + w * (b - a) : b - (1.0f - w) * (b - a); }

// The parameter is rounded once: decay and update are added up first, where they are small.
static void step(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, const int32_t* index, int64_t begin, int64_t end,
                 const AdamwScalars& s) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t left = end - i;
    const floatv g = load_entries(grad, index, i, left) * s.clip, p = load_entries(param, index, i, left);
    const floatv m = lerp(load_upto(exp_avg + i, left), g, s.one_minus_beta1);
    const floatv v = s.beta2 * load_upto(exp_avg_sq + i, left) + s.one_minus_beta2 * (g * g);
    const floatv denominator = sqrt(v) * s.inverse_root_bias2 + s.eps;
    store_upto(exp_avg + i, m, left);
    store_upto(exp_avg_sq + i, v, left);
    store_entries(param, index, i, p - (s.step_size * m / denominator + s.decay * p), left);
  }
}

typedef float half_floatv __attribute__((vector_size(2 * kLanes)));
typedef double doublev __attribute__((vector_size(4 * kLanes)));

// In double, where the square of a float is exact and neither overflows nor vanishes.
static double sum_of_squares(const float* grad, const int32_t* index, int64_t begin, int64_t end) {
  doublev low{}, high{};
  for (int64_t i = begin; i < end; i += kLanes) {
    const floatv g = load_entries(grad, index, i, end - i);
    half_floatv halves[2];
    std::memcpy(halves, &g, sizeof g);
    const doublev a = __builtin_convertvector(halves[0], doublev), b = __builtin_convertvector(halves[1], doublev);
    low += a * a;
    high += b * b;
  }
  low += high;
  double total = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) total += low[lane];
  return total;
}

DEFINE_KERNELS(AdamwStep) = {step, sum_of_squares};

}  // namespace fastlora::VARIANT

#else
#include <cmath>

#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(AdamwStep)

struct Block {
  int64_t segment, begin, end;
};

// 64 KiB of each buffer: some microseconds of work, and eight of them fit into a core's second-level cache.
constexpr int64_t kBlock = 16384;

static const int32_t* positions_of(const char* op, const std::optional<Tensor>& index) {
  if (!index) return nullptr;
  STD_TORCH_CHECK(index->scalar_type() == ScalarType::Int && index->is_contiguous(), op, ": index_k must be contiguous int32");
  return index->const_data_ptr<int32_t>();
}

static float* floats(const char* op, const char* name, Tensor& buffer, int64_t numel) {
  STD_TORCH_CHECK(buffer.scalar_type() == ScalarType::Float && buffer.is_contiguous(), op, ": ", name, " must be contiguous float32");
  STD_TORCH_CHECK(buffer.numel() == numel, op, ": ", name, " has ", buffer.numel(), " entries, it needs ", numel);
  return buffer.mutable_data_ptr<float>();
}

// The blocks of all segments in order; refuses a table that leads outside of the buffers.
static std::vector<Block> blocks_of(const char* op, const Tensor& table, const int32_t* positions, int64_t entries, int64_t elements) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.is_contiguous() && table.dim() == 2 && table.size(1) == 6, op,
                  ": table_m6 must be contiguous int64 [segments, 6]");
  std::vector<Block> blocks;
  const int64_t* row = table.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < table.size(0); ++m, row += 6) {
    const int64_t first = row[0], last = row[0] + row[1] * row[2], begin = row[4], end = row[5];
    const bool inside = 0 <= first && last <= elements && 0 <= begin && begin <= end && end <= entries;
    STD_TORCH_CHECK(inside, op, ": segment ", m, " exceeds the buffers: elements ", first, " to ", last, " of ", elements, ", entries ", begin,
                    " to ", end, " of ", entries);
    if (positions && begin < end)
      STD_TORCH_CHECK(first <= positions[begin] && positions[end - 1] < last, op, ": index_k leads out of segment ", m);
    for (int64_t i = begin; i < end; i += kBlock) blocks.push_back({m, i, std::min(end, i + kBlock)});
  }
  return blocks;
}

// Runs `work` on every block, in parallel where there is more than one full block's worth for a thread.
template <class Work> static void for_each_block(const std::vector<Block>& blocks, const Work& work) {
  int64_t entries = 0;
  for (const Block& block : blocks) entries += block.end - block.begin;
  const int64_t count = blocks.size(), per_task = entries ? (count * kBlock + entries - 1) / entries : 1;
  torch::stable::parallel_for(0, count, per_task, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i, blocks[i]);
  });
}

Tensor gradient_norms(Tensor grad, Tensor table, std::optional<Tensor> index) {
  const char* op = "gradient_norms";
  const int64_t elements = grad.numel(), entries = index ? index->numel() : elements;
  const float* g = floats(op, "grad", grad, elements);
  const int32_t* positions = positions_of(op, index);
  const std::vector<Block> blocks = blocks_of(op, table, positions, entries, elements);
  std::vector<double> partial(blocks.size()), squares(table.size(0));
  const auto sum_of_squares = AdamwStep_kernels().sum_of_squares;
  for_each_block(blocks, [&](int64_t i, const Block& block) { partial[i] = sum_of_squares(g, positions, block.begin, block.end); });
  for (size_t i = 0; i < blocks.size(); ++i) squares[blocks[i].segment] += partial[i];
  Tensor norms = torch::stable::new_empty(grad, {table.size(0)});
  float* out = norms.mutable_data_ptr<float>();
  for (size_t m = 0; m < squares.size(); ++m) out[m] = (float)std::sqrt(squares[m]);
  return norms;
}

void adamw_step(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor clip_coef, Tensor table, std::optional<Tensor> index,
                int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  const char* op = "adamw_step";
  const int64_t elements = param.numel(), entries = index ? index->numel() : elements;
  float *p = floats(op, "param", param, elements), *g = floats(op, "grad", grad, elements);
  float *m = floats(op, "exp_avg", exp_avg, entries), *v = floats(op, "exp_avg_sq", exp_avg_sq, entries);
  const float clip = *floats(op, "clip_coef", clip_coef, 1);
  const int32_t* positions = positions_of(op, index);
  const double bias1 = 1 - std::pow(beta1, step), bias2 = 1 - std::pow(beta2, step);
  const AdamwScalars scalars{clip,
                             (float)(1 - beta1),
                             (float)beta2,
                             (float)(1 - beta2),
                             (float)(lr / bias1),
                             (float)(1 / std::sqrt(bias2)),
                             (float)eps,
                             (float)(lr * weight_decay)};
  const auto kernel = AdamwStep_kernels().step;
  for_each_block(blocks_of(op, table, positions, entries, elements),
                 [&](int64_t, const Block& block) { kernel(p, g, m, v, positions, block.begin, block.end, scalars); });
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) {
  m.def("gradient_norms(Tensor grad, Tensor table_m6, Tensor? index_k) -> Tensor");
  m.def(
      "adamw_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor clip_coef, Tensor table_m6, "
      "Tensor? index_k, int step, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) {
  m.impl("gradient_norms", TORCH_BOX(&fastlora::gradient_norms));
  m.impl("adamw_step", TORCH_BOX(&fastlora::adamw_step));
}
#endif
