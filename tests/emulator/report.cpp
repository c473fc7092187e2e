// What went wrong, in words; and the signals of a thread that touched what it must not.
#include <signal.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "state.h"

namespace smartclip::emulator {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

// Who had the signals first. Another library with an emulator may come later; two that call each other would never end.
struct sigaction others[4];
bool had[4] = {};

void on_fault(int signal, siginfo_t* info, void* context) {
  // x86-64 does not say where an address led that no address can be.
  const uintptr_t nowhere = ~uintptr_t(0);
  if (launch && identity)
    launch->fault(signal, info->si_code == SI_KERNEL ? reinterpret_cast<void*>(nowhere) : info->si_addr,
                  static_cast<const ucontext_t*>(context)->uc_sigmask);
  for (int i = 0; i < 4; ++i) {
    if (kSignals[i] != signal) continue;
    const struct sigaction& other = others[i];
    if (other.sa_flags & SA_SIGINFO) return other.sa_sigaction(signal, info, context);
    if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) return other.sa_handler(signal);
    ::signal(signal, SIG_DFL);  // the instruction is tried once more, and ends the process
  }
}

// Where a fibre's own stack is full, a handler needs another.
struct SignalStack {
  static constexpr size_t kBytes = 65536;
  std::unique_ptr<char[]> memory;

  void install() {
    stack_t now{};
    sigaltstack(nullptr, &now);
    if (!(now.ss_flags & SS_DISABLE)) return;
    memory = std::make_unique<char[]>(kBytes);
    now.ss_sp = memory.get(), now.ss_size = kBytes, now.ss_flags = 0;
    sigaltstack(&now, nullptr);
  }
  ~SignalStack() {
    if (!memory) return;
    stack_t none{};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
  }
};

// 0-3, 7
std::string ranges(uint32_t set) {
  const auto has = [set](int i) { return i >= 0 && i < kWarp && (set >> i & 1); };
  std::string text;
  for (int i = 0; i < kWarp; ++i) {
    if (!has(i)) continue;
    if (!has(i - 1)) text += (text.empty() ? "" : ", ") + std::to_string(i);
    if (has(i - 1) && !has(i + 1)) text += "-" + std::to_string(i);
  }
  return text;
}

// "lanes 0-15 wait, lanes 16-31 have ended": equal texts are told once.
template <class Text>
std::string grouped(const char* whose, int count, const char* separator, Text text_of) {
  std::vector<std::string> texts;
  for (int i = 0; i < count; ++i) texts.push_back(text_of(i));
  std::string all;
  for (int i = 0; i < count; ++i) {
    uint32_t same = 0;
    for (int k = 0; k < count; ++k) same |= uint32_t(texts[k] == texts[i]) << k;
    if (__builtin_ctz(same) == i) all += (all.empty() ? "" : separator) + (whose + (" " + ranges(same))) + texts[i];
  }
  return all;
}

}  // namespace

static const char* name_of(Instruction instruction) {
  constexpr const char* kNames[] = {"shuffle_xor",        "any_in_warp",
                                    "load_matrices",      "store_matrices",
                                    "sync_warp",          "multiply_add<bfloat16>",
                                    "multiply_add<half>", "multiply_add<Tf32>",
                                    "sync_block",         "shared_storage",
                                    "shared_address",     "copy_async_16",
                                    "init_barrier",       "arrive",
                                    "wait_for",           "sync_threads",
                                    "copy_box",           "begin_products",
                                    "multiply_add_async", "commit_products",
                                    "wait_for_products",  "give_registers",
                                    "take_registers"};
  return kNames[static_cast<int>(instruction)];
}

std::string in_words(Instruction instruction, Where where) {
  const char* const slash = std::strrchr(where.file, '/');
  return std::string(name_of(instruction)) + " (" + (slash ? slash + 1 : where.file) + ":" +
         std::to_string(where.line) + ")";
}

void install_fault_handler() {
  static thread_local SignalStack stack;
  static std::mutex mutex;
  stack.install();
  const std::lock_guard<std::mutex> lock(mutex);
  for (int i = 0; i < 4; ++i) {
    struct sigaction now{};
    sigaction(kSignals[i], nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) continue;
    if (!std::exchange(had[i], true)) others[i] = now;
    now.sa_sigaction = on_fault;
    now.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(kSignals[i], &now, nullptr);
  }
}

Options Options::read() {
  Options options;
  const std::map<std::string, std::function<void()>> known = {
      {"order=ascending", [&] { options.order = Order::kAscending; }},
      {"order=reverse", [&] { options.order = Order::kReverse; }},
      {"order=random", [&] { options.order = Order::kRandom; }},
      {"copies=latest", [&] { options.copies = Copies::kLatest; }},
      {"copies=earliest", [&] { options.copies = Copies::kEarliest; }},
      {"copies=random", [&] { options.copies = Copies::kRandom; }},
  };
  const char* const text = std::getenv("SMARTCLIP_EMULATOR");
  std::istringstream stream(text ? text : "");
  for (std::string item; std::getline(stream, item, ',');) {
    const auto found = known.find(item);
    if (found != known.end())
      found->second();
    else if (item.rfind("seed=", 0) == 0)
      options.seed = std::strtoull(item.c_str() + 5, nullptr, 10);
    else
      throw std::runtime_error("SMARTCLIP_EMULATOR: got '" + item +
                               "', needs order=ascending|reverse|random, copies=latest|earliest|random or seed=N");
  }
  return options;
}

std::string Launch::block_text() const {
  return std::string("smartclip_kernels emulator: kernel '") + name_ + "', block " + std::to_string(block_);
}

std::string Launch::thread_text(const Fibre& fibre) const {
  return block_text() + ", thread " + std::to_string(fibre.thread) + " (warp " + std::to_string(fibre.warp) +
         ", lane " + std::to_string(fibre.lane) + "): ";
}

void Launch::fail(Instruction instruction, Where where, const std::string& what) {
  stop(thread_text(me()) + in_words(instruction, where) + ": " + what);
}

void Launch::fail(const Product& product, const std::string& what) {
  stop(block_text() + ": " + in_words(Instruction::kProduct, product.where) + ": " + what);
}

void Launch::stop(std::string error) {
  error_ = std::move(error);
  main_sequence_.enter();
  change(me().context, main_);
  __builtin_unreachable();
}

// In a signal handler: no memory is asked for.
void Launch::fault(int signal, const void* address, const sigset_t& before) {
  fault_mask_ = before;
  fault_signal_ = signal;
  fault_address_ = address;
  faulty_ = &me();
  main_sequence_.enter();
  change(me().context, main_);
  __builtin_unreachable();
}

std::string Launch::fault_text() const {
  std::ostringstream text;
  text << thread_text(*faulty_);
  if (fault_signal_ == SIGFPE)
    text << "divides an integer by zero";
  else if (fault_signal_ == SIGILL)
    text << "meets an illegal instruction";
  else if (arena_->stacks.contains(fault_address_))
    text << "its stack is full";
  else if (arena_->shared.contains(fault_address_))
    text << "touches " << place(fault_address_);
  else
    text << "touches address " << fault_address_ << ", where nothing is";
  return text.str();
}

std::string Launch::place(const void* address) const {
  return "byte " + std::to_string(static_cast<const unsigned char*>(address) - shared()) + " of " +
         std::to_string(shared_bytes_) + " of shared memory";
}

// What lies between shared memory and the pages that cannot be touched.
std::string Launch::edge_text() const {
  const auto changed = [](const unsigned char* from, const unsigned char* to) {
    constexpr uint64_t kWord = kPoison * 0x0101010101010101u;
    for (; from < to; ++from) {
      while (to - from >= 8 && *reinterpret_cast<const uint64_t*>(from) == kWord) from += 8;
      if (from < to && *from != kPoison) return from;
    }
    return static_cast<const unsigned char*>(nullptr);
  };
  const unsigned char* const end = arena_->shared_end();
  const unsigned char* found = changed(end - arena_->open, shared());
  if (!found) found = changed(shared() + shared_bytes_, end);
  return found ? block_text() + ": a thread wrote to " + place(found) : "";
}

std::string Launch::waiting_text() const {
  return grouped("warps", threads_ / kWarp, "; ", [&](int w) {
    const Warp& warp = warps_[w];
    return ": " + grouped("lanes", kWarp, ", ", [&](int lane) -> std::string {
             const Fibre& waiter = *fibre(w, lane);
             if (warp.exited >> lane & 1) return " have ended";
             if (warp.runnable >> lane & 1) return " can run";
             const std::string text = " wait in " + in_words(waiter.instruction, waiter.where);
             if (waiter.instruction == Instruction::kSyncThreads)
               return text + ", barrier " + std::to_string(waiter.number) + ": " +
                      std::to_string(named_[waiter.number].arrived) + " of " +
                      std::to_string(named_[waiter.number].threads) + " threads";
             return waiter.instruction == Instruction::kWaitFor ? text + missing_text(waiter.barrier, waiter.number)
                                                                : text;
           });
  });
}

}  // namespace smartclip::emulator
