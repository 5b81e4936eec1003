// What a traced Triton kernel (trace.py) runs on: the accesses of one program, as rows of bytes.
#pragma once
#include "runtime.h"

namespace trace {
enum Kind { LOAD = 1, STORE = 2 };  // an atomic operation is both

// `count` rows of `bytes` bytes, `stride` bytes from one to the next.
struct Run {
  int64_t first, stride, count, bytes;
};
// What one operation of a program asks for: runs first_run to end_run - 1.
struct Access {
  int kind, first_run, end_run;
};

// The tensors of a launch. Their addresses are those of an imagined GPU's memory; `real` is where their values stand here.
struct Buffers {
  int count;
  const int64_t *first, *end, *real;
  const char** names;
};

// A tensor that is computed element by element when asked.
template <class T, long N, class F> struct Lazy {
  F at;
  T operator[](long i) const { return at(i); }
  operator Array<T, N>() const {
    Array<T, N> all;
    for (long i = 0; i < N; ++i) all[i] = at(i);
    return all;
  }
};
template <class T, long N, class F> static Lazy<T, N, F> lazy(F at) { return {at}; }

// One axis of a descriptor's block: where it begins, its length, the tensor's length, the tensor's stride in elements.
struct Axis {
  int64_t index, block, shape, stride;
};

struct Trace {
  const Buffers* buffers = nullptr;
  std::vector<Access> accesses;
  std::vector<Run> runs;
  double flops = 0;
  char message[300] = "";

  template <class T> const T* real(const T* pointer) const {
    for (int b = 0; b < buffers->count; ++b)
      if ((int64_t)pointer >= buffers->first[b] && (int64_t)pointer < buffers->end[b])
        return (const T*)((int64_t)pointer - buffers->first[b] + buffers->real[b]);
    return nullptr;  // `inside` has refused it
  }

  // Elements of SIZE bytes at at(0) ... at(N - 1); 0: masked.
  template <long N, long SIZE, class F> bool pointers(int kind, F at) {
    static thread_local int64_t all[N];
    for (long i = 0; i < N; ++i) all[i] = at(i);
    const size_t first_run = runs.size();
    int64_t first = 0, end = 0;
    bool ascending = true;
    for (long i = 0; i < N; ++i) {
      if (!all[i]) continue;
      if (all[i] == end) {
        end += SIZE;
        continue;
      }
      ascending &= all[i] > end;
      if (end) append(first_run, first, end);
      first = all[i], end = first + SIZE;
    }
    if (end) append(first_run, first, end);
    if (!ascending) sort(first_run);
    return finish(kind, first_run);
  }

  // The part of a block that lies inside its tensor; the last axis is contiguous.
  bool block(int kind, const char* base, int64_t size, std::initializer_list<Axis> axes) {
    const size_t first_run = runs.size();
    rows(first_run, (int64_t)base, size, axes.begin(), axes.end());
    return finish(kind, first_run);
  }

 private:
  void rows(size_t first_run, int64_t base, int64_t size, const Axis* axis, const Axis* end) {
    const int64_t first = std::max<int64_t>(axis->index, 0), last = std::min(axis->index + axis->block, axis->shape);
    if (axis + 1 == end) {
      if (first < last) append(first_run, base + first * axis->stride * size, base + last * axis->stride * size);
      return;
    }
    for (int64_t i = first; i < last; ++i) rows(first_run, base + i * axis->stride * size, size, axis + 1, end);
  }

  // Adds a row to the access that began with first_run; equal rows at equal distances are one run.
  void append(size_t first_run, int64_t first, int64_t end) {
    if (runs.size() > first_run) {
      Run& last = runs.back();
      const int64_t stride = first - (last.first + (last.count - 1) * last.stride);
      if (last.bytes == end - first && (last.count == 1 || stride == last.stride)) {
        last.stride = stride, ++last.count;
        return;
      }
    }
    runs.push_back({first, 0, 1, end - first});
  }

  // Rows that came in another order than their addresses, or twice, once each and ascending.
  void sort(size_t first_run) {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (size_t r = first_run; r < runs.size(); ++r)
      for (int64_t k = 0; k < runs[r].count; ++k) {
        const int64_t first = runs[r].first + k * runs[r].stride;
        found.push_back({first, first + runs[r].bytes});
      }
    std::sort(found.begin(), found.end());
    runs.resize(first_run);
    size_t kept = 0;
    for (auto& row : found)
      if (kept && row.first <= found[kept - 1].second) found[kept - 1].second = std::max(found[kept - 1].second, row.second);
      else found[kept++] = row;
    for (size_t k = 0; k < kept; ++k) append(first_run, found[k].first, found[k].second);
  }

  // Closes an access; false, with a message, if it leaves the tensor that it begins in.
  bool finish(int kind, size_t first_run) {
    if (runs.size() == first_run) return true;  // all masked: nothing is asked for
    const Run& last = runs.back();
    const int64_t first = runs[first_run].first, end = last.first + (last.count - 1) * last.stride + last.bytes;
    int b = 0;
    while (b < buffers->count && !(first >= buffers->first[b] && first < buffers->end[b])) ++b;
    if (b == buffers->count || end > buffers->end[b]) {
      std::snprintf(message, sizeof message, "%s out of bounds: %s", kind & STORE ? "store" : "load",
                    b == buffers->count ? "begins outside all tensors that were passed" : buffers->names[b]);
      return false;
    }
    accesses.push_back({kind, (int)first_run, (int)runs.size()});
    return true;
  }
};
}  // namespace trace
