// Sharing tasks out over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace smelt {

// Work (bytes read, or about as many operations) under which a second thread costs more than it
// brings.
constexpr int64_t kWorthThreads = 1 << 16;

// Calls f(task) for each task in 0 .. tasks. Threads take the next task when they are free, so that
// one slowed by another process holds up one task and not its whole share.
template <class F>
void for_tasks(int64_t tasks, bool worth_threads, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  if (!worth_threads || threads <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < tasks; i++) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) f(i);
  });
}

// Calls f(first, last) on pieces of 0 .. n of about `bytes_each` bytes in all, cut at multiples of
// `step`.
template <class F>
void for_pieces(int64_t n, int64_t step, int64_t bytes_each, const F& f) {
  constexpr int64_t kPiece = 1 << 16;
  const int64_t units = (n + step - 1) / step;
  const int64_t each = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, bytes_each * step));
  for_tasks((units + each - 1) / each, n * bytes_each > kWorthThreads, [&](int64_t i) {
    f(i * each * step, std::min(n, (i + 1) * each * step));
  });
}

// A buffer of this thread that stays allocated; each tag names one. Contents do not survive.
template <int Tag>
void* thread_buffer(int64_t bytes) {
  thread_local struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  } buffer;
  if (buffer.size < bytes) {
    ::operator delete(buffer.data, std::align_val_t(64));
    buffer.size = 0;
    buffer.data = ::operator new((size_t)bytes, std::align_val_t(64));
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace smelt
