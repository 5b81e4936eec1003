// The scheduler of emulation.h. It is compiled without the sanitizers' instrumentation, since all threads of a block use its state: they
// see the kernel's own accesses only. WITH_TSAN and WITH_ASAN tell it which of them it must tell about the threads' stacks.
#include "emulation.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#ifdef WITH_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef WITH_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on this stack and goes on where `load` was saved. swapcontext does the same with two system calls.
extern "C" void emulation_switch(void** save, void* load);
__asm__(
    ".text\n.globl emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".size emulation_switch,.-emulation_switch\n");

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10, kSharedBytes = 48 << 10;
constexpr int kSavedRegisters = 6;

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* stack_pointer;
  int number;
  bool done;
  Operation waits_at;
  unsigned block_barriers, warp_barriers;  // so far
  uint64_t value;  // of a shuffle
  void* sanitizer;  // its thread, or its fake stack
  char fenced, observed;  // their addresses stand for what it wrote before its last fence, and for what its atomics have seen
};

struct Block {
  explicit Block(int threads) : threads(threads), order(threads) {
    for (int i = 0; i < threads; ++i) order[i] = i;
  }
  std::vector<Thread> threads;
  std::vector<int> order;
  std::unique_ptr<char[]> shared{new char[kSharedBytes]};
  char barriers[2], warp_barriers[32][2];  // their addresses stand for what a barrier orders; see barrier()
  const std::function<void()>* body;
  dim3 index;
  Thread* running;
  void* scheduler_stack_pointer;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

thread_local Block* block = nullptr;
std::mutex failure_mutex;
std::string failure;
std::atomic<bool> failed;
char finish_line;

void order_before(void* what) {
#ifdef WITH_TSAN
  __tsan_release(what);
#endif
  (void)what;
}
void order_after(void* what) {
#ifdef WITH_TSAN
  __tsan_acquire(what);
#endif
  (void)what;
}

void to_scheduler() {
  Thread& thread = *block->running;
#ifdef WITH_ASAN
  __sanitizer_start_switch_fiber(thread.done ? nullptr : &thread.sanitizer, block->scheduler_stack, block->scheduler_stack_bytes);
#endif
#ifdef WITH_TSAN
  __tsan_switch_to_fiber(block->scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  emulation_switch(&thread.stack_pointer, block->scheduler_stack_pointer);
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(thread.sanitizer, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

void resume(Thread& thread) {
  block->running = &thread;
#ifdef WITH_ASAN
  __sanitizer_start_switch_fiber(&block->scheduler_sanitizer, thread.stack.get(), kStackBytes);
#endif
#ifdef WITH_TSAN
  __tsan_switch_to_fiber(thread.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  emulation_switch(&block->scheduler_stack_pointer, thread.stack_pointer);
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(block->scheduler_sanitizer, nullptr, nullptr);
#endif
}

// Where every CUDA thread starts.
void entry() {
#ifdef WITH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  (*block->body)();
  order_before(&finish_line);
  block->running->done = true;
  to_scheduler();
}

void prepare(Thread& thread, int number) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(thread.stack.get() + kStackBytes) & ~uintptr_t{15});
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  thread.stack_pointer = top;
  thread.number = number;
  thread.done = false;
  thread.waits_at = Operation::none;
  thread.block_barriers = thread.warp_barriers = 0;
  thread.sanitizer = nullptr;
#ifdef WITH_TSAN
  thread.sanitizer = __tsan_create_fiber(0);
#endif
}

void record(const std::string& what) {
  const std::lock_guard<std::mutex> lock(failure_mutex);
  if (!failed.exchange(true))
    failure = what + " in block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ")";
}

bool all_at(Operation operation, int begin, int end) {
  for (int i = begin; i < end; ++i)
    if (block->threads[i].done || block->threads[i].waits_at != operation) return false;
  return true;
}

// Lets go on the block, or the warps, whose threads all wait at the same operation. False when there are none.
bool release_waiting() {
  const int count = block->threads.size();
  const bool whole = all_at(Operation::block_barrier, 0, count);
  bool released = false, all_done = true;
  for (int warp = 0; warp < count; warp += 32) {
    const Operation operation = block->threads[warp].waits_at;
    const bool of_warp = operation != Operation::block_barrier && operation != Operation::none;
    const bool free = whole || (of_warp && all_at(operation, warp, warp + 32));
    for (int i = warp; i < warp + 32; ++i) {
      if (free) block->threads[i].waits_at = Operation::none;
      all_done = all_done && block->threads[i].done;
    }
    released = released || free;
  }
  if (!released && !all_done) record("threads wait for others that do not come: a barrier or shuffle that not all reach");
  return released;
}

void run_block(const std::function<void()>& body, int64_t number, dim3 blocks) {
  block->body = &body;
  block->index = dim3(number % blocks.x, number / blocks.x);
  std::memset(block->shared.get(), 0xFF, kSharedBytes);
  std::mt19937 random(settings.seed + number);
  for (size_t i = 0; i < block->threads.size(); ++i) prepare(block->threads[i], i);
  do {
    if (settings.seed) std::shuffle(block->order.begin(), block->order.end(), random);
    for (int i : block->order) {
      Thread& thread = block->threads[i];
      if (!thread.done && thread.waits_at == Operation::none) resume(thread);
      if (failed) return;
    }
  } while (release_waiting());
#ifdef WITH_TSAN
  for (Thread& thread : block->threads) __tsan_destroy_fiber(thread.sanitizer);
#endif
}

}  // namespace

dim3 thread_index() { return dim3(block->running->number, 0, 0); }
dim3 block_index() { return block->index; }
int lane() { return block->running->number % 32; }

void* shared_memory_before(size_t bytes) { return block->shared.get() + kSharedBytes - (bytes + 15) / 16 * 16; }

void meet(Operation operation) {
  block->running->waits_at = operation;
  to_scheduler();
}

// Two places in turn: who is still to come out of one barrier must not see what others have done before they reached the next.
void barrier(Operation operation) {
  Thread& thread = *block->running;
  const bool whole = operation == Operation::block_barrier;
  char* places = whole ? block->barriers : block->warp_barriers[thread.number / 32];
  char* place = &places[(whole ? thread.block_barriers++ : thread.warp_barriers++) % 2];
  order_before(place);
  meet(operation);
  order_after(place);
}

void fence() {
  order_after(&block->running->observed);
  order_before(&block->running->fenced);
}

// What is ordered before `from` is ordered before `to`, by a messenger: the running thread itself would bring along all it did since.
static void carry(void* from, void* to) {
#ifdef WITH_TSAN
  __tsan_switch_to_fiber(block->scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
  void* messenger = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(messenger, __tsan_switch_to_fiber_no_sync);
  order_after(from);
  order_before(to);
  __tsan_switch_to_fiber(block->running->sanitizer, __tsan_switch_to_fiber_no_sync);
  __tsan_destroy_fiber(messenger);
#endif
  (void)from, (void)to;
}
void before_atomic(void* place) { carry(&block->running->fenced, place); }
void after_atomic(void* place) { carry(place, &block->running->observed); }

uint64_t exchange(Operation operation, uint64_t value, int source) {
  Thread& thread = *block->running;
  thread.value = value;
  meet(operation);
  const uint64_t received = block->threads[thread.number - lane() + source].value;
  meet(operation);  // nobody's value changes before all have read
  return received;
}

void fail(const std::string& what) {
  record(what);
  to_scheduler();  // which does not come back
}

std::string run(const std::function<void()>& body, dim3 blocks, int threads) {
  if (threads % 32 || threads > 1024) return "a block of " + std::to_string(threads) + " threads: not whole warps, or more than 1024";
  const int64_t count = int64_t{blocks.x} * blocks.y;
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  if (settings.seed) std::shuffle(order.begin(), order.end(), std::mt19937(settings.seed));
  failed = false;
  failure.clear();
  std::atomic<int64_t> next{0};
  std::vector<std::vector<std::unique_ptr<Block>>> kept(settings.workers);  // their memory may not be given to another block: see the top
  std::vector<std::thread> workers;
  for (int w = 0; w < settings.workers; ++w)
    workers.emplace_back([&, w] {
      for (int64_t i; !failed && (i = next++) < count;) {
#ifdef WITH_TSAN
        const bool fresh = true;
#else
        const bool fresh = kept[w].empty();
#endif
        if (fresh) kept[w].push_back(std::make_unique<Block>(threads));
        block = kept[w].back().get();
#ifdef WITH_TSAN
        block->scheduler_sanitizer = __tsan_get_current_fiber();
#endif
        run_block(body, order[i], blocks);
      }
    });
  for (std::thread& worker : workers) worker.join();
  order_after(&finish_line);
  return failure;
}

}  // namespace emulation
