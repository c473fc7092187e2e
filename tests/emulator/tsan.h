// What ThreadSanitizer has to be told. Its functions are there only where it is: every call does nothing elsewhere.
//
// This library itself is compiled without it: no variable of the scheduler is a shared one of the kernel.
#pragma once

#include <cstddef>
#include <cstdio>

extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fibre);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fibre, unsigned flags);
__attribute__((weak)) void __tsan_set_fiber_name(void* fibre, const char* name);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __tsan_read_range_pc(void* address, unsigned long bytes, void* site);
__attribute__((weak)) void __tsan_write_range_pc(void* address, unsigned long bytes, void* site);
}

namespace smartclip::emulator::tsan {

inline bool on() { return __tsan_create_fiber != nullptr; }

// An address through which what was before a release is before what is after an acquire.
class Order {
 public:
  void release() {
    if (on()) __tsan_release(this);
  }
  void acquire() {
    if (on()) __tsan_acquire(this);
  }

 private:
  alignas(8) char address_[8] = {};
};

// A sequence of accesses, as a thread's are. Changing from one to another orders nothing.
class Sequence {
 public:
  Sequence() = default;
  Sequence(const Sequence&) = delete;
  ~Sequence() {
    if (own_) __tsan_destroy_fiber(handle_);
  }

  void create(const char* what, int thread) {
    if (!on() || handle_) return;
    char name[64];
    std::snprintf(name, sizeof(name), "%s %d", what, thread);
    handle_ = __tsan_create_fiber(0);
    own_ = true;
    __tsan_set_fiber_name(handle_, name);
  }
  bool exists() const { return handle_ != nullptr; }
  void current() { handle_ = on() ? __tsan_get_current_fiber() : nullptr; }
  // After an acquire. LLVM's newer runtimes have 255 clocks for all sequences: where another has taken this one's away,
  // what it does from now on would count as done before the acquire. A release gives it a clock.
  void renew() { renewal_.release(); }
  void enter() const {
    constexpr unsigned kNoSync = 1;
    if (handle_) __tsan_switch_to_fiber(handle_, kNoSync);
  }

 private:
  void* handle_ = nullptr;
  bool own_ = false;
  Order renewal_;
};

// An access by the instruction that `site` follows.
inline void reads(const void* address, size_t bytes, const void* site) {
  if (on() && bytes) __tsan_read_range_pc(const_cast<void*>(address), bytes, const_cast<void*>(site));
}
inline void writes(void* address, size_t bytes, const void* site) {
  if (on() && bytes) __tsan_write_range_pc(address, bytes, const_cast<void*>(site));
}

}  // namespace smartclip::emulator::tsan
