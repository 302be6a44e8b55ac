// One block of a kernel on a CPU: its threads, its shared memory, its barriers and shuffles.
//
// Threads are fibers (ucontext): one runs until it must wait for others, then the next one does.
// So of two accesses to one address without a barrier between them, the thread that comes first in
// `order` always makes its own first: run forward and backward, a kernel that lacks a barrier
// gives a wrong result in one of the two. `die` says what would hang or be undefined on a GPU.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

// All that is declared `__shared__`, by the linker; nothing where a program declares none.
extern "C" unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 1 << 16;

using Jump = void* [5];  // __builtin_setjmp's

enum State { kRunning, kAtBarrier, kAtShuffle, kFinished };

struct Thread {
  ucontext_t start;
  bool has_started = false;
  Jump jump;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = kRunning;
  int line = 0;                                    // of the barrier
  unsigned mask = 0, distance = 0;                 // of the shuffle
  unsigned char value[8] = {}, received[8] = {};
};

// The order of blocks, and of threads between two barriers: 0 forward, 1 backward, else random.
inline unsigned order = 0;
inline unsigned block_index = 0;
inline std::vector<Thread> threads;
inline Thread* current = nullptr;
inline std::function<void()> body;  // of every thread
inline std::unique_ptr<unsigned char[]> dynamic_shared;
inline Jump scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;

[[noreturn]] inline void die(const char* what, int line = 0) {
  std::fprintf(stderr, "emulator: block %u: %s", block_index, what);
  std::fprintf(stderr, line ? " (line %d)\n" : "\n", line);
  std::abort();
}

inline std::vector<unsigned> in_order(unsigned count, unsigned round) {
  std::vector<unsigned> out(count);
  std::iota(out.begin(), out.end(), 0u);
  if (order == 1) std::reverse(out.begin(), out.end());
  if (order > 1) std::shuffle(out.begin(), out.end(), std::mt19937(order + round));
  return out;
}

inline unsigned current_index() { return unsigned(current - threads.data()); }

// From one stack to another, which is at this place too, or at its `start`. Not swapcontext, which
// makes a system call each time.
__attribute__((noinline, no_sanitize("address"))) inline void jump(Jump& from, Jump& to,
                                                                   const ucontext_t* start) {
  if (__builtin_setjmp(from)) return;
  if (start) setcontext(start);
  __builtin_longjmp(to, 1);
}

// AddressSanitizer has to be told which stack is in use.
inline void leave_thread() {
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, scheduler_stack, scheduler_stack_bytes);
  jump(current->jump, scheduler, nullptr);
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
}

inline void enter_thread(Thread& thread) {
  void* frames = nullptr;
  current = &thread;
  __sanitizer_start_switch_fiber(&frames, thread.stack.get(), kStackBytes);
  jump(scheduler, thread.jump, std::exchange(thread.has_started, true) ? nullptr : &thread.start);
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
}

// A fiber serves block after block: were it left for good, its stack would stay marked as in use.
inline void run_bodies() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    body();
    current->state = kFinished;
    leave_thread();
  }
}

inline void make_threads(unsigned count) {
  threads = std::vector<Thread>(count);
  for (Thread& thread : threads) {
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.start, run_bodies, 0);
  }
}

inline void barrier(int line) {
  current->state = kAtBarrier;
  current->line = line;
  leave_thread();
}

// Stricter than a GPU, which does not wait for threads that have returned: none here need that.
inline void pass_barrier() {
  for (Thread& thread : threads) {
    if (thread.state != kAtBarrier) die("not all threads reach a barrier");
    if (thread.line != threads[0].line) die("threads wait at different barriers", thread.line);
    thread.state = kRunning;
  }
}

inline void pass_shuffle(Thread* lanes) {
  const auto is_here = [](const Thread& t) { return t.state == kAtShuffle; };
  const Thread& asked = *std::find_if(lanes, lanes + kWarp, is_here);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (is_here(lanes[lane]) != bool(asked.mask >> lane & 1))
      die("the mask of a shuffle is not the lanes that take part");
    if (!is_here(lanes[lane])) continue;
    if (lanes[lane].mask != asked.mask || lanes[lane].distance != asked.distance)
      die("lanes differ in what they shuffle");
    const unsigned from = lane + asked.distance < kWarp ? lane + asked.distance : lane;
    if (!(asked.mask >> from & 1)) die("a shuffle reads a lane that takes no part");
    std::memcpy(lanes[lane].received, lanes[from].value, sizeof lanes[from].value);
  }
  for (Thread* lane = lanes; lane != lanes + kWarp; ++lane)
    if (is_here(*lane)) lane->state = kRunning;
}

inline bool any(const Thread* first, size_t count, State state) {
  return std::any_of(first, first + count, [state](const Thread& t) { return t.state == state; });
}

// Everybody goes on until it waits or is done; then shuffles are passed, or else the barrier.
inline void run_block() {
  Thread* const all = threads.data();
  for (Thread& thread : threads) thread.state = kRunning;
  for (unsigned round = 0; any(all, threads.size(), kRunning); ++round) {
    for (unsigned i : in_order(unsigned(threads.size()), round))
      if (all[i].state == kRunning) enter_thread(all[i]);
    const bool shuffles = any(all, threads.size(), kAtShuffle);
    for (Thread* warp = all; warp != all + threads.size(); warp += kWarp)
      if (any(warp, kWarp, kAtShuffle)) pass_shuffle(warp);
    if (!shuffles && any(all, threads.size(), kAtBarrier)) pass_barrier();
  }
}

// Fills a block's shared memory with what is a NaN in every format. Volatile: what writes all of
// it at once is checked, and would stumble over the guards between variables.
__attribute__((no_sanitize("address"))) inline void renew_shared(size_t dynamic_bytes) {
  dynamic_shared.reset(new unsigned char[dynamic_bytes]);
  std::memset(dynamic_shared.get(), 0xff, dynamic_bytes);
  for (volatile unsigned char* p = __start_emulated_shared; p != __stop_emulated_shared; ++p)
    *p = 0xff;
}

}  // namespace emulator
