// Work on several cores, by the OpenMP runtime that torch has mapped already: a second runtime, or threads of our own,
// would fight torch's for the cores. It is found at run time; where there is none, the parts run one after another.
#pragma once

#include <atomic>

namespace smartclip {

// Calls run(data) on up to `threads` threads at once.
void parallel_call(int threads, void (*run)(void*), void* data);

// The library that `parallel_call` uses; "" where there is none.
const char* parallel_runtime();

// Calls body(part) for every part in [0, parts). Parts are handed out one by one, so each runs exactly once even if the
// runtime gives fewer threads than asked for; what a part computes does not depend on the thread that it runs on.
template <class Body>
void parallel(int parts, Body& body) {
  struct Work {
    Body& body;
    int parts;
    std::atomic<int> next{0};
  } work{body, parts};
  if (parts == 1) return body(0);
  parallel_call(
      parts,
      [](void* data) {
        Work& work = *static_cast<Work*>(data);
        for (int part = work.next++; part < work.parts; part = work.next++) work.body(part);
      },
      &work);
}

}  // namespace smartclip
