// The programs of a launch on a chip: so many at once, one access each a turn, all through one cache.
#pragma once
#include "cache.h"
#include "trace.h"

namespace trace {
// How programs come to run: so many at once, in this order (null: as launched, program_id(0) counting fastest).
struct Order {
  int slots;
  const int64_t* programs;
};
struct Counts {
  int64_t loads, stores;  // sectors between L2 and the SMs
  double flops;           // of products, padding included
};
// (program, kind, first byte, stride, rows, bytes of a row) of every run.
struct Listing {
  int64_t* rows;
  int64_t count;
};

struct Slot {
  Trace trace;
  size_t next = 0;
};
static char failure[400];

// Calls touch(line, sectors) along a run; the number of sectors. `before`: the last sector of the run before, not asked for twice.
template <class Touch> static int64_t for_lines(const Run& run, int64_t& before, Touch touch) {
  int64_t sectors = 0;
  for (int64_t k = 0; k < run.count; ++k) {
    int64_t sector = (run.first + k * run.stride) / SECTOR;
    const int64_t last = (run.first + k * run.stride + run.bytes - 1) / SECTOR;
    if (sector == before) ++sector;
    before = last;
    while (sector <= last) {
      const int64_t line = sector / 4, end = std::min(last + 1, 4 * (line + 1));
      touch(line, ((1u << (end - sector)) - 1) << sector % 4);
      sectors += end - sector;
      sector = end;
    }
  }
  return sectors;
}

static void step(Cache& cache, Counts& counts, const Trace& trace, const Access& access) {
  const bool load = access.kind & LOAD, store = access.kind & STORE;
  int64_t before = -1;
  for (int r = access.first_run; r < access.end_run; ++r) {
    const int64_t sectors = for_lines(trace.runs[r], before, [&](int64_t line, unsigned mask) { cache.touch(line, mask, load, store); });
    counts.loads += load ? sectors : 0;
    counts.stores += store ? sectors : 0;
  }
}

// A null message, or what went wrong.
// Runs program p of the grid for its accesses; false, with a message, where one leaves its tensor.
template <class Program> static bool trace_program(Trace& trace, const Buffers& buffers, long p, int gx, int gy, Program program) {
  trace = Trace{&buffers};
  program(trace, p % gx, p / gx % gy, p / gx / gy);
  if (!*trace.message) return true;
  std::snprintf(failure, sizeof failure, "program %ld: %s", p, trace.message);
  return false;
}

// A null message, or what went wrong.
template <class Program>
static const char* in_lockstep(Cache& cache, const Buffers& buffers, Order order, Counts& counts, int gx, int gy, int gz, Program program) {
  const long programs = (long)gx * gy * gz;
  int64_t end = 0;
  for (int b = 0; b < buffers.count; ++b) end = std::max(end, buffers.end[b]);
  cache.grow(end / LINE + 1);
  std::vector<Slot> slots(std::min<long>(order.slots, programs));
  long begun = 0;
  for (bool any = true; any;) {
    any = false;
    for (auto& slot : slots) {
      while (slot.next == slot.trace.accesses.size() && begun < programs) {
        const long p = order.programs ? order.programs[begun] : begun;
        ++begun;
        if (!trace_program(slot.trace, buffers, p, gx, gy, program)) return failure;
        slot.next = 0;
        counts.flops += slot.trace.flops;
      }
      if (slot.next == slot.trace.accesses.size()) continue;
      step(cache, counts, slot.trace, slot.trace.accesses[slot.next++]);
      any = true;
    }
  }
  return nullptr;
}

template <class Program>
static const char* listed(const Buffers& buffers, Listing& listing, int gx, int gy, int gz, Program program) {
  static std::vector<int64_t> rows;
  rows.clear();
  Trace trace;
  for (long p = 0; p < (long)gx * gy * gz; ++p) {
    if (!trace_program(trace, buffers, p, gx, gy, program)) return failure;
    for (auto& access : trace.accesses)
      for (int r = access.first_run; r < access.end_run; ++r) {
        const Run& run = trace.runs[r];
        rows.insert(rows.end(), {p, (int64_t)access.kind, run.first, run.stride, run.count, run.bytes});
      }
  }
  listing = {rows.data(), (int64_t)rows.size() / 6};
  return nullptr;
}
}  // namespace trace

// The cache alone, for whoever holds one: a library is loaded for each kernel, and all of them work on the caches of one.
extern "C" trace::Cache* cache_new(const int64_t* capacities) { return new trace::Cache(capacities); }
extern "C" void cache_delete(trace::Cache* cache) { delete cache; }
extern "C" void cache_touch(trace::Cache* cache, int64_t line, unsigned sectors, int kind) {
  cache->grow(line + 1);
  cache->touch(line, sectors, kind & trace::LOAD, kind & trace::STORE);
}
extern "C" void cache_flush(trace::Cache* cache) { cache->flush(); }
extern "C" void cache_counts(const trace::Cache* cache, int64_t* fills, int64_t* write_backs) {
  for (int c = 0; c < trace::SIZES; ++c) fills[c] = cache->fills[c], write_backs[c] = cache->write_backs[c];
}
