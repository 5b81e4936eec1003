// Causal attention over packed segments that may share a prefix, with the rotary embedding applied on the way in; formulas in
// fastlora/ops/packed_attention.py. A family is a root segment (a prompt) and the segments that continue it (its completions): these
// see the whole root and themselves up to the query. One task is one family and one key-value head: it packs the family's keys
// and values once for all its query heads, and nobody else writes its dK and dV. Scores of a block of 48 queries are kept in full
// (48 x keys floats), so that the softmax needs no rescaling.
#include "cpu/variant.h"

namespace fastlora {
struct AttentionShape {
  int64_t query_heads, key_heads, width;  // width of a head
  float scaling;
  int64_t window;  // tokens that a query sees at most, itself included; 0 = all
};
struct AttentionInputs {  // rows are tokens; q [T, query_heads * width], k and v [T, key_heads * width], cos and sin [T, width] or null
  const void *q, *k, *v, *cos, *sin;
};
struct Family {  // segments s of the family are tokens starts[s] to starts[s + 1]; the first one is the root
  const int64_t* starts;
  int64_t segments;
};
struct PackedAttention {
  void (*forward[2])(const AttentionShape&, const AttentionInputs&, const Family&, int64_t key_head, void* out, float* lse, int64_t tokens);
  void (*backward[2])(const AttentionShape&, const AttentionInputs&, const Family&, int64_t key_head, const void* dout, const void* out,
                      const float* lse, int64_t tokens, void* dq, void* dk, void* dv);
};
}  // namespace fastlora

#ifdef VARIANT
#include <vector>

#include "cpu/tile_gemm.h"

namespace fastlora::VARIANT {

constexpr int64_t kQueries = 48;  // of one block: a multiple of kRows, of 16 and of 2

// Memory that a thread keeps between calls: fresh pages cost ten times a refill.
class Arena {
 public:
  void reset(int64_t floats) {
    if ((int64_t)memory_.size() < floats) memory_.resize(floats);
    used_ = 0;
  }
  template <class T> T* take(int64_t n) {
    T* p = (T*)(memory_.data() + used_);
    used_ += round_up(n * sizeof(T), 64) / sizeof(float);
    return p;
  }
 private:
  std::vector<float> memory_;
  int64_t used_ = 0;
};

// The transpose of the rotation (simd.h): x cos - rotate_half(x sin).
template <class T> INLINE void store_unrotated(T* to, const float* x, const T* cos, const T* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    const floatv a = load(x + j), b = load(x + half + j);
    store(to + j, cos ? a * load(cos + j) + b * load(sin + half + j) : a);
    store(to + half + j, cos ? b * load(cos + half + j) - a * load(sin + j) : b);
  }
}

// The keys (or values) of one segment as right-hand sides: `lanes_are_keys` for products with x^T, `lanes_are_width` for products with x.
template <class Tile> struct PackedKeys {
  using E = typename Tile::Element;
  E *lanes_are_keys = nullptr, *lanes_are_width = nullptr;
  int64_t keys = 0, padded = 0;  // padded to kLanes
};

// Packs rows [start, start + n) of one head of x. Which of the two forms are needed is up to the caller.
template <class T, class Tile>
PackedKeys<Tile> pack_keys(Arena& arena, const T* x, int64_t ldx, const T* cos, const T* sin, int64_t start, int64_t n, int64_t width,
                           bool by_keys, bool by_width, float* rows, float* columns) {
  using E = typename Tile::Element;
  PackedKeys<Tile> packed;
  packed.keys = n, packed.padded = round_up(n, kLanes);
  if (by_keys) packed.lanes_are_keys = arena.take<E>(packed.padded * width);
  if (by_width) packed.lanes_are_width = arena.take<E>(packed.padded * width);
  for (int64_t first = 0; first < n; first += kLanes) {
    const int64_t count = n - first < kLanes ? n - first : kLanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t t = start + first + i;
      if (i < count) load_rotated(rows + i * width, x + t * ldx, cos ? cos + t * width : nullptr, sin ? sin + t * width : nullptr, width);
      else std::memset(rows + i * width, 0, width * sizeof(float));
    }
    if (by_keys) {
      transpose(kLanes, width, rows, width, columns, kLanes);
      pack_rows<Tile>(width, kLanes, columns, kLanes, packed.lanes_are_keys + first * width, kLanes * width);
    }
    if (by_width) pack_rows<Tile>(kLanes, width, rows, width, packed.lanes_are_width + first * kLanes, kLanes * packed.padded);
  }
  return packed;
}

// A block of queries of one segment, and the keys that it sees: all of the root's (unless it is the root) and its own up to the last query.
struct Block {
  int64_t first, count;    // queries within the segment
  int64_t own, own_padded; // own keys in sight of the last query
};
INLINE Block block_at(int64_t first, int64_t length) {
  const int64_t count = length - first < kQueries ? length - first : kQueries;
  return {first, count, first + count, round_up(first + count, kLanes)};
}

// Sets scores that a query must not see to -inf: padding of the root's keys, own keys after the query, keys that have left the window.
INLINE void mask_scores(float* scores, int64_t ld, const Block& b, int64_t root_keys, int64_t root_padded, int64_t window) {
  for (int64_t i = 0; i < b.count; ++i) {
    float* row = scores + i * ld;
    const int64_t hidden = window ? root_keys + b.first + i + 1 - window : 0;  // keys of the sequence before the window
    for (int64_t j = 0; j < hidden; ++j) row[j < root_keys ? j : root_padded + j - root_keys] = -INFINITY;
    for (int64_t j = root_keys; j < root_padded; ++j) row[j] = -INFINITY;
    for (int64_t j = b.first + i + 1; j < b.own_padded; ++j) row[root_padded + j] = -INFINITY;
  }
}

template <class T, class Tile> struct Task {
  using E = typename Tile::Element;
  const AttentionShape& shape;
  const T *q, *k, *v, *cos, *sin;
  const Family& family;
  int64_t key_head, width, ldq, ldk, longest, root_length;
  Arena& arena;

  Task(const AttentionShape& s, const AttentionInputs& in, const Family& f, int64_t head, Arena& a)
      : shape(s), q((const T*)in.q), k((const T*)in.k + head * s.width), v((const T*)in.v + head * s.width), cos((const T*)in.cos),
        sin((const T*)in.sin), family(f), key_head(head), width(s.width), ldq(s.query_heads * s.width), ldk(s.key_heads * s.width),
        longest(0), arena(a) {
    for (int64_t i = 0; i < f.segments; ++i) longest = std::max(longest, length(i));
    root_length = length(0);
  }
  int64_t length(int64_t s) const { return family.starts[s + 1] - family.starts[s]; }
  int64_t total() const { return family.starts[family.segments] - family.starts[0]; }
  int64_t most_keys() const { return round_up(root_length, kLanes) + round_up(longest, kLanes); }
  const T* row(const T* table, int64_t t) const { return table ? table + t * width : nullptr; }
  int64_t heads() const { return shape.query_heads / shape.key_heads; }
  const T* query(int64_t t, int64_t head) const { return q + t * ldq + (key_head * heads() + head) * width; }
  int64_t cell(int64_t t, int64_t head) const { return t * ldq + (key_head * heads() + head) * width; }

  // scores [count, root_padded + own_padded] = left x^T over the root's and the segment's own packed rows.
  void times_transposed(const E* left, const Block& b, const PackedKeys<Tile>* root, const PackedKeys<Tile>& own, float* scores, int64_t ld) {
    const int64_t panel = kLanes * width;
    if (root) tile_gemm<Tile>(b.count, root->padded / kLanes, width, left, width, root->lanes_are_keys, panel, scores, ld, false);
    const int64_t skip = root ? root->padded : 0;
    tile_gemm<Tile>(b.count, b.own_padded / kLanes, width, left, width, own.lanes_are_keys, panel, scores + skip, ld, false);
  }
  // out [count, width] = weights [count, root_padded + own_padded] x.
  void times(const E* weights, int64_t ld, const Block& b, const PackedKeys<Tile>* root, const PackedKeys<Tile>& own, float* out) {
    const int64_t panels = width / kLanes, skip = root ? root->padded : 0;
    if (root) tile_gemm<Tile>(b.count, panels, root->padded, weights, ld, root->lanes_are_width, kLanes * root->padded, out, width, false);
    tile_gemm<Tile>(b.count, panels, b.own_padded, weights + skip, ld, own.lanes_are_width, kLanes * own.padded, out, width, root != nullptr);
  }
  // rows [count, width] of the queries (rotated) as floats and as a left-hand side.
  void load_queries(int64_t start, const Block& b, int64_t head, float* rows, E* left) {
    for (int64_t i = 0; i < b.count; ++i) {
      const int64_t t = start + b.first + i;
      load_rotated(rows + i * width, query(t, head), row(cos, t), row(sin, t), width);
      for (int64_t j = 0; j < width; j += kLanes) Tile::put(left + i * width + j, load(rows + i * width + j));
    }
  }

  void forward(T* out, float* lse, int64_t tokens) {
    const int64_t ld = most_keys();
    arena.reset(2 * (total() + family.segments * kLanes) * width + kQueries * (2 * ld + 3 * width) + 2 * kLanes * width + 1024);
    float *scores = arena.take<float>(kQueries * ld), *rows = arena.take<float>(kQueries * width), *sums = arena.take<float>(kQueries * width);
    float *scratch = arena.take<float>(kLanes * width), *columns = arena.take<float>(kLanes * width);
    E *left = arena.take<E>(kQueries * width), *weights = arena.take<E>(kQueries * ld);
    PackedKeys<Tile> root_k, root_v;
    for (int64_t s = 0; s < family.segments; ++s) {
      const int64_t start = family.starts[s], n = length(s);
      const auto own_k = pack_keys<T, Tile>(arena, k, ldk, cos, sin, start, n, width, true, false, scratch, columns);
      const auto own_v = pack_keys<T, Tile>(arena, v, ldk, (const T*)nullptr, (const T*)nullptr, start, n, width, false, true, scratch, columns);
      if (s == 0) root_k = own_k, root_v = own_v;
      const int64_t root_padded = s ? root_k.padded : 0;
      for (int64_t head = 0; head < heads(); ++head)
        for (int64_t first = 0; first < n; first += kQueries) {
          const Block b = block_at(first, n);
          load_queries(start, b, head, rows, left);
          times_transposed(left, b, s ? &root_k : nullptr, own_k, scores, ld);
          mask_scores(scores, ld, b, s ? root_k.keys : 0, root_padded, shape.window);
          float* row_lse = lse + (key_head * heads() + head) * tokens + start + first;
          softmax(scores, weights, ld, b.count, root_padded + b.own_padded, row_lse, sums);
          times(weights, ld, b, s ? &root_v : nullptr, own_v, rows);
          for (int64_t i = 0; i < b.count; ++i)
            for (int64_t j = 0; j < width; j += kLanes)
              store(out + cell(start + first + i, head) + j, load(rows + i * width + j) * sums[i]);
        }
    }
  }
  // weights = exp(scaling (score - max)) (at most 1), lse, and 1 / sum of a row into `inverse_sums`.
  void softmax(const float* scores, E* weights, int64_t ld, int64_t count, int64_t keys, float* lse, float* inverse_sums) {
    for (int64_t i = 0; i < count; ++i) {
      floatv top = broadcast(-INFINITY), total{};
      for (int64_t j = 0; j < keys; j += kLanes) top = maximum(top, load(scores + i * ld + j));
      const float highest = maximum(top);
      for (int64_t j = 0; j < keys; j += kLanes) {
        const floatv e = exp((load(scores + i * ld + j) - highest) * shape.scaling);
        total += e;
        Tile::put(weights + i * ld + j, e);
      }
      const float denominator = sum(total);
      lse[i] = highest * shape.scaling + std::log(denominator);
      inverse_sums[i] = 1.0f / denominator;
    }
  }

  void backward(const T* dout, const T* out, const float* lse, int64_t tokens, T* dq, T* dk, T* dv) {
    const int64_t ld = most_keys(), padded_total = total() + family.segments * kLanes;
    arena.reset(5 * padded_total * width + kQueries * (6 * ld + 8 * width) + 2 * kLanes * width + 4096);
    float *scores = arena.take<float>(kQueries * ld), *dweights = arena.take<float>(kQueries * ld);
    float *rows = arena.take<float>(kQueries * width), *drows = arena.take<float>(kQueries * width), *turned = arena.take<float>(kQueries * width);
    float *scratch = arena.take<float>(kLanes * width), *columns = arena.take<float>(kLanes * width);
    E *left = arena.take<E>(kQueries * width), *dleft = arena.take<E>(kQueries * width), *ds = arena.take<E>(kQueries * ld);
    E *left_t = arena.take<E>(kQueries * width), *dleft_t = arena.take<E>(kQueries * width);
    E *p_panels = arena.take<E>(kQueries * ld), *ds_panels = arena.take<E>(kQueries * ld);
    PackedKeys<Tile> root_k, root_v;
    float *root_dk = nullptr, *root_dv = nullptr;
    for (int64_t s = 0; s < family.segments; ++s) {
      const int64_t start = family.starts[s], n = length(s);
      const auto own_k = pack_keys<T, Tile>(arena, k, ldk, cos, sin, start, n, width, true, true, scratch, columns);
      const auto own_v = pack_keys<T, Tile>(arena, v, ldk, (const T*)nullptr, (const T*)nullptr, start, n, width, true, false, scratch, columns);
      float *own_dk = arena.take<float>(width * own_k.padded), *own_dv = arena.take<float>(width * own_k.padded);
      std::memset(own_dk, 0, width * own_k.padded * sizeof(float));
      std::memset(own_dv, 0, width * own_k.padded * sizeof(float));
      if (s == 0) root_k = own_k, root_v = own_v, root_dk = own_dk, root_dv = own_dv;
      const PackedKeys<Tile>* shared = s ? &root_k : nullptr;
      const int64_t root_padded = s ? root_k.padded : 0;
      for (int64_t head = 0; head < heads(); ++head)
        for (int64_t first = 0; first < n; first += kQueries) {
          const Block b = block_at(first, n);
          const int64_t even = round_up(b.count, 2);
          load_queries(start, b, head, rows, left);
          turn(rows, turned, left_t, b.count, even);
          for (int64_t i = 0; i < b.count; ++i) {
            load_rotated(drows + i * width, dout + cell(start + first + i, head), (const T*)nullptr, (const T*)nullptr, width);
            for (int64_t j = 0; j < width; j += kLanes) Tile::put(dleft + i * width + j, load(drows + i * width + j));
          }
          turn(drows, turned, dleft_t, b.count, even);
          times_transposed(left, b, shared, own_k, scores, ld);
          mask_scores(scores, ld, b, s ? root_k.keys : 0, root_padded, shape.window);
          times_transposed(dleft, b, s ? &root_v : nullptr, own_v, dweights, ld);
          const float* row_lse = lse + (key_head * heads() + head) * tokens + start + first;
          score_gradients(scores, dweights, ld, b.count, root_padded + b.own_padded, row_lse, drows, out + cell(start + first, head), ds,
                          p_panels, ds_panels);
          times(ds, ld, b, shared, own_k, rows);
          for (int64_t i = 0; i < b.count; ++i) {
            const int64_t t = start + first + i;
            store_unrotated(dq + cell(t, head), rows + i * width, row(cos, t), row(sin, t), width);
          }
          const int64_t panel = kLanes * kQueries, root_panels = root_padded / kLanes, own_panels = b.own_padded / kLanes;
          if (s) {
            tile_gemm<Tile>(width, root_panels, even, dleft_t, kQueries, p_panels, panel, root_dv, root_k.padded, true);
            tile_gemm<Tile>(width, root_panels, even, left_t, kQueries, ds_panels, panel, root_dk, root_k.padded, true);
          }
          tile_gemm<Tile>(width, own_panels, even, dleft_t, kQueries, p_panels + root_panels * panel, panel, own_dv, own_k.padded, true);
          tile_gemm<Tile>(width, own_panels, even, left_t, kQueries, ds_panels + root_panels * panel, panel, own_dk, own_k.padded, true);
        }
      if (s) write_key_gradients(start, own_k, own_dk, own_dv, rows, dk, dv);
    }
    write_key_gradients(family.starts[0], root_k, root_dk, root_dv, rows, dk, dv);
  }
  // left_t [width, kQueries] = rows [count, width]ᵀ, with zeros up to `even` columns.
  void turn(const float* rows, float* turned, E* left_t, int64_t count, int64_t even) {
    transpose(count, width, rows, width, turned, kQueries);
    for (int64_t j = 0; j < width; ++j) {
      if (even > count) turned[j * kQueries + count] = 0.0f;
      for (int64_t i = 0; i < even; i += kLanes) Tile::put(left_t + j * kQueries + i, load(turned + j * kQueries + i));
    }
  }
  // p = exp(scaling score - lse), ds = scaling p (dp - delta), delta = dout . out; ds by rows, p and ds as panels with queries as k.
  void score_gradients(const float* scores, const float* dweights, int64_t ld, int64_t count, int64_t keys, const float* lse,
                       const float* drows, const T* out, E* ds, E* p_panels, E* ds_panels) {
    float delta[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      floatv dot{};
      for (int64_t j = 0; j < width; j += kLanes) dot += load(drows + i * width + j) * load(out + i * ldq + j);
      delta[i] = sum(dot);
    }
    for (int64_t i = 0; i < count; i += Tile::kPack)
      for (int64_t j = 0; j < keys; j += kLanes) {
        floatv p[2] = {}, g[2] = {};
        for (int64_t r = 0; r < Tile::kPack && i + r < count; ++r) {
          p[r] = exp(load(scores + (i + r) * ld + j) * shape.scaling - lse[i + r]);
          g[r] = p[r] * (load(dweights + (i + r) * ld + j) - delta[i + r]) * shape.scaling;
          Tile::put(ds + (i + r) * ld + j, g[r]);
        }
        const int64_t at = j * kQueries + i * kLanes;
        Tile::put_step(p_panels + at, p);
        Tile::put_step(ds_panels + at, g);
      }
    // FloatTile has one query a step: the padding query of an odd block is a step of its own.
    if (Tile::kPack == 1 && count % 2)
      for (int64_t j = 0; j < keys; j += kLanes) {
        const floatv zero{};
        Tile::put_step(p_panels + j * kQueries + count * kLanes, &zero);
        Tile::put_step(ds_panels + j * kQueries + count * kLanes, &zero);
      }
  }
  void write_key_gradients(int64_t start, const PackedKeys<Tile>& keys, const float* dk_t, const float* dv_t, float* row_, T* dk, T* dv) {
    for (int64_t i = 0; i < keys.keys; ++i) {
      const int64_t t = start + i, at = t * ldk + key_head * width;
      for (int64_t j = 0; j < width; ++j) row_[j] = dk_t[j * keys.padded + i];
      store_unrotated(dk + at, row_, row(cos, t), row(sin, t), width);
      for (int64_t j = 0; j < width; ++j) row_[j] = dv_t[j * keys.padded + i];
      for (int64_t j = 0; j < width; j += kLanes) store(dv + at + j, load(row_ + j));
    }
  }
};

static thread_local Arena arena;

template <class T>
void forward(const AttentionShape& shape, const AttentionInputs& in, const Family& family, int64_t key_head, void* out, float* lse, int64_t tokens) {
  Task<T, typename TileOf<T>::type>(shape, in, family, key_head, arena).forward((T*)out, lse, tokens);
}
template <class T>
void backward(const AttentionShape& shape, const AttentionInputs& in, const Family& family, int64_t key_head, const void* dout, const void* out,
              const float* lse, int64_t tokens, void* dq, void* dk, void* dv) {
  Task<T, typename TileOf<T>::type>(shape, in, family, key_head, arena)
      .backward((const T*)dout, (const T*)out, lse, tokens, (T*)dq, (T*)dk, (T*)dv);
}

DEFINE_KERNELS(PackedAttention) = {{forward<float>, forward<bf16>}, {backward<float>, backward<bf16>}};

}  // namespace fastlora::VARIANT

#else
#include "cpu/binding.h"

namespace fastlora {
DECLARE_KERNELS(PackedAttention)

namespace {
// What both directions check and derive from the arguments.
struct Call {
  AttentionShape shape;
  AttentionInputs in;
  std::vector<Family> families;
  Dtype type;
};

Call prepare(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
             const Tensor& cu_seqlens, const Tensor& roots, int64_t head_dim, double scaling, int64_t window) {
  const char* op = "packed_attention";
  Call call;
  call.type = check_rows(op, q);
  check_same(op, q, k);
  check_like(op, k, v);
  STD_TORCH_CHECK(head_dim % 32 == 0, op, ": the C++ kernel needs a head width that is a multiple of 32, got ", head_dim);
  const int64_t tokens = q.size(0);
  STD_TORCH_CHECK(q.size(1) > 0 && k.size(0) == tokens, op, ": q and k do not fit");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin come together");
  if (cos) {
    check_same(op, q, *cos), check_same(op, q, *sin);
    STD_TORCH_CHECK(cos->numel() == tokens * head_dim && sin->numel() == tokens * head_dim, op, ": cos and sin are not [tokens, head width]");
  }
  call.shape = {q.size(-1) / head_dim, k.size(-1) / head_dim, head_dim, (float)scaling, window};
  call.in = {bytes(q), bytes(k), bytes(v), cos ? bytes(*cos) : nullptr, sin ? bytes(*sin) : nullptr};
  const int64_t* starts = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t* root = roots.const_data_ptr<int64_t>();
  const int64_t segments = roots.numel();
  STD_TORCH_CHECK(cu_seqlens.numel() == segments + 1 && starts[0] == 0 && starts[segments] == tokens, op, ": cu_seqlens, roots and q disagree");
  for (int64_t s = 0; s < segments; ++s) {
    STD_TORCH_CHECK(starts[s] <= starts[s + 1], op, ": cu_seqlens goes down after segment ", s);
    if (root[s] == s) call.families.push_back({starts + s, 0});
    STD_TORCH_CHECK(!call.families.empty() && call.families.back().starts == starts + root[s], op, ": a family's segments must be adjacent");
    ++call.families.back().segments;
  }
  return call;
}
}  // namespace

std::tuple<Tensor, Tensor> packed_attention_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> cos, std::optional<Tensor> sin,
                                                    Tensor cu_seqlens, Tensor roots, int64_t head_dim, double scaling, int64_t window) {
  const Call call = prepare(q, k, v, cos, sin, cu_seqlens, roots, head_dim, scaling, window);
  const int64_t tokens = q.size(0), heads = call.shape.key_heads;
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {call.shape.query_heads, tokens}, ScalarType::Float);
  const auto kernel = PackedAttention_kernels().forward[call.type];
  char* o = mutable_bytes(out);
  float* l = lse.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, (int64_t)call.families.size() * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(call.shape, call.in, call.families[i / heads], i % heads, o, l, tokens);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, std::optional<Tensor> cos,
                                                             std::optional<Tensor> sin, Tensor cu_seqlens, Tensor roots, Tensor out, Tensor lse,
                                                             int64_t head_dim, double scaling, int64_t window) {
  const Call call = prepare(q, k, v, cos, sin, cu_seqlens, roots, head_dim, scaling, window);
  check_like("packed_attention", q, dout);
  check_like("packed_attention", q, out);
  const int64_t tokens = q.size(0), heads = call.shape.key_heads;
  check_per_row("packed_attention", "lse", lse, call.shape.query_heads * tokens);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  const auto kernel = PackedAttention_kernels().backward[call.type];
  const char *d = bytes(dout), *o = bytes(out);
  const float* l = lse.const_data_ptr<float>();
  char *gq = mutable_bytes(dq), *gk = mutable_bytes(dk), *gv = mutable_bytes(dv);
  torch::stable::parallel_for(0, (int64_t)call.families.size() * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(call.shape, call.in, call.families[i / heads], i % heads, d, o, l, tokens, gq, gk, gv);
  });
  return {dq, dk, dv};
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_FRAGMENT(fastlora_cpu, m) {
  m.def(
      "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor cu_seqlens, Tensor roots, int head_dim, "
      "float scaling, int window=0) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor cu_seqlens, Tensor roots, "
      "Tensor out, Tensor lse, int head_dim, float scaling, int window=0) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastlora_cpu, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&fastlora::packed_attention_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&fastlora::packed_attention_backward));
}
#endif
