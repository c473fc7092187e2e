#include "parallel.h"

#include <dlfcn.h>

namespace smartclip {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GNU's, LLVM's and Intel's runtimes all export it.
GompParallel find_runtime() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void parallel_call(int threads, void (*run)(void*), void* data) {
  if (const GompParallel runtime = find_runtime()) {
    runtime(run, data, static_cast<unsigned>(threads), 0);
  } else {
    run(data);
  }
}

const char* parallel_runtime() {
  Dl_info info;
  const GompParallel runtime = find_runtime();
  return runtime && dladdr(reinterpret_cast<void*>(runtime), &info) ? info.dli_fname : "";
}

}  // namespace smartclip
