// Attention of one new token per row to its prompt and to the tokens that its row has sampled so far; formulas in
// fastlora/ops/decode_attention.py. Prompts are stored once for all completions of a group. One task is one row and one key-value head: every
// key and value in sight is read once for all query heads that share it. Memory-bound.
#include "cpu/variant.h"

namespace fastlora {
struct DecodeShape {
  int64_t query_heads, key_heads, width;
  float scaling;
  int64_t window;  // tokens in sight, the new one included; 0 = all
};
struct DecodeRow {  // tables of a row; keys and values are [tokens, key_heads * width]
  const void *q, *prompt_k, *prompt_v, *cos, *sin;
  int64_t prompt_tokens;
  void *own_k, *own_v;  // rotated keys and values of the row's own tokens, the new one in place
  int64_t own_tokens;   // the new one included
  void* out;
};
struct DecodeAttention {
  void (*attend[2])(const DecodeShape&, const DecodeRow&, int64_t key_head);
  void (*append[2])(const DecodeShape&, const DecodeRow&, const void* k, const void* v);
};
}  // namespace fastlora

#ifdef VARIANT
#include <vector>

#include "cpu/simd.h"

namespace fastlora::VARIANT {

// The new token's key (rotated) and value to the end of the row's own.
template <class T> void append(const DecodeShape& shape, const DecodeRow& row, const void* k, const void* v) {
  const int64_t ld = shape.key_heads * shape.width, at = (row.own_tokens - 1) * ld;
  for (int64_t head = 0; head < shape.key_heads; ++head) {
    float rotated[512];
    load_rotated(rotated, (const T*)k + head * shape.width, (const T*)row.cos, (const T*)row.sin, shape.width);
    for (int64_t j = 0; j < shape.width; j += kLanes) store((T*)row.own_k + at + head * shape.width + j, load(rotated + j));
  }
  std::memcpy((T*)row.own_v + at, v, ld * sizeof(T));
}

template <class T> void scores_of(const float* q, int64_t heads, int64_t width, const T* keys, int64_t ld, int64_t count, float* scores, int64_t lds) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      floatv dot{};
      for (int64_t j = 0; j < width; j += kLanes) dot += load(q + h * width + j) * load(keys + i * ld + j);
      scores[h * lds + i] = sum(dot);
    }
}

template <class T> void add_values(const float* weights, int64_t lds, int64_t heads, int64_t width, const T* values, int64_t ld, int64_t count, float* out) {
  for (int64_t j = 0; j < width; j += kLanes)
    for (int64_t h = 0; h < heads; ++h) {
      floatv total = load(out + h * width + j);
      for (int64_t i = 0; i < count; ++i) total += load(values + i * ld + j) * weights[h * lds + i];
      store(out + h * width + j, total);
    }
}

template <class T> void attend(const DecodeShape& shape, const DecodeRow& row, int64_t key_head) {
  static thread_local std::vector<float> memory;
  const int64_t heads = shape.query_heads / shape.key_heads, width = shape.width, ld = shape.key_heads * width, offset = key_head * width;
  const int64_t all = row.prompt_tokens + row.own_tokens, padded = (all + kLanes - 1) / kLanes * kLanes;
  memory.assign(heads * (2 * width + padded), 0.0f);
  float *q = memory.data(), *out = q + heads * width, *scores = out + heads * width;
  for (int64_t h = 0; h < heads; ++h)
    load_rotated(q + h * width, (const T*)row.q + (key_head * heads + h) * width, (const T*)row.cos, (const T*)row.sin, width);
  const T *prompt_k = (const T*)row.prompt_k + offset, *prompt_v = (const T*)row.prompt_v + offset;
  const T *own_k = (const T*)row.own_k + offset, *own_v = (const T*)row.own_v + offset;
  scores_of(q, heads, width, prompt_k, ld, row.prompt_tokens, scores, padded);
  scores_of(q, heads, width, own_k, ld, row.own_tokens, scores + row.prompt_tokens, padded);
  const int64_t hidden = shape.window && all > shape.window ? all - shape.window : 0;
  for (int64_t h = 0; h < heads; ++h) {
    float* s = scores + h * padded;
    for (int64_t i = 0; i < hidden; ++i) s[i] = -INFINITY;
    for (int64_t i = all; i < padded; ++i) s[i] = -INFINITY;
    floatv top = broadcast(-INFINITY), total{};
    for (int64_t i = 0; i < padded; i += kLanes) top = maximum(top, load(s + i));
    const float highest = maximum(top);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const floatv e = exp((load(s + i) - highest) * shape.scaling);
      total += e;
      store(s + i, e);
    }
    const floatv inverse = broadcast(1.0f / sum(total));
    for (int64_t i = 0; i < padded; i += kLanes) store(s + i, load(s + i) * inverse);
  }
  add_values(scores, padded, heads, width, prompt_v, ld, row.prompt_tokens, out);
  add_values(scores + row.prompt_tokens, padded, heads, width, own_v, ld, row.own_tokens, out);
  for (int64_t j = 0; j < heads * width; j += kLanes) store((T*)row.out + key_head * heads * width + j, load(out + j));
}

DEFINE_KERNELS(DecodeAttention) = {{attend<float>, attend<bf16>}, {append<float>, append<bf16>}};

}  // namespace fastlora::VARIANT

#else
#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(DecodeAttention)

Tensor decode_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor prompt_k, Tensor prompt_v,
                        Tensor cu_prompts, Tensor prompts, Tensor own_k, Tensor own_v, Tensor slots, int64_t own_tokens, int64_t head_dim,
                        double scaling, int64_t window) {
  const char* op = "decode_attention";
  const Dtype type = check_rows(op, q);
  for (const Tensor* other : {&k, &v, &prompt_k, &prompt_v, &own_k, &own_v}) check_same(op, q, *other);
  if (cos) check_same(op, q, *cos), check_same(op, q, *sin);
  STD_TORCH_CHECK(head_dim % 32 == 0 && head_dim <= 512, op, ": the C++ kernel needs a head width that is a multiple of 32 up to 512, got ", head_dim);
  const DecodeShape shape{q.size(1) / head_dim, k.size(1) / head_dim, head_dim, (float)scaling, window};
  const int64_t rows = q.size(0), ld = k.size(1), capacity = own_k.size(1), w = width(type), row_bytes = q.size(1) * w;
  STD_TORCH_CHECK(own_tokens < capacity && own_k.size(2) == ld, op, ": ", own_tokens, " tokens are cached of at most ", capacity);
  const int64_t *starts = cu_prompts.const_data_ptr<int64_t>(), *prompt = prompts.const_data_ptr<int64_t>(), *slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < own_k.size(0) && prompt[i] >= 0 && prompt[i] + 1 < cu_prompts.numel(), op, ": row ", i,
                    " names slot ", slot[i], " and prompt ", prompt[i], ", which are not there");
  Tensor out = torch::stable::empty_like(q);
  const DecodeAttention& kernels = DecodeAttention_kernels();
  const char *qs = bytes(q), *ks = bytes(k), *vs = bytes(v), *pk = bytes(prompt_k), *pv = bytes(prompt_v);
  const char *cs = cos ? bytes(*cos) : nullptr, *sn = sin ? bytes(*sin) : nullptr;
  char *ok = mutable_bytes(own_k), *ov = mutable_bytes(own_v), *o = mutable_bytes(out);
  auto row_of = [&](int64_t i) {
    const int64_t at = starts[prompt[i]] * ld * w, own = slot[i] * capacity * ld * w, table = i * head_dim * w;
    return DecodeRow{qs + i * row_bytes, pk + at, pv + at, cs ? cs + table : nullptr, sn ? sn + table : nullptr,
                     starts[prompt[i] + 1] - starts[prompt[i]], ok + own, ov + own, own_tokens + 1, o + i * row_bytes};
  };
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const DecodeRow row = row_of(i);
      kernels.append[type](shape, row, ks + i * ld * w, vs + i * ld * w);
      for (int64_t head = 0; head < shape.key_heads; ++head) kernels.attend[type](shape, row, head);
    }
  });
  return out;
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) {
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor prompt_k, Tensor prompt_v, Tensor cu_prompts, "
      "Tensor prompts, Tensor(a!) own_k, Tensor(b!) own_v, Tensor slots, int own_tokens, int head_dim, float scaling, int window) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) { m.impl("decode_attention", TORCH_BOX(&fastlora::decode_attention)); }
#endif
