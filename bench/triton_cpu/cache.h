// An L2 cache of several sizes at once: lines of 128 bytes, four sectors each, the least recently used line leaves first.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace trace {
constexpr int LINE = 128, SECTOR = 32, SIZES = 3;

// Touches stand in one queue; a line's place is that of its last touch. A cache of n lines holds the n lines touched last, so the queue
// serves every size: each has its own oldest place, in front of which nothing is resident.
class Cache {
 public:
  int64_t fills[SIZES] = {}, write_backs[SIZES] = {};  // sectors from and to memory

  explicit Cache(const int64_t* capacities) {
    for (int c = 0; c < SIZES; ++c) capacity[c] = capacities[c];
  }

  void grow(int64_t count) {
    if (count > (int64_t)lines.size()) lines.resize(count);
  }

  // A load fetches the sectors that are missing; a store fetches nothing and makes them dirty.
  void touch(int64_t line, unsigned sectors, bool load, bool store) {
    Line& it = lines[line];
    for (int c = 0; c < SIZES; ++c) {
      resident[c] += !it.valid[c];
      if (load) fills[c] += __builtin_popcount(sectors & ~it.valid[c]);
      it.valid[c] |= sectors;
      if (store) it.dirty[c] |= sectors;
    }
    it.last = queue.size();
    queue.push_back(line);
    for (int c = 0; c < SIZES; ++c)
      while (resident[c] > capacity[c]) evict(c);
    if ((int64_t)queue.size() > 2 * resident[SIZES - 1] + (1 << 16)) compact();
  }

  // Everything dirty goes to memory and nothing stays.
  void flush() {
    for (size_t at = 0; at < queue.size(); ++at) {
      Line& it = lines[queue[at]];
      if (it.last != (int64_t)at) continue;
      for (int c = 0; c < SIZES; ++c) write_backs[c] += __builtin_popcount(it.dirty[c]);
      it = Line();
    }
    queue.clear();
    for (int c = 0; c < SIZES; ++c) oldest[c] = resident[c] = 0;
  }

 private:
  struct Line {
    int64_t last = -1;
    uint8_t valid[SIZES] = {}, dirty[SIZES] = {};  // a bit for each sector; both 0 where the line is not resident
  };
  std::vector<Line> lines;
  std::vector<uint32_t> queue;
  int64_t capacity[SIZES], resident[SIZES] = {}, oldest[SIZES] = {};

  void evict(int c) {
    const int64_t at = oldest[c]++;
    Line& it = lines[queue[at]];
    if (it.last != at) return;  // touched again since
    write_backs[c] += __builtin_popcount(it.dirty[c]);
    it.valid[c] = it.dirty[c] = 0;
    --resident[c];
  }

  // Drops the places of touches that were not a line's last. The last size is the largest: it keeps all that the others keep.
  void compact() {
    size_t kept = 0;
    int64_t moved[SIZES];
    for (size_t at = 0; at <= queue.size(); ++at) {
      for (int c = 0; c < SIZES; ++c)
        if (oldest[c] == (int64_t)at) moved[c] = kept;
      if (at == queue.size() || lines[queue[at]].last != (int64_t)at) continue;
      lines[queue[at]].last = kept;
      queue[kept++] = queue[at];
    }
    queue.resize(kept);
    for (int c = 0; c < SIZES; ++c) oldest[c] = moved[c];
  }
};
}  // namespace trace
