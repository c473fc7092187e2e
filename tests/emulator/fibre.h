// Stacks, and going from one to another.
#pragma once

#include <cstddef>

#if defined(SMARTCLIP_EMULATOR_UCONTEXT) || !defined(__x86_64__)
#define SK_UCONTEXT 1
#include <ucontext.h>
#else
#define SK_UCONTEXT 0
#endif

namespace smartclip::emulator {

// Where a fibre goes on.
struct Context {
#if SK_UCONTEXT
  ucontext_t state;
#else
  void* stack = nullptr;
#endif
};

// The first change to `context` calls entry, which never returns. `top` is a multiple of 16.
void prepare(Context& context, char* top, size_t bytes, void (*entry)());

#if SK_UCONTEXT

inline void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

// swapcontext asks the operating system twice. Here the compiler saves the registers that it needs, and nothing is
// called or returned from: fibres that wait at one place return through the same calls, as the processor predicts.
[[gnu::always_inline]] inline void change(Context& from, Context& to) {
  void** save = &from.stack;
  void* stack = to.stack;
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n"  // what a function may keep below its stack
      "pushq %%rbp\n"
      "leaq 1f(%%rip), %%rax\n"
      "pushq %%rax\n"
      "movq %%rsp, (%0)\n"
      "movq %1, %%rsp\n"
      "popq %%rax\n"
      "jmpq *%%rax\n"
      "1:\n"
      "popq %%rbp\n"
      "leaq 128(%%rsp), %%rsp\n"
      : "+D"(save), "+S"(stack)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2",
        "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
        "cc", "memory");
}

#endif

// Addresses that cannot be touched until a part of them is opened.
class Pages {
 public:
  static constexpr size_t kPage = 65536;  // a multiple of any machine's

  Pages() = default;
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(Pages&& other) noexcept;

  void open(size_t offset, size_t bytes) { protect(offset, bytes, true); }
  void close() { protect(0, bytes_, false); }
  char* base() const { return base_; }
  size_t size() const { return bytes_; }
  bool contains(const void* address) const {
    return base_ && address >= base_ && static_cast<const char*>(address) < base_ + bytes_;
  }

 private:
  void protect(size_t offset, size_t bytes, bool open);

  char* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace smartclip::emulator
