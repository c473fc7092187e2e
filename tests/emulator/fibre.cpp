#include "fibre.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace smartclip::emulator {

#if SK_UCONTEXT

void prepare(Context& context, char* top, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = top - bytes;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#else

void prepare(Context& context, char* top, size_t, void (*entry)()) {
  // What the change pops, and the return address of the entry, which ends a backtrace.
  uintptr_t* const stack = reinterpret_cast<uintptr_t*>(top) - 2;
  stack[0] = reinterpret_cast<uintptr_t>(entry);
  stack[1] = 0;
  context.stack = stack;
}

#endif

Pages::Pages(size_t bytes) : bytes_(bytes) {
  void* const address = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED)
    throw std::runtime_error(std::string("smartclip_kernels emulator: mmap: ") + strerror(errno));
  base_ = static_cast<char*>(address);
}

Pages::~Pages() {
  if (base_) munmap(base_, bytes_);
}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Pages::protect(size_t offset, size_t bytes, bool open) {
  if (base_ && mprotect(base_ + offset, bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE) != 0)
    throw std::runtime_error(std::string("smartclip_kernels emulator: mprotect: ") + strerror(errno));
}

}  // namespace smartclip::emulator
